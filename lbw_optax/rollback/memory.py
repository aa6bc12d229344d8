"""Copies of the state in memory: some on trial, and some that have proven healthy."""

from collections.abc import Callable

from lbw_optax.rollback import snapshots
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.verdict import Verdict
from lbw_optax.types import PyTree

# Proven states that are kept; and where they are small.
KEPT, KEPT_SMALL = 2, 4
# All but the newest are there for a fault that the newest holds already: so many steps lie between
# them.
SPREAD = 7
LONG_AGO = -(10**9)


Judge = Callable[[Snapshot, Verdict], bool]


class Memory:
    """The tier in memory; `every` None keeps nothing.

    Args:
      every: steps between copies; may be changed.
      probation: steps without trouble that prove a copy healthy.
      judge: whether a state may be gone back to, for all that it holds.
    """

    def __init__(self, every: int | None, probation: int, judge: Judge):
        self.every = every
        self.kept = KEPT
        self._probation, self._judge = probation, judge
        self._proven: list[Snapshot] = []  # oldest first
        self._trials: list[Snapshot] = []
        self._copied_at = LONG_AGO
        self._copy_bytes = 0

    @property
    def is_on(self) -> bool:
        return self.every is not None

    @property
    def nbytes(self) -> int:
        return self._copy_bytes * len(self._proven + self._trials)

    @property
    def steps(self) -> list[int]:
        """Of the states that have proven healthy."""
        return [snapshot.step for snapshot in self._proven]

    def is_due(self, step: int) -> bool:
        """Whether a copy should be taken of this step.

        A multiple of `every` has been reached since the last: a run that was killed and resumed at
        any step takes the copies that it would have taken.
        """
        if self.every is None or len(self._trials) >= on_trial(self.every, self._probation):
            return False
        return step // self.every > self._copied_at // self.every

    def put(self, snapshot: Snapshot, *, proven: bool = False) -> None:
        """Keep this copy, on trial unless it is known to be good."""
        if self.every is None:
            return
        self._copied_at = snapshot.step
        self._copy_bytes = self._copy_bytes or snapshot.nbytes
        if proven:
            self._proven, self._trials = [snapshot], []
        else:
            self._trials.append(snapshot)

    def learn(self, verdict: Verdict) -> bool:
        """Drop the copies that trouble followed, promote those it did not; True if any was."""
        seen = [trial for trial in self._trials if trial.step <= verdict.step]
        if not seen:
            return False
        if verdict.is_trouble:
            self._trials, self._copied_at = self._trials[len(seen) :], LONG_AGO
            return False
        over = [trial for trial in seen if verdict.proves(trial.step, self._probation)]
        self._trials = self._trials[len(over) :]
        good = [trial for trial in over if self._judge(trial, verdict)]
        for snapshot in good:
            self._keep(snapshot)
        return bool(good)

    def _keep(self, snapshot: Snapshot) -> None:
        """What was the newest stays if it is far enough from the one before it."""
        if len(self._proven) > 1 and self._proven[-1].step - self._proven[-2].step < SPREAD:
            self._proven.pop()
        self._proven = [*self._proven, snapshot][-self.kept :]

    def load(self, step: int, like: PyTree) -> PyTree:
        """The state of a proven copy."""
        return snapshots.restore(next(s for s in self._proven if s.step == step), like)

    def return_to(self, step: int) -> None:
        """Forget everything after this step."""
        self._proven = [snapshot for snapshot in self._proven if snapshot.step <= step]
        self._trials, self._copied_at = [], step


def on_trial(every: int, probation: int) -> int:
    """Copies that are on trial at a time."""
    return -(-(probation + 1) // every)
