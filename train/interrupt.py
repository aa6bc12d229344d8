"""Ctrl-C between two steps, not within one: a step that has begun owns the parameters."""

import os
import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SOFT = "\nstopping after this step; Ctrl-C again stops at once\n"
HARD = "\nstopped at once; the same command goes on from the last checkpoint\n"


class Stopped(Exception):
    """A run was stopped in good order, and has said so."""


class Interrupt:
    """True once the process was asked to stop; a second Ctrl-C ends the process at once.

    The answer comes at once, too: while a step is compiled or computed, Python runs no signal
    handler, so a thread of its own answers. To end the process anywhere is safe: a checkpoint and
    the journal appear whole or not at all.

    Only in the main thread, where Python handles signals.

    Args:
      hard: what the second Ctrl-C says.

    >>> with Interrupt() as interrupted:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     bool(interrupted)
    True
    """

    def __init__(self, hard: str = HARD) -> None:
        self._asked, self._hard = False, hard

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python's own C handler writes each signal's number here, whatever the main thread does.
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=_answer, args=(read, self._hard), daemon=True)
        self._thread.start()
        for number in SIGNALS:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)
        self._thread.join()


def _answer(read: int, hard: str) -> None:
    """Answer the first signal, and obey the second Ctrl-C, until the other end is closed."""
    asked = False
    while number := os.read(read, 1):
        if number[0] not in SIGNALS:
            continue
        if asked and number[0] == signal.SIGINT:
            os.write(2, hard.encode())
            os._exit(130)
        if not asked:
            os.write(2, SOFT.encode())
        asked = True
    os.close(read)
