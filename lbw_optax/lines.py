"""A file of lines that grows, read on from where the last look ended."""

import os
from io import FileIO
from pathlib import Path
from typing import BinaryIO

# Bytes before the place that is read from, by which a file is known again.
KNOWN = 4096


class Lines:
    """The whole lines of a file, each once, and a torn one when it is whole.

    A file that has become shorter, or that another has taken the place of, is read from its start.

    Args:
      path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read = 0
        self._before = b""  # the last that was read
        self._looked_at: tuple[int, ...] = ()
        self.restarts = 0
        """How often it was read from its start again."""

    def new(self) -> list[bytes]:
        """Those since the last call; it costs a look at the file's size while there are none.

        Raises:
          OSError: if there is a file that cannot be read.
        """
        try:
            now = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        looked_at = (now.st_size, now.st_mtime_ns, now.st_ino)
        if looked_at == self._looked_at:
            return []
        with self.path.open("rb") as file:
            file.seek(self._read - len(self._before))
            if file.read(len(self._before)) != self._before:
                self._read, self._before = 0, b""
                self.restarts += 1
                file.seek(0)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        self._before = (self._before + whole)[-KNOWN:]
        self._looked_at = looked_at
        return whole.splitlines()


def is_torn(file: BinaryIO | FileIO) -> bool:
    """Whether the last line of a file that can be read has no end: what a kill or a full disk left.

    What is appended to it then begins with an end, and stays a line of its own.
    """
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
