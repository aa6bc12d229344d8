"""How fast a run is: tokens a second, and the share of what the device can do."""

import collections
import time
from collections.abc import Callable


class Speed:
    """Over the last steps, without the first one, which compiles.

    Args:
      tokens: of a step.
      flops: of a step.
      peak: FLOP/s of all devices together.
      window: steps to look back.
      clock: seconds, of any origin.

    Example:
      >>> clock = iter([0.0, 60.0, 60.5, 61.0])
      >>> speed = Speed(tokens=512, flops=2e9, peak=1e10, clock=lambda: next(clock))
      >>> for _ in range(4):
      ...     measured = speed.step()
      >>> measured
      {'tokens_per_second': 1024.0, 'mfu': 0.4}
    """

    def __init__(
        self,
        *,
        tokens: int,
        flops: float,
        peak: float,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens, self._share, self._clock = tokens, flops / peak, clock
        self._ends: collections.deque[float] = collections.deque(maxlen=window)
        self._steps = 0

    def step(self) -> dict[str, float]:
        """Count one step; empty until two have ended after the first."""
        self._steps += 1
        now = self._clock()
        if self._steps > 1:
            self._ends.append(now)
        if len(self._ends) < 2:
            return {}
        rate = (len(self._ends) - 1) / (now - self._ends[0])
        return {"tokens_per_second": rate * self._tokens, "mfu": rate * self._share}

    def pause(self) -> None:
        """Forget the steps so far: something else, an evaluation, has taken time."""
        self._ends.clear()
