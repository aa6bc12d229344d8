"""Lines added to the end of a file, so that a full disk costs neither the run nor a line."""

import errno
import os
import warnings
from io import FileIO
from pathlib import Path

# What more room would mend.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def opened(path: Path) -> FileIO:
    """The file for reading and appending, made if there is none.

    Raises:
      OSError: if it cannot be opened.
      ValueError: if it is a pipe or a device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device: pass the path of a file.")
    return FileIO(path.absolute(), "a+")


class Appender:
    """Adds lines to a file, each call's as a whole or not at all; what finds no room waits.

    Of a disk that is full it warns once, and writes all that has waited when there is room again.
    Of a file that somebody has deleted it warns once, too, and from there on nothing is written;
    and of one that is moved, or has another one in its place, which is written on.

    Args:
      file: open for appending.
      what: it is, in the warning.
    """

    def __init__(self, file: FileIO, what: str):
        self._file, self._what = file, what
        self._waiting, self._why, self._advice = b"", "", ""
        self._is_deleted = self._is_moved = False

    def add(self, text: str) -> None:
        """Write this after what waits."""
        self._look_for_it()
        if self._is_deleted:
            return
        is_first = not self._waiting
        self._waiting += text.encode()
        try:
            append(self._file, self._waiting)
        except OSError as error:
            self._why = str(error.strerror)
            self._advice = "free space there" if error.errno in _FULL else "see to it"
            if is_first:
                self._warn("training goes on, and the next call that can writes what is missing")
        else:
            self._waiting = b""

    def close(self) -> None:
        """Write what waits, or say what is lost; then the caller closes the file."""
        if self._waiting:
            self.add("")
        lost, self._waiting = self._waiting.count(b"\n"), b""
        if lost:
            self._warn(f"its last lines are lost, {lost} of them")

    def _look_for_it(self) -> None:
        """Tell of a file that is deleted, or no longer where it was, once."""
        here = os.fstat(self._file.fileno())
        if self._is_deleted or _is_at(here, self._file.name):
            return
        if here.st_nlink == 0:
            self._is_deleted, self._waiting = True, b""
            self._tell(
                "deleted, and what comes is not written: training goes on; to have the rest, close "
                "this one and open another"
            )
        elif not self._is_moved:
            self._is_moved = True
            self._tell(
                "moved, and its lines go on there: to rotate a log, copy it and truncate it in "
                "its place"
            )

    def _tell(self, what: str) -> None:
        warnings.warn(
            f"The {self._what} {self._file.name} has been {what}.", RuntimeWarning, stacklevel=5
        )

    def _warn(self, so: str) -> None:
        where = f"The {self._what} {self._file.name} cannot be written ({self._why})"
        warnings.warn(f"{where}: {self._advice}; {so}.", RuntimeWarning, stacklevel=4)


def _is_at(file: os.stat_result, path: str) -> bool:
    try:
        return os.path.samestat(file, os.stat(path))
    except OSError:  # as where nothing is
        return False


def append(file: FileIO, content: bytes) -> None:
    """All of it, or nothing: what a full disk has cut short is taken back.

    Raises:
      OSError: if there is no room.
    """
    size, rest = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        file.truncate(size)
        raise
