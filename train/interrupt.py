"""Ctrl-C between two steps, not within one: a step that has begun owns the parameters."""

import signal
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """True once the process was asked to stop; a second Ctrl-C stops at once.

    Only in the main thread, where Python handles signals.

    >>> with Interrupt() as interrupted:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     bool(interrupted)
    True
    """

    def __init__(self) -> None:
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
