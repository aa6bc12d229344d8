"""How often a copy in memory is taken, from the time that a copy and a step take.

A copy every n steps costs copy / (n step) of the run's time, counted as if it could not overlap
with a step. The smallest n is chosen that stays within the budget, or the largest that keeps
`max_distance`. Until enough steps are timed it is FIRST.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

# Until it has been measured.
FIRST = 7
# Steps that are timed before a cadence is chosen, and before it is looked at again.
TIMED = 64
# A fault of which the loss tells has shown itself after so many steps.
SIGNS = 8


class Bounds(NamedTuple):
    """Of the cadence, in steps: what the memory has room for, and what keeps `max_distance`."""

    least: int
    most: int

    def keep(self, every: int) -> int:
        """The nearest that is within these."""
        return max(self.least, min(every, self.most))


def bounds(max_distance: int, probation: int, *, is_small: bool) -> Bounds:
    """Where the state is small every step may be copied; else a copy is on probation at a time."""
    most = max(1, max_distance - probation - 1 - SIGNS)
    return Bounds(1 if is_small else min(probation + 1, most), most)


def choose(copy: float, step: float, overhead: float, allowed: Bounds) -> int:
    """Steps between copies.

    >>> choose(copy=0.136, step=0.5, overhead=0.01, allowed=Bounds(3, 39))
    28
    >>> choose(copy=3e-4, step=0.2, overhead=0.01, allowed=Bounds(1, 39))
    1
    """
    affordable = copy / (overhead * step) if step > 0 else math.inf
    # What is a whole number but for rounding stays one.
    return allowed.keep(math.ceil(min(affordable, allowed.most) * (1 - 1e-9)))


class Pace:
    """What is measured, on this process.

    Args:
      clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.copy_seconds = math.nan
        self._steps = deque[float](maxlen=TIMED)
        self._last: tuple[int, float] | None = None
        self._seen = 0

    @property
    def step_seconds(self) -> float:
        """The median: an evaluation between two steps does not count."""
        return statistics.median(self._steps) if self._steps else math.nan

    def tick(self, step: int) -> bool:
        """The loop hands in this step; whether it is time to choose."""
        now, last = self.clock(), self._last
        self._last = step, now
        if last is None or step <= last[0]:
            return False
        self._steps.append((now - last[1]) / (step - last[0]))
        self._seen += 1
        return self._seen % TIMED == 0
