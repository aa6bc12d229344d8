"""When a checkpoint is due: after so many steps, after so much time, or as Orbax's policy says."""

from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from lbw_optax.rollback.policy import Policy, SaveDecisionPolicy

DEFAULT = timedelta(minutes=5)
# So many steps lie at least between two checkpoints that are taken by the clock.
LEAST_STEPS = 100


class Now(NamedTuple):
    """What a decision is made from; the same on all processes.

    Attributes:
      step: the step that could be saved.
      since: steps since the last checkpoint, or the last that was left out.
      time_is_up: whether a process's clock says so.
      is_writing: whether the checkpoint before is still being written, for all that is known.
    """

    step: int
    since: int
    time_is_up: bool
    is_writing: bool


class Steps:
    """After so many steps."""

    def __init__(self, every: int):
        self.at_most = every

    def is_due(self, now: Now) -> bool:
        return now.since >= self.at_most

    def time_is_up(self, seconds: float) -> bool:
        return False

    def saved(self, step: int) -> None:
        pass

    def __str__(self) -> str:
        return f"{self.at_most} steps"


class Time:
    """After so much time and so many steps.

    The processes' clocks differ: that time is up is one of the numbers that go with every verdict,
    so the decision costs no collective of its own and is the same everywhere.

    Args:
      every: the time.
      most: steps after which time is not waited for, None for never.
    """

    def __init__(self, every: timedelta, most: int | None = None):
        self._every, self.at_most = every, most

    def is_due(self, now: Now) -> bool:
        is_late = self.at_most is not None and now.since >= self.at_most
        return is_late or (now.time_is_up and now.since >= LEAST_STEPS)

    def time_is_up(self, seconds: float) -> bool:
        return seconds >= self._every.total_seconds()

    def saved(self, step: int) -> None:
        pass

    def __str__(self) -> str:
        least = f"{self._every.total_seconds():g} seconds and at least {LEAST_STEPS} steps"
        return least if self.at_most is None else f"{least}, or {self.at_most} steps"


Cadence = Steps | Time | Policy


def of(save_every: Any, *, most: int | None) -> Cadence:
    """The cadence that a user has asked for.

    Args:
      save_every: steps, a time, or a policy.
      most: steps after which a checkpoint is due whatever the clock says, None for never.

    Raises:
      ValueError: if it is none of these, or less than one step.
    """
    if isinstance(save_every, timedelta):
        if save_every < timedelta(0):
            raise ValueError(f"save_every must be no time before now, got {save_every}.")
        return Time(save_every, most)
    if isinstance(save_every, SaveDecisionPolicy):
        return Policy(save_every)
    if not isinstance(save_every, int | np.integer) or isinstance(save_every, bool):
        raise ValueError(
            "save_every must be an integer, for steps, or a datetime.timedelta, or a "
            f"SaveDecisionPolicy of Orbax, got {save_every!r}."
        )
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}.")
    return Steps(int(save_every))
