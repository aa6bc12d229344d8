"""Keys of a terminal, one at a time and without waiting for Enter."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def unbuffered() -> Iterator[None]:
    """Keys arrive as they are pressed and are not shown; undone at the end, whatever comes."""
    try:
        import termios
        import tty
    except ImportError:  # no such terminals on this system
        yield
        return
    here = sys.stdin.fileno()
    before = termios.tcgetattr(here)
    tty.setcbreak(here)
    try:
        yield
    finally:
        termios.tcsetattr(here, termios.TCSADRAIN, before)


def pressed(seconds: float) -> str:
    """The next key within so many seconds; "" if there was none, or no more can come."""
    # Past the buffer of `sys.stdin`, in which a second key would wait unseen.
    here = sys.stdin.fileno()
    ready, _, _ = select.select([here], [], [], seconds)
    return os.read(here, 1).decode(errors="ignore") if ready else ""
