"""The training loop: one jitted step, no trainer, and no wait for the host between steps."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax
from lbw_optax.activations import stacked
from train.losses import IGNORED, targets

LossFn = Callable[[Any, Any, Any], Any]
"""``loss_fn(params, frozen, batch)`` gives the mean loss of a batch, a scalar, or (loss,
`lbw_optax.activations.Activations`), which are passed to the optimizer's `update`."""


class Fit(NamedTuple):
    """What a run leaves: parameters, optimizer state, and one array of length `steps` per metric.

    `history` holds "loss", where the optimizer state holds a guard all `lbw_optax.metrics`, and
    of a loss with activations "activation_peaks", one of each layer.
    """

    params: Any
    opt_state: Any
    history: dict[str, np.ndarray]


def fit(
    loss_fn: LossFn,
    params: Any,
    tx: optax.GradientTransformation,
    batch: Callable[[int], Any],
    steps: int,
    *,
    frozen: Any = None,
    opt_state: Any = None,
    on_step: Callable[[int, dict[str, np.ndarray], Any], None] | None = None,
) -> Fit:
    """Minimise ``loss_fn(params, frozen, batch(step))`` over `params` with any optimizer.

    The caller's arguments stay valid. `frozen` is an argument of the compiled step, so it is
    neither copied into the program nor updated. Without `opt_state` the run starts from
    ``tx.init(params)``. ``on_step(step, metrics, opt_state)`` is called
    for every step, when the next one has been dispatched: `metrics` are that step's, `opt_state`
    is the newest one, and it is gone after the call. Looking into it waits for the device.

    >>> loss_fn = lambda params, frozen, batch: jnp.sum((params - batch) ** 2)
    >>> run = fit(loss_fn, jnp.zeros(2), optax.sgd(0.25), lambda step: np.ones(2), steps=3)
    >>> run.params.tolist(), run.history["loss"].tolist()
    ([0.875, 0.875], [2.0, 0.5, 0.125])
    """
    tx = optax.with_extra_args_support(tx)
    opt_state = tx.init(params) if opt_state is None else opt_state
    # Copies, because each step donates what it is given.
    params, opt_state = jax.tree.map(jnp.copy, (params, opt_state))
    records: list[dict[str, np.ndarray]] = []
    before = None
    for step in range(steps):
        params, opt_state, metrics = train_step(
            loss_fn, tx.update, params, opt_state, frozen, batch(step)
        )
        if before is not None:
            _record(records, before, on_step, opt_state)
        before = metrics
    if before is not None:
        _record(records, before, on_step, opt_state)
    history = {name: np.stack([record[name] for record in records]) for name in before or ()}
    return Fit(params, opt_state, history)


@functools.partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=(2, 3))
def train_step(
    loss_fn: LossFn,
    update: Callable[..., Any],
    params: Any,
    opt_state: Any,
    frozen: Any,
    batch: Any,
    microbatches: int = 1,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """One compiled step: new parameters, new optimizer state, and the step's metrics.

    `params` and `opt_state` are donated. With `microbatches` the batch, tokens or a
    `train.losses.Batch`, is taken in so many equal parts, one after the other.
    """
    loss, grads, activations = _gradient(loss_fn, params, frozen, batch, microbatches)
    seen = {"loss": loss}
    if activations is None:
        updates, opt_state = update(grads, opt_state, params, value=loss)
    else:
        seen["activation_peaks"] = stacked(activations).outliers.peak
        updates, opt_state = update(grads, opt_state, params, value=loss, activations=activations)
    params = optax.apply_updates(params, updates)
    return params, opt_state, _metrics(opt_state) | seen


def with_activations(loss_fn: LossFn) -> Callable[..., tuple[jax.Array, Any]]:
    """The loss and its activations, None where it has none."""

    def both(*arguments: Any) -> tuple[jax.Array, Any]:
        found = loss_fn(*arguments)
        return found if isinstance(found, tuple) else (found, None)

    return both


def _gradient(
    loss_fn: LossFn, params: Any, frozen: Any, batch: Any, microbatches: int
) -> tuple[jax.Array, Any, Any]:
    """Loss, gradient and activations of the whole batch, in the memory of one part of it.

    Each part counts with its share of the targets, so that the sum is the gradient of the mean
    over all targets; of the activations the largest counts. Accumulating here and not in
    `optax.MultiSteps` keeps one optimizer step, and one decision of the guard, a step: the
    overshoot is that of a step that was really taken, and no half-filled accumulator has to be
    saved or rolled back.
    """
    gradient = jax.value_and_grad(with_activations(loss_fn), has_aux=True)
    if microbatches == 1:
        (loss, activations), grads = gradient(params, frozen, batch)
        return loss, grads, activations
    parts = _parts(batch, microbatches)
    counts = jax.vmap(lambda part: (targets(part) != IGNORED).sum())(parts)
    shares = counts / jnp.maximum(counts.sum(), 1)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        share, tokens = part
        (loss, activations), grads = gradient(params, frozen, tokens)
        found = loss, grads
        total = jax.tree.map(lambda t, x: t + share * x.astype(jnp.float32), total, found)
        return total, activations

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.zeros(()), params))
    (loss, grads), every = jax.lax.scan(add, zeros, (shares, parts))
    activations = jax.tree.map(lambda of_parts: jnp.max(of_parts, axis=0), every)
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), activations


def _parts(batch: Any, count: int) -> Any:
    """The batch in equal parts along a new first axis; dropout's step gets a number for each."""

    def cut(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return x * count + jnp.arange(count, dtype=x.dtype)
        if len(x) % count:
            raise ValueError(
                f"a batch of {len(x)} sequences cannot be cut into {count} microbatches: "
                "choose a batch size that is a multiple"
            )
        # Part i takes every so many rows, so that a batch split over devices stays split.
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Of a guard in this state, and of QK-clip."""
    clips = optax.tree.get(opt_state, "qk_clips")
    counted = {} if clips is None else {"qk_clips": clips}
    try:
        return lbw_optax.metrics(opt_state) | counted
    except ValueError:  # no guard in this state
        return counted


def _record(
    records: list[dict[str, np.ndarray]],
    metrics: dict[str, jax.Array],
    on_step: Callable[[int, dict[str, np.ndarray], Any], None] | None,
    opt_state: Any,
) -> None:
    records.append(jax.device_get(metrics))
    if on_step is not None:
        on_step(len(records) - 1, records[-1], opt_state)


def perplexity(
    loss_fn: LossFn, params: Any, windows: Iterable[np.ndarray], *, frozen: Any = None
) -> float:
    """``exp(total loss / number of targets)`` over batches of windows (`train.data.windows`).

    Each batch counts with its number of targets, so a padded last batch weighs what it holds.
    Windows share no target: the stride is their length, and a token is predicted from the
    part of its window before it. The next batch is asked for when the one before last is done.
    """
    total: list[jax.Array] = []
    targets = []
    for tokens in windows:
        if len(total) > 1:
            total[-2].block_until_ready()
        total.append(_evaluate(loss_fn, params, frozen, tokens))
        targets.append(np.count_nonzero(tokens[:, 1:] != IGNORED))
    mean = np.average(np.asarray(jax.device_get(total), np.float64), weights=targets)
    with np.errstate(over="ignore"):  # a broken run's perplexity may well be infinite
        return float(np.exp(mean))


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(loss_fn: LossFn, params: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    return loss_fn(params, frozen, tokens)
