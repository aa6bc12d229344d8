"""The same run as a loop on the host, with the real `RollbackManager` around it."""

import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.faults.measures import Trace
from benchmarks.faults.run import Method, State, Text, inputs_of, one_step, start
from lbw_optax import GuardExhausted, RollbackManager
from lbw_optax.testing import Fault

# Steps between copies in memory; where they are chosen by the clock, no two machines agree.
COPY_EVERY = 7


def run(
    text: Text, method: Method, seed: int, rates: np.ndarray, faults: Sequence[Fault], steps: int
) -> tuple[State, Trace, list[str]]:
    """State, trace, and why the run was left, step by step back: the reasons of its rollbacks.

    A fault of the data stays with its batch, whatever step the batch is used in; a fault of the
    machine comes once, at its time; one of the schedule comes again with the schedule's count.
    When the manager gives up, the reason is "exhausted" and the run ends there.
    """
    parts: list[Trace] = []
    gave_up: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        RollbackManager(folder, snapshot_every=COPY_EVERY) as rollback,
    ):
        step, state = rollback.resume(start(method, seed))
        while step < steps and not gave_up:
            given = inputs_of(text, seed, faults, len(parts), rollback.data_step(step))
            state, seen = one_step(method, rates, text.curve, state, given)
            parts.append(seen._replace(step=np.int32(step)))
            try:
                step, state = rollback.step(step + 1, state)
            except GuardExhausted:
                gave_up = ["exhausted"]
    trace = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(parts))
    return state, trace, [r.reason for r in rollback.history] + gave_up
