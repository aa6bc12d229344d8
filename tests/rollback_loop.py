"""A small run with rollback that several test modules share: noisy regression, donated buffers."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbw_optax import RollbackManager, lbw_guard

QUICK = {"save_every": 8, "snapshot_every": 4, "probation": 3, "max_distance": 20}
"""Copies at every few steps, so that a test sees many of them in a short run."""


@functools.cache
def optimizer() -> optax.GradientTransformationExtraArgs:
    return lbw_guard(optax.adamw(0.03))


def start() -> tuple[Any, Any]:
    params = {"b": jnp.zeros((1, 3)), "w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    return params, optimizer().init(params)


def batch(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A pure function of its index."""
    rng = np.random.default_rng(index)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    noise = 0.3 * rng.normal(size=(16, 3))
    return x, (x @ np.linspace(-0.5, 2, 12).reshape(4, 3) + noise).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=0)
def update(tree: Any, data: Any) -> Any:
    params, state = tree

    def loss_of(params: Any) -> jax.Array:
        x, y = data
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer().update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state


class Patient(RollbackManager):
    """A manager whose disk is as fast as these steps, of a millisecond each.

    Or most checkpoints would be left out. What is being written is waited for in the steps before
    the next is due, so that the run goes on while it is written.
    """

    def step(self, step: int, tree: Any) -> tuple[int, Any]:
        disk = self._candidates._disk
        since = (self._last or 0) - (disk._since_step or 0)
        if disk._write is not None and (since >= disk._cadence.at_most - 2 or disk._wants_trial):
            with contextlib.suppress(Exception):  # the manager says it
                disk._write()
        return super().step(step, tree)


Fault = Callable[[Any], Any]


def run(
    directory: Path,
    steps: int,
    faults: Mapping[int, Fault] | None = None,
    *,
    bad_batches: Mapping[int, Any] | None = None,
    on_step: Callable[[RollbackManager, int, Any], None] | None = None,
    tree: Any = None,
    **options: Any,
) -> tuple[Any, RollbackManager, list[int]]:
    """Train to `steps`; a fault strikes the state once, at the first time that step is reached.

    Returns the final state, the manager, and the batch of every update that was made.
    """
    pending, used = dict(faults or {}), []
    with Patient(directory, **{**QUICK, **options}) as rollback:
        step, tree = rollback.resume(start() if tree is None else tree)
        while step < steps:
            index = rollback.data_step(step)
            used.append(index)
            tree = update(tree, (bad_batches or {}).get(index) or batch(index))
            step += 1
            if step in pending:
                tree = pending.pop(step)(tree)
            step, tree = rollback.step(step, tree)
            if on_step is not None:
                on_step(rollback, step, tree)
    return tree, rollback, used


def plain(steps: int, tree: Any = None, batches: Any = batch) -> Any:
    """The same training without a manager."""
    tree = start() if tree is None else tree
    for step in range(steps):
        tree = update(tree, batches(step))
    return tree


def nan_parameter(tree: Any) -> Any:
    params, state = tree
    return params | {"w": params["w"].at[1, 1].set(jnp.nan)}, state


def flip_bit(x: Any, bit: int, index: Any = 0) -> jax.Array:
    """One bit of one float32, as a fault of memory would flip it."""
    bits = np.array(x).reshape(-1).view(np.uint32)
    bits[index] ^= np.uint32(1 << bit)
    return jnp.asarray(bits.view(np.float32).reshape(np.shape(x)))


def flip_parameter(bit: int) -> Fault:
    def fault(tree: Any) -> Any:
        return tree[0] | {"w": flip_bit(tree[0]["w"], bit, 4)}, tree[1]

    return fault


def in_moment(name: str, change: Callable[[Any], Any]) -> Fault:
    """Adam's first ("mu") or second ("nu") moment of the weights, changed."""

    def fault(tree: Any) -> Any:
        moment = optax.tree.get(tree[1].inner_state, name)
        moment = moment | {"w": change(moment["w"])}
        inner = optax.tree.set(tree[1].inner_state, **{name: moment})
        return tree[0], tree[1]._replace(inner_state=inner)

    return fault


def mean_loss(tree: Any) -> float:
    """On batches that no run sees."""
    losses = []
    for index in range(10**6, 10**6 + 20):
        x, y = batch(index)
        prediction = x @ np.asarray(tree[0]["w"]) + np.asarray(tree[0]["b"])
        losses.append(np.square(prediction - y).mean())
    return float(np.mean(losses))
