"""Copies of the state in host memory: one on trial, and the last that have proven healthy."""

from collections.abc import Callable

from lbw_optax.rollback import snapshots
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.verdict import Verdict
from lbw_optax.types import PyTree

# Proven states that are kept.
KEPT = 2
LONG_AGO = -(10**9)


class Memory:
    """The tier in memory; `every` None keeps nothing.

    Args:
      every: steps between copies.
      probation: steps without trouble that prove a copy healthy.
      judge: whether a state may be gone back to, for all that it holds.
    """

    def __init__(
        self, every: int | None, probation: int, judge: Callable[[Snapshot, Verdict], bool]
    ):
        self._every, self._probation, self._judge = every, probation, judge
        self._proven: list[Snapshot] = []  # oldest first
        self._trial: Snapshot | None = None
        self._copied_at = LONG_AGO

    @property
    def is_on(self) -> bool:
        return self._every is not None

    @property
    def nbytes(self) -> int:
        held = self._proven + ([self._trial] if self._trial else [])
        return sum(snapshot.nbytes for snapshot in held)

    @property
    def steps(self) -> list[int]:
        """Of the states that have proven healthy."""
        return [snapshot.step for snapshot in self._proven]

    def is_due(self, step: int) -> bool:
        """Whether a copy should be taken of this step."""
        if self._every is None or self._trial is not None:
            return False
        return step - self._copied_at >= self._every

    def put(self, snapshot: Snapshot, *, proven: bool = False) -> None:
        """Keep this copy, on trial unless it is known to be good."""
        if self._every is None:
            return
        self._copied_at = snapshot.step
        if proven:
            self._proven, self._trial = [snapshot], None
        else:
            self._trial = snapshot

    def learn(self, verdict: Verdict) -> bool:
        """Drop the copy that trouble followed, promote the one that it did not; True if it was."""
        trial = self._trial
        if trial is None or verdict.step < trial.step:
            return False
        if verdict.is_trouble:
            self._trial, self._copied_at = None, LONG_AGO
        if not verdict.proves(trial.step, self._probation):
            return False
        self._trial = None
        if not self._judge(trial, verdict):
            return False
        self._proven = [*self._proven, trial][-KEPT:]
        return True

    def load(self, step: int, like: PyTree) -> PyTree:
        """The state of a proven copy."""
        return snapshots.restore(next(s for s in self._proven if s.step == step), like)

    def return_to(self, step: int) -> None:
        """Forget everything after this step."""
        self._proven = [snapshot for snapshot in self._proven if snapshot.step <= step]
        self._trial, self._copied_at = None, step
