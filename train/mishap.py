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


class Flawed(NamedTuple):
    """A task whose batches are bad for a while: from half way on `LENGTH` have a NaN for a loss.

    It belongs to the batches, not to the steps: whoever takes them again fails again.
    """

    loss_fn: loop.LossFn
    batch: Callable[[int], Any]
    steps: int

    @property
    def bad(self) -> range:
        return range(self.steps // 2, self.steps // 2 + LENGTH)

    def weighed(self, index: int) -> tuple[Any, np.float32]:
        """A batch, and what its loss is multiplied with."""
        return self.batch(index), np.float32(np.nan if index in self.bad else 1)

    def loss(self, params: Any, frozen: Any, batch: tuple[Any, jax.Array]) -> jax.Array:
        tokens, weight = batch
        return weight * self.loss_fn(params, frozen, tokens)


def survive(
    task: Flawed,
    params: Any,
    frozen: Any,
    tx: optax.GradientTransformationExtraArgs,
    opt_state: Any,
    on_step: Callable[[int, dict[str, np.ndarray]], None],
    on_rollback: Callable[[int], None],
) -> Mishap:
    """Train as `train.loop.fit` does, with rollback; `on_rollback` is told the steps undone."""
    records: list[dict[str, np.ndarray]] = []
    # What the caller holds is donated by no step.
    state = jax.tree.map(jax.numpy.copy, (params, opt_state))
    with (
        tempfile.TemporaryDirectory() as directory,
        # A cadence of its own, so that it goes back to the same step on every machine.
        lbw_optax.RollbackManager(directory, snapshot_every=7) as rollback,
    ):
        step, state = rollback.resume(state)
        while step < task.steps:
            weighed = task.weighed(rollback.data_step(step))
            *state, metrics = loop.train_step(task.loss, tx.update, *state, frozen, weighed)
            records.append(jax.device_get(metrics))
            on_step(step, records[-1])
            made = step + 1
            step, state = rollback.step(made, tuple(state))
            if step < made:
                on_rollback(made - step)
    history = {name: np.stack([record[name] for record in records]) for name in records[0]}
    # An event that the state reports after a call, and not before, happened in that call.
    events = [
        event._replace(step=int(np.argmax(history["events"] > event.number)))
        for event in lbw_optax.events(state[1])
    ]
    return Mishap(state[0], history, events, rollback.history)
