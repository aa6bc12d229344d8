"""Checkpoints on disk: those that have proven healthy, and the newest, to resume from.

At its cadence a checkpoint is written whatever the guard thinks: a run that is killed goes on from
there. It is on trial if nothing spoke against it when it was taken, and only one that proves
healthy is gone back to. The loop never waits for the disk: one that is due while the last is still
being written is left out, and the user is told.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lbw_optax.rollback import checkpoints, snapshots
from lbw_optax.rollback.agreement import first_text
from lbw_optax.rollback.cadence import Cadence, Now
from lbw_optax.rollback.checkpoints import OtherModel, Unreadable
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import CANDIDATE, GOOD
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.verdict import Facts, Verdict
from lbw_optax.rollback.writing import Write
from lbw_optax.types import PyTree

# Proven checkpoints that are kept.
KEPT = 3

Judge = Callable[[Snapshot | None, Verdict], bool]


class _Copy(NamedTuple):
    """The newest checkpoint, which may still be being written."""

    step: int
    write: Write | None  # None if it is written


class _Trial(NamedTuple):
    """A checkpoint that may prove healthy."""

    step: int
    snapshot: Snapshot | None  # without its leaves; None if it was read
    is_over: bool = False  # it has, and its write is still to be waited for


class Disk:
    """The tier on disk.

    Args:
      folder: where.
      cadence: of checkpoints.
      probation: steps without trouble that prove one healthy.
      judge: whether a state may be gone back to, for all that it holds.
      clock: seconds.
    """

    def __init__(
        self,
        folder: Folder,
        cadence: Cadence,
        probation: int,
        judge: Judge,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._cadence, self._probation = folder, cadence, probation
        self.where = str(folder.path)
        self._judge, self._clock = judge, clock
        self.journal = folder.read()
        self._newest: _Copy | None = None
        self._trial: _Trial | None = None
        self._since_step: int | None = None  # the cadence counts from here, None before the first
        self._since_time = clock()
        self._is_owed = False  # one was due, and it was not known whether the last is written
        self._wants_trial = False  # one that may prove healthy, as soon as nothing is wrong
        self._may_retry = True  # at once, after a trial that failed
        self._sums: tuple[int, Any] | None = None  # of the newest that was written or read: a step
        self.left_out = 0
        self.write_seconds = float("nan")
        self._copy_bytes = 0

    @property
    def cadence(self) -> str:
        """In words."""
        return str(self._cadence)

    @property
    def nbytes(self) -> int:
        """Of this process's part of all checkpoints; 0 until one is written."""
        return self._copy_bytes * len(self.journal.checkpoints)

    # --- the start of a run ---------------------------------------------------------------------

    def found(self) -> list[int]:
        """Steps that could be resumed from."""
        return sorted(self.journal.checkpoints) or self._folder.found()

    def begin(self, tree: PyTree) -> Snapshot | None:
        """The state that a run starts from may be gone back to; it is written on return."""
        snapshot = snapshots.take(0, tree, for_disk=True)
        step, self._copy_bytes = snapshot.step, snapshot.nbytes
        try:
            self._folder.tidy(self.journal)
            error = _try(checkpoints.save(self._folder.checkpoint(step), snapshot))
            if error:
                raise OSError(error)
            self.journal.checkpoints[step] = GOOD
            self._folder.write(self.journal)
        except OSError as error:
            raise OSError(
                f"The first checkpoint cannot be written to {self._folder.path} "
                f"({first_line(error)}): free space there, let this user write to it, or pass "
                "another directory."
            ) from error
        self._count_from(step)
        self._cadence.saved(step)
        self._sums = step, snapshot.sums
        return snapshot

    def resume(self, like: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint that can be read; newer ones of this run are gone."""
        self.settle()
        has_journal = bool(self.journal.checkpoints)
        step, tree = self._read_newest(like)
        if step not in self.journal.checkpoints:
            self.journal.checkpoints = {step: CANDIDATE}
            what = "a journal that names none that can be read" if has_journal else "no journal"
            warn(
                f"{self._folder.path} has {what}: the run goes on from the checkpoint of step "
                f"{step} that lies there. It takes the batches from {self.journal.data_step(step)} "
                "on: whether an earlier rollback has left some out is not known."
            )
        elif unknown := [x for x in self._unnamed() if x > step and self._is_checkpoint(x)]:
            warn(
                f"{self._folder.path} also holds checkpoints of later steps that its journal does "
                f"not name ({', '.join(map(str, unknown))}), which are passed over: if the journal "
                "is an older one, as out of a backup, take journal.json and journal.before.json "
                "away before the run begins, and the newest of them is taken."
            )
        self.journal.drop([s for s in self.journal.checkpoints if s > step])
        try:
            self._folder.write(self.journal)
            self._folder.tidy(self.journal)
        except OSError as error:
            raise OSError(
                f"The journal cannot be written to {self._folder.path} ({first_line(error)}): free "
                "space there, or let this user write to it."
            ) from error
        self._newest = _Copy(step, None)
        self._count_from(step)
        self._cadence.saved(step)
        self._wants_trial, self._copy_bytes = False, snapshots.nbytes(tree)
        self._sums = step, snapshots.checksums(snapshots.flatten(tree))
        is_candidate = self.journal.checkpoints[step] == CANDIDATE
        self._trial = _Trial(step, None) if is_candidate else None
        return step, tree

    def _read_newest(self, like: PyTree) -> tuple[int, PyTree]:
        misfit, damaged, own = "", [], self.journal.checkpoints
        for step in self._readable():
            if misfit and own and step not in own:
                break  # the run's own are of another model: those of nobody do not count
            is_candidate = self.journal.checkpoints.get(step) == CANDIDATE
            if is_candidate and not self._folder.checkpoint(step).exists():
                if step not in self._folder.unfinished():  # or a kill came before it was complete
                    damaged.append(f"step {step}: its folder is gone")
                continue
            try:
                tree = self.load(step, like)
            except OtherModel as error:
                misfit = misfit or str(error)
                damaged.append(f"step {step}: of another model")
            except Unreadable as error:
                damaged.append(f"step {step}: {error}")
            else:
                if damaged and (step in own or not own):
                    warn(
                        f"Resumed from step {step} in {self._folder.path}, because newer "
                        f"checkpoints cannot be read ({'; '.join(damaged)})."
                    )
                return step, tree
        if misfit:
            raise ValueError(
                f"The checkpoints in {self._folder.path} are of another model or optimizer: "
                f"{misfit}. Build the same ones, with the version of lbw_optax that wrote them if "
                "parts of the guard are absent, or pass another directory."
            )
        raise ValueError(
            f"No checkpoint in {self._folder.path} can be read ({'; '.join(damaged)}): "
            "restore the directory, or pass another one to start anew."
        )

    def _readable(self) -> Iterator[int]:
        """Steps to go on from: the run's own, newest first, and then what else lies there.

        Where the journal is an older one, as out of a backup, its checkpoints may be gone.
        """
        own = self.journal.checkpoints
        yield from sorted(own, reverse=True)
        yield from reversed(self._unnamed())

    def _unnamed(self) -> list[int]:
        """Steps of folders that lie there and that the journal has never named."""
        return sorted({*self._folder.found()} - {*self.journal.checkpoints, *self.journal.dropped})

    def _is_checkpoint(self, step: int) -> bool:
        return checkpoints.is_one(self._folder.checkpoint(step))

    def load(self, step: int, like: PyTree) -> PyTree:
        """The state of a checkpoint.

        Raises:
          OtherModel: if it is none of this model's.
          Unreadable: if it is damaged, for any process.
        """
        tree, problem = None, None
        try:
            tree = checkpoints.load(self._folder.checkpoint(step), step, like)
        except (OtherModel, Unreadable) as error:
            problem = error
        said = first_text(str(problem) if problem else "")
        if said:
            raise problem or Unreadable(said)
        return tree

    # --- every step -----------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """What this process alone can know."""
        is_up = self._cadence.time_is_up(self._clock() - self._since_time)
        return Facts(is_up, self._write is not None and not self._write.is_over)

    def is_due(self, step: int, said: Verdict | None, *, is_calm: bool) -> bool:
        """Whether to write this step: at the cadence, or to try once more, and never over the last.

        Args:
          step: that could be written.
          said: the verdict on the step before, None if there is none.
          is_calm: whether nothing speaks against the state.
        """
        is_writing = self._is_writing(said)
        since = step if self._since_step is None else step - self._since_step
        time_is_up = said is not None and said.facts.time_is_up
        due = self._cadence.is_due(Now(step, since, time_is_up, is_writing is not False))
        due = due or self._is_owed or self._since_step is None
        again = is_calm and self._trial is None and self._wants_trial and since > 0
        if is_writing is False:
            return due or again
        self._is_owed = due and is_writing is None
        if due and is_writing:
            self._leave_out(step)
        return False

    def _is_writing(self, said: Verdict | None) -> bool | None:
        """Whether the newest is still being written, on any process; None where it is not known.

        What was heard before it was begun says nothing of it.
        """
        if self._write is None or self._newest is None:
            return False
        if said is None or said.step <= self._newest.step:
            return None
        if not said.facts.is_writing:
            self.settle()
        return said.facts.is_writing

    def _leave_out(self, step: int) -> None:
        self._count_from(step)
        self.left_out += 1
        if self.left_out == 1 and self._newest is not None and self._write is not None:
            warn(
                f"The checkpoint of step {self._newest.step} is still being written to "
                f"{self._folder.path} after {self._write.seconds:.3g} s, so that of step {step} is "
                "left out, as others will be, without a word: the run does not wait for the disk. "
                f"Its cadence is {self._cadence}; a run that is killed loses more than that. Save "
                "less often (save_every), or to a faster disk."
            )

    def _count_from(self, step: int) -> None:
        self._since_step, self._since_time, self._is_owed = step, self._clock(), False

    @property
    def _write(self) -> Write | None:
        """Of the newest, while nobody has waited for it."""
        return self._newest.write if self._newest is not None else None

    def write(self, snapshot: Snapshot, *, is_calm: bool, by_hand: bool = False) -> None:
        """Begin to write, when the write before has ended."""
        self.settle()
        step, self._copy_bytes = snapshot.step, snapshot.nbytes
        if is_calm and self._trial is None:
            self._trial = _Trial(step, snapshot._replace(leaves={}))
            self._wants_trial = False
        elif not by_hand:
            self._wants_trial = True
        self._count_from(step)
        try:
            if step not in (*self.journal.checkpoints, *self.journal.dropped):
                self._folder.make_room(step)
            self.journal.checkpoints[step] = CANDIDATE
            self.journal.dropped = [s for s in self.journal.dropped if s != step]
            self._folder.write(self.journal)
            self._folder.require_room(snapshot.nbytes)
            write = Write(checkpoints.save(self._folder.checkpoint(step), snapshot))
        except Exception as error:
            self._lose(step, first_line(error))
        else:
            self._newest = _Copy(step, write)
            self._sums = step, snapshot.sums
            self._cadence.saved(step)

    def has(self, step: int) -> bool:
        """Whether this step is written, or being written."""
        return step in self.journal.checkpoints

    def is_whole(self, step: int) -> bool:
        """Whether this step is written, and nothing is waited for."""
        return self.has(step) and self._write is None

    def compare(self, step: int, tree: PyTree) -> None:
        """A state that is handed in for a step that is written, and is another one, is not saved.

        With several processes nothing is compared: one of them may have come alone.
        """
        if jax.process_count() > 1 or self._sums is None or self._sums[0] != step:
            return
        if not np.array_equal(snapshots.checksums(snapshots.flatten(tree)), self._sums[1]):
            warn(
                f"The checkpoint of step {step} in {self._folder.path} is of another state than "
                "the one that save was given, which is not saved: save it at a later step."
            )

    def close(self, *, alone: bool) -> None:
        """Wait for what is being written; `alone` asks no other process.

        The calls of `step` since the journal was written are counted in the next process too.
        """
        if alone:
            self._abandon()
        else:
            self.settle()
        try:
            self._folder.write_calls(self.journal)
        except OSError as error:
            self._warn_of_journal(error)

    def learn(self, verdict: Verdict) -> bool:
        """What was said of the steps after a checkpoint; True if it has proven healthy."""
        trial, newest = self._trial, self._newest
        if trial is None or trial.is_over or verdict.step < trial.step:
            return False
        if verdict.is_trouble:
            self._judge(trial.snapshot, verdict)
            self._trial = None
            self._wants_trial = self._wants_trial or self._may_retry
            self._may_retry = False
            return False
        if not verdict.proves(trial.step, self._probation):
            return False
        if not self._judge(trial.snapshot, verdict):
            self._trial = None
            return False
        self._trial, self._may_retry = trial._replace(is_over=True), True
        if newest is None or newest.write is None or newest.step != trial.step:
            self._settled()
        return True

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. What it replaces is deleted."""
        newest = self._newest
        if newest is None or newest.write is None:
            return
        self._newest = newest._replace(write=None)
        error = _try(newest.write)
        self.write_seconds = newest.write.seconds
        if error:
            self._lose(newest.step, error)
        else:
            self._settled()

    def _abandon(self) -> None:
        """Wait for the checkpoint that is being written, without the other processes."""
        if self._newest is not None and self._newest.write is not None:
            try:
                self._newest.write()
            except Exception as error:
                warn(f"The checkpoint of step {self._newest.step} failed ({first_line(error)}).")

    def _settled(self) -> None:
        """The newest is whole: what is not needed any more is deleted."""
        trial, newest = self._trial, self._newest
        if trial is not None and trial.is_over:
            self.journal.checkpoints[trial.step] = GOOD
            self._trial = trial = None
        kept = {copy.step for copy in (trial, newest) if copy is not None}
        unproven = [s for s, state in self.journal.checkpoints.items() if state == CANDIDATE]
        self._drop([*[s for s in unproven if s not in kept], *self.proven[:-KEPT]])

    def _lose(self, step: int, why: str) -> None:
        """A checkpoint could not be written: the run goes on with those that it has."""
        self._newest = None
        if self._trial is not None and self._trial.step == step:
            self._trial = None
        if step in self.journal.checkpoints:
            self._drop([step])
        newest = max(self.journal.checkpoints, default=None)
        where = "the beginning" if newest is None else f"step {newest}"
        warn(
            f"The checkpoint of step {step} could not be written to {self._folder.path} "
            f"({why}): free space there, or let this user write to it; the next try is after "
            f"{self._cadence}. A run that stops now goes on from {where}."
        )

    def _drop(self, steps: list[int]) -> None:
        """Journal first: what it drops does not exist, even if this is interrupted."""
        self.journal.drop(steps)
        try:
            self._folder.write(self.journal)
        except OSError as error:
            self._warn_of_journal(error)
            return
        try:
            self._folder.delete(self.journal.dropped)
            self.journal.dropped = []
        except OSError as error:
            warn(
                f"Checkpoints in {self._folder.path} that nobody needs cannot be deleted "
                f"({first_line(error)}): let this user delete them, or they fill the disk."
            )

    def _warn_of_journal(self, error: OSError) -> None:
        warn(f"The journal in {self._folder.path} could not be written ({first_line(error)}).")

    # --- a rollback -----------------------------------------------------------------------------

    @property
    def proven(self) -> list[int]:
        """Steps of the checkpoints that have proven healthy, oldest first."""
        return sorted(s for s, state in self.journal.checkpoints.items() if state == GOOD)

    def settle_proven(self) -> None:
        """Wait for a checkpoint that has proven healthy while it was being written."""
        if self._trial is not None and self._trial.is_over:
            self.settle()

    def return_to(self, step: int) -> None:
        """Forget everything after this step: it belongs to a run that is not continued."""
        if self._trial is not None:  # what lies before a proven state is proven with it
            over = self._trial._replace(is_over=True)
            self._trial = over if over.step <= step else None
        self.settle()
        if self._trial is not None:
            self._settled()
        self._newest = self._trial = self._sums = None
        self._drop([s for s in self.journal.checkpoints if s > step])
        self._count_from(max(self.journal.checkpoints, default=step))
        self._wants_trial = False


def _try(wait: Callable[[], Any]) -> str:
    """What went wrong on any process, or ""."""
    error = ""
    try:
        wait()
    except Exception as problem:
        error = first_line(problem)
    return first_text(error)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    said = str(error).strip().partition("\n")[0]
    return (said if len(said) <= 200 else f"{said[:199]}…") or type(error).__name__


def warn(message: str) -> None:
    """Say it to the user."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
