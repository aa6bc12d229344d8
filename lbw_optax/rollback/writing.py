"""A checkpoint that is being written, and whether it still is."""

import threading
import time
from collections.abc import Callable
from typing import Any


class Write:
    """A checkpoint that is being written; call it to wait, and to hear what went wrong.

    Orbax says only when it succeeds, and to ask it with a timeout ends the write in some versions:
    a thread waits, and is no reason for a program to go on.

    Args:
      wait: returns or raises when it is over.
      clock: seconds.
    """

    def __init__(self, wait: Callable[[], Any], clock: Callable[[], float] = time.monotonic):
        self._clock, self._began, self._took = clock, clock(), 0.0
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._follow, args=(wait,), daemon=True).start()

    def __call__(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def seconds(self) -> float:
        """That it took, or has taken so far."""
        return self._took if self.is_over else self._clock() - self._began

    def _follow(self, wait: Callable[[], Any]) -> None:
        try:
            wait()
        except BaseException as error:
            self._error = error
        self._took = self._clock() - self._began
        self._over.set()
