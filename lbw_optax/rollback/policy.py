"""Orbax's policies of when a checkpoint is due, asked as its own checkpointer asks them."""

import datetime
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax.experimental import multihost_utils

from lbw_optax.rollback.checkpoints import ocp

policies = ocp.training.save_decision_policies


@runtime_checkable
class SaveDecisionPolicy(Protocol):
    """Of Orbax: `orbax.checkpoint.v1.training.save_decision_policies` has six of them."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        """Whether a checkpoint is due."""


class _Info(NamedTuple):
    """What Orbax wants to know of a checkpoint."""

    step: int
    metrics: dict[str, Any] | None
    time: datetime.datetime


class Policy:
    """As one of Orbax's policies says.

    It is asked at every call, on every process: as in Orbax it is the policy that must say the same
    on all of them, and those that look at a clock hand round what the first one says.
    """

    at_most = None  # steps between two, for all that is known

    def __init__(self, policy: Any, clock: Callable[[], float] = time.time):
        self._policy, self._clock = policy, clock
        self._saved: list[_Info] = []

    def is_due(self, now: Any) -> bool:
        context = policies.DecisionContext(
            is_saving_in_progress=now.is_writing,
            reached_preemption=_is_preempted(now.step),
            multiprocessing_options=ocp.options.MultiprocessingOptions(),
        )
        return bool(self._policy.should_save(self._info(now.step), self._saved, context=context))

    def time_is_up(self, seconds: float) -> bool:
        return False

    def saved(self, step: int) -> None:
        self._saved = [x for x in self._saved if x.step < step] + [self._info(step)]

    def _info(self, step: int) -> _Info:
        return _Info(step, None, datetime.datetime.fromtimestamp(self._clock(), datetime.UTC))

    def __str__(self) -> str:
        return f"what {type(self._policy).__name__} says"


def _is_preempted(step: int) -> bool:
    """Whether the machines are about to be taken away, and this is the step to save."""
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # this job has no service that would say so
        return False
