"""A lock on an open file: one process has it, until it closes the file or ends, also by a kill.

A process that is forked off, as a data worker is, does not share it: it closes its copy of the file
at once, or it would keep the lock when its parent has ended.
"""

import contextlib
import os
import warnings
import weakref
from io import FileIO

_held: weakref.WeakSet[FileIO] = weakref.WeakSet()


def claim(file: FileIO) -> bool:
    """Lock a file, which must be unbuffered; False if somebody else has it.

    On Windows, and with a warning on a file system without locks, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{file.name!r} cannot be locked ({error.strerror}): make sure that no other process "
            "writes there.",
            RuntimeWarning,
            stacklevel=2,
        )
    _held.add(file)
    return True


def release(file: FileIO) -> None:
    """Unlock and close a file that this process has locked.

    Unlocked it is for all copies: one that was just forked off may not have closed its own yet.
    """
    if not file.closed:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _close_in_child() -> None:
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
