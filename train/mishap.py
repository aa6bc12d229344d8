"""A run through a bad stretch of data, with `RollbackManager` around the loop: the demo's last."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import lbw_optax
from train import loop

LENGTH = 22
"""Bad batches in a row; the guard skips them, and asks for a rollback after twenty."""


class Mishap(NamedTuple):
    """What such a run leaves. A call is one update, also one that was undone by a rollback.

    `history` has one array of length `calls` per metric, `events` are at calls, not at steps.
    """

    params: Any
    history: dict[str, np.ndarray]
    events: list[lbw_optax.Event]
    rollbacks: list[Any]


def survive(
    loss_fn: loop.LossFn,
    params: Any,
    frozen: Any,
    tx: optax.GradientTransformationExtraArgs,
    opt_state: Any,
    batch: Callable[[int], Any],
    steps: int,
    on_step: Callable[[int, dict[str, np.ndarray]], None],
) -> Mishap:
    """Train as `train.loop.fit` does, but from half way on `LENGTH` batches have a NaN for a loss.

    It belongs to the batches, not to the steps: whoever takes them again fails again.
    """
    bad = range(steps // 2, steps // 2 + LENGTH)

    def flawed_loss(params: Any, frozen: Any, batch: tuple[Any, jax.Array]) -> jax.Array:
        tokens, weight = batch
        return weight * loss_fn(params, frozen, tokens)

    records: list[dict[str, np.ndarray]] = []
    # What the caller holds is donated by no step.
    state = jax.tree.map(jax.numpy.copy, (params, opt_state))
    with (
        tempfile.TemporaryDirectory() as directory,
        lbw_optax.RollbackManager(directory) as rollback,
    ):
        step, state = rollback.resume(state)
        while step < steps:
            index = rollback.data_step(step)
            weighed = batch(index), np.float32(np.nan if index in bad else 1)
            *state, metrics = loop.train_step(flawed_loss, tx.update, *state, frozen, weighed)
            records.append(jax.device_get(metrics))
            on_step(step, records[-1])
            step, state = rollback.step(step + 1, tuple(state))
    history = {name: np.stack([record[name] for record in records]) for name in records[0]}
    # An event that the state reports after a call, and not before, happened in that call.
    events = [
        event._replace(step=int(np.argmax(history["events"] > event.number)))
        for event in lbw_optax.events(state[1])
    ]
    return Mishap(state[0], history, events, rollback.history)
