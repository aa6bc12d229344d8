"""One run's folder on disk: its lock, its journal, and one folder a checkpoint.

With several processes only the first writes here; the folder is shared by all, and what goes wrong
on the first is an error on all of them.
"""

import contextlib
import itertools
import shutil
import uuid
import warnings
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import jax

from lbw_optax import lock
from lbw_optax.rollback import checkpoints, journal
from lbw_optax.rollback.agreement import first_text, wait_for_all
from lbw_optax.rollback.journal import Journal

# Bytes that are written to see whether it can be done.
PROBE = 4096
# What cannot be written, where it cannot, and what to do.
UNWRITABLE = "Checkpoints", "pass a directory that this user may write to"


class Folder:
    """The folder, made and locked; the lock ends with the process, also by a kill."""

    def __init__(self, path: Path, *, unwritable: tuple[str, str] = UNWRITABLE):
        self.path = path.absolute()
        self._unwritable = unwritable
        self._journal = self.path / "journal.json"
        self._is_first = jax.process_index() == 0
        self._lock: FileIO | None = None
        self._mark = b""  # in the lock's file, by which it is known
        self._calls = 0  # of `step`, when the journal was read, or written by `write_calls`
        try:
            self._on_first(self._claim)
        except OSError:
            self.release()
            raise

    @property
    def is_open(self) -> bool:
        """Whether this process may write here: not after `release`, and not in a fork."""
        return not (self._is_first and (self._lock is None or self._lock.closed))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of this step is, or would be."""
        return self.path / "checkpoints" / str(step)

    def read(self) -> Journal:
        """The journal; all processes get the same, and none has written in the meantime."""
        content, error = Journal(), ""
        try:
            content = journal.read(self._journal)
        except ValueError as damage:
            error = str(damage)
        error = first_text(error)
        if error:
            raise ValueError(error)
        self._calls = content.calls
        return content

    def write(self, content: Journal) -> None:
        """Replace the journal.

        Raises:
          OSError: on all processes, if the first cannot.
        """
        self._on_first(lambda: journal.write(self._journal, content))

    def write_calls(self, content: Journal) -> None:
        """As `write`, at the end of a run, so that the calls of `step` are counted on.

        No other process is waited for, or told. Nothing is written if there were none.

        Raises:
          OSError: on the first, if it cannot.
        """
        if content.calls == self._calls:
            return
        self._calls = content.calls
        if self._is_first:
            journal.write(self._journal, content)

    def found(self) -> list[int]:
        """Steps of which a checkpoint lies here, whoever wrote it."""
        names = [path.name for path in (self.path / "checkpoints").glob("*")]
        wait_for_all("listed")
        return sorted(int(x) for x in names if x.isascii() and x.isdecimal() and str(int(x)) == x)

    def unfinished(self) -> set[int]:
        """Steps of checkpoints that a kill has left unfinished."""
        return {step for step, _ in checkpoints.unfinished(self.path / "checkpoints")}

    def make_room(self, step: int) -> None:
        """What lies where this checkpoint is to be, and is none of ours, gets another name."""

        def rename() -> None:
            path = self.checkpoint(step)
            if not path.exists():
                return
            names = (path.with_name(f"{step}.kept{i}") for i in itertools.count())
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            warnings.warn(
                f"{path} is no checkpoint of this run: it is kept as {kept.name}.",
                RuntimeWarning,
                stacklevel=2,
            )

        self._on_first(rename)

    def require_room(self, nbytes: int) -> None:
        """Every process must be able to write: one that fails later keeps the others waiting.

        Args:
          nbytes: that this process is about to write.

        Raises:
          OSError: on all processes, if one has no room, or may not write.
        """
        if jax.process_count() == 1:
            return  # what goes wrong is said by the write itself
        error, probe = "", self.path / f"probe-{jax.process_index()}"
        try:
            if shutil.disk_usage(self.path).free < nbytes:
                raise OSError(f"No room for {nbytes} bytes")
            probe.write_bytes(bytes(PROBE))
            probe.unlink()
        except OSError as problem:
            probe.unlink(missing_ok=True)
            error = str(problem)
        error = first_text(error)
        if error:
            raise OSError(error)

    def delete(self, steps: list[int]) -> None:
        """Remove checkpoints of ours.

        Raises:
          OSError: on all processes, if the first cannot, after it has removed the others.
        """

        def each() -> None:
            problem: OSError | None = None
            for step in steps:
                try:
                    checkpoints.delete(self.checkpoint(step))
                except OSError as error:
                    problem = problem or error
            if problem is not None:
                raise problem

        self._on_first(each)

    def tidy(self, content: Journal) -> None:
        """Remove what a kill kept from being removed, and what it has left unfinished."""
        if self._is_first:
            checkpoints.clear_unfinished(self.path / "checkpoints")
        wait_for_all("cleared")
        self.delete(content.dropped)

    def release(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            lock.release(self._lock)

    def _claim(self) -> None:
        self._lock = self._claimed()
        mark, wrote = uuid.uuid4().bytes, 0
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            wrote = self._lock.write(mark)
        self._mark = mark if wrote == len(mark) else b""  # there may be no room for it

    def _hold(self) -> None:
        """Claim anew what somebody has deleted or moved: a second run could write here unseen."""
        if self._lock is None or self._lock.closed or not self._mark:
            return
        try:
            found = (self.path / "lock").read_bytes()
        except FileNotFoundError:
            found = b""
        except OSError:
            return  # what cannot be read tells nothing
        if found == self._mark:
            return
        held = self._lock
        self._claim()
        lock.release(held)
        warnings.warn(
            f"The lock of {self.path} has been deleted or moved, or the whole directory: it is "
            "made again, and checkpoints are written there from now on.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _claimed(self) -> FileIO:
        """The lock's file.

        Raises:
          OSError: if it cannot be written, or another process has it.
        """
        try:
            if not self.path.exists():
                self.path.mkdir(parents=True, exist_ok=True)
            file = FileIO(self.path / "lock", "a")
        except OSError as error:
            what, advice = self._unwritable
            raise OSError(
                f"{what} cannot be written to {self.path} ({error.strerror}): {advice}."
            ) from error
        if not lock.claim(file):
            file.close()
            raise OSError(
                f"Another process uses {self.path} for its checkpoints: wait until it has ended, "
                "or pass another directory."
            )
        return file

    def _on_first(self, act: Callable[[], None]) -> None:
        """Act on the first process; its error is everybody's, before anybody waits for it."""
        problem: OSError | None = None
        if self._is_first:
            try:
                self._hold()
                act()
            except OSError as error:
                problem = error
        said = first_text((str(problem) or type(problem).__name__) if problem else "")
        if said:
            raise problem or OSError(said)
