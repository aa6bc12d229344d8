"""A long run with faults and full disks, for test_soak: it prints each step, and what it holds.

    python tests/rollback_soak.py DIRECTORY STEPS SEED

A line is a step, and now and then with it the memory in bytes, open files and threads. The last is
a line of JSON.
"""

import functools
import json
import os
import resource
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rollback_loop import Patient, batch, mean_loss, optimizer, start

import lbw_optax
from lbw_optax.testing import Fault

KINDS = (
    "nan_loss",
    "nan_gradient",
    "inf_gradient",
    "scaled_gradient",
    "flipped_parameter",
    "flipped_mu",
    "flipped_nu",
)
# Steps between faults, on average, and between the beginnings of full disks.
FAULT_EVERY, FULL_EVERY = 400, 5000
SAVE_EVERY, SNAPSHOT_EVERY, MAX_DISTANCE = 500, 20, 50
# Batches that are made anew for every step would take more time than the steps.
BATCHES = 1000
LOOK_EVERY = 50


class Mishaps(NamedTuple):
    """What goes wrong and when: a pure function of the seed.

    Attributes:
      kinds: by index of the batch, the number of a kind, or -1.
      full: pairs of steps, between which no file can be written.
    """

    kinds: np.ndarray
    full: list[tuple[int, int]]


def mishaps(steps: int, seed: int) -> Mishaps:
    rng = np.random.default_rng(seed)
    indices = 2 * steps  # rollbacks leave batches out
    kinds = rng.integers(0, len(KINDS), indices)
    starts = rng.integers(FULL_EVERY // 4, FULL_EVERY, max(1, steps // FULL_EVERY))
    starts = starts + FULL_EVERY * np.arange(len(starts))
    lengths = rng.integers(SAVE_EVERY, 2 * SAVE_EVERY, len(starts))
    full = [(int(a), int(a + n)) for a, n in zip(starts, lengths, strict=True)]
    return Mishaps(np.where(rng.random(indices) < 1 / FAULT_EVERY, kinds, -1), full)


@functools.partial(jax.jit, donate_argnums=0)
def update(tree: Any, data: Any, index: Any, kind: Any) -> Any:
    """A training step, struck by the fault of this number; -1 for none."""
    faults = [Fault(name, at=jnp.where(kind == i, index, -1)) for i, name in enumerate(KINDS)]
    params, state = tree
    for fault in faults:
        params = fault.params(index, params)
        state = fault.opt_state(index, state)

    def loss_of(params: Any) -> jax.Array:
        x, y = data
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    for fault in faults:
        loss, gradients = fault.gradients(index, loss, gradients)
    updates, state = optimizer().update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state


def limit_files(is_full: bool) -> None:
    """A size limit of 0 makes every write to a file fail."""
    most = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if is_full else most, most))


def held() -> tuple[int, int, int]:
    """Memory in bytes, open files, threads."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return (
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def main(directory: str, steps: int, seed: int) -> None:
    plan, batches = mishaps(steps, seed), [batch(i) for i in range(BATCHES)]
    options = {"save_every": SAVE_EVERY, "snapshot_every": SNAPSHOT_EVERY, "max_rollbacks": 100}
    with Patient(directory, max_distance=MAX_DISTANCE, **options) as rollback:
        step, tree = rollback.resume(start())
        print(step, flush=True)
        was_full = False
        while step < steps:
            is_full = any(a <= step < b for a, b in plan.full)
            if is_full != was_full:
                limit_files(is_full)
                was_full = is_full
            index = rollback.data_step(step)
            data = batches[index % BATCHES]
            tree = update(tree, data, np.int32(index), np.int32(plan.kinds[index]))
            step, tree = rollback.step(step + 1, tree)
            print(step, *(held() if step % LOOK_EVERY == 0 else ()), flush=True)
        limit_files(False)
        rollback.save(step, tree)
        skips = int(lbw_optax.metrics(tree[1])["skips"])
        history = [r._asdict() for r in rollback.history]
    print(json.dumps({"history": history, "skips": skips, "loss": mean_loss(tree)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
