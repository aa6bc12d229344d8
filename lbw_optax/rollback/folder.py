"""One run's folder on disk: its lock, its journal, and one folder a checkpoint.

With several processes only the first writes here; the folder is shared by all.
"""

import fcntl
from pathlib import Path
from typing import TextIO

import jax
from jax.experimental import multihost_utils

from lbw_optax.rollback import checkpoints, journal
from lbw_optax.rollback.journal import Journal


class Folder:
    """The folder, made and locked; the lock ends with the process, also by a kill."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._journal = self.path / "journal.json"
        self._is_first = jax.process_index() == 0
        self._lock = self._claim() if self._is_first else None
        _wait_for_all("claimed")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of this step is, or would be."""
        return self.path / "checkpoints" / str(step)

    def read(self) -> Journal:
        """The journal; all processes get the same, and none has written in the meantime."""
        content = journal.read(self._journal)
        _wait_for_all("read")
        return content

    def write(self, content: Journal) -> None:
        """Replace the journal."""
        if self._is_first:
            journal.write(self._journal, content)

    def tidy(self, content: Journal) -> None:
        """Remove every checkpoint that the journal does not name, and what kills have left."""
        root = self.path / "checkpoints"
        if self._is_first:
            checkpoints.clear_unfinished(root)
        _wait_for_all("cleared")
        on_disk = [int(path.name) for path in root.glob("*") if path.name.isdecimal()]
        _wait_for_all("listed")
        for step in sorted(set(on_disk) - set(content.checkpoints)):
            checkpoints.delete(self.checkpoint(step))

    def release(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self) -> TextIO:
        try:
            self.path.joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
            lock = self.path.joinpath("lock").open("a")
        except OSError as error:
            raise OSError(
                f"Checkpoints cannot be written to {self.path} ({error.strerror}): "
                "pass a directory that this user may write to."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OSError(
                f"Another process uses {self.path} for its checkpoints: wait until it has ended, "
                "or pass another directory."
            ) from error
        return lock


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lbw_optax {name}")
