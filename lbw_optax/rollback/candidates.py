"""States to go back to: taken now and then, on probation until proven, in memory and on disk."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lbw_optax.rollback import checkpoints, snapshots
from lbw_optax.rollback.checkpoints import OtherModel, Unreadable
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import CANDIDATE, GOOD
from lbw_optax.rollback.snapshots import Snapshot

# Proven states that are kept.
IN_MEMORY, ON_DISK = 2, 3
LONG_AGO = -(10**9)


class Health(NamedTuple):
    """What the guard said of one step."""

    step: int
    asked: int  # a `Reason`
    troubled: bool  # skipped, or the loss jumped
    suspected: bool  # the loss is above its level
    governs: bool

    @property
    def is_trouble(self) -> bool:
        return bool(self.asked) or self.troubled


class Plan(NamedTuple):
    """When copies are taken, in steps."""

    save_every: int
    snapshot_every: int | None
    probation: int


class _Saving(NamedTuple):
    """A checkpoint that is on probation, or still being written when that is over."""

    step: int
    has_nan: Any
    wait: Callable[[], None]
    over: bool = False  # the probation


class Targets:
    """Both tiers of one run."""

    def __init__(self, folder: Folder, plan: Plan):
        self.folder, self.plan = folder, plan
        self.journal = folder.read()
        self._memory: list[Snapshot] = []  # proven, oldest first
        self._trial: Snapshot | None = None
        self._saving: _Saving | None = None
        self._copied_at = self._saved_at = LONG_AGO

    @property
    def memory_bytes(self) -> int:
        held = self._memory + ([self._trial] if self._trial else [])
        return sum(snapshot.nbytes for snapshot in held)

    # --- the start of a run ---------------------------------------------------------------------

    def begin(self, tree: Any) -> None:
        """The state that a run starts from is a target; it is on disk when this returns."""
        snapshot = snapshots.take(0, tree, for_disk=True)
        self.folder.tidy(self.journal)
        try:
            checkpoints.save(self.folder.checkpoint(0), snapshot)()
            self.journal.checkpoints[0] = GOOD
            self.folder.write(self.journal)
        except Exception as error:
            raise OSError(
                f"The first checkpoint cannot be written to {self.folder.path} "
                f"({_first_line(error)}): free space there, or pass another directory."
            ) from error
        self._saved_at = 0
        if self.plan.snapshot_every is not None:
            self._memory, self._copied_at = [snapshot], 0

    def resume(self, like: Any) -> tuple[int, Any]:
        """The newest checkpoint that can be read; newer ones are gone."""
        step, tree = self._read_newest(like)
        self.journal.checkpoints = {s: c for s, c in self.journal.checkpoints.items() if s <= step}
        self.folder.write(self.journal)
        self.folder.tidy(self.journal)
        self._saved_at = step
        if self.journal.checkpoints[step] == CANDIDATE:
            self._saving = _Saving(step, False, _is_written)
        if self.plan.snapshot_every is not None:
            self._trial, self._copied_at = snapshots.take(step, tree), step
        return step, tree

    def _read_newest(self, like: Any) -> tuple[int, Any]:
        misfit, damaged = None, []
        for step in sorted(self.journal.checkpoints, reverse=True):
            path = self.folder.checkpoint(step)
            if self.journal.checkpoints[step] == CANDIDATE and not path.exists():
                continue  # a kill came before it was complete
            try:
                tree = checkpoints.load(path, like)
            except OtherModel as error:
                misfit = misfit or error
                damaged.append(f"step {step}: of another model")
            except Unreadable as error:
                damaged.append(f"step {step}: {error}")
            else:
                if damaged:
                    _warn(
                        f"Resumed from step {step} in {self.folder.path}, because newer "
                        f"checkpoints cannot be read ({'; '.join(damaged)})."
                    )
                return step, tree
        if misfit is not None:
            raise ValueError(
                f"The checkpoints in {self.folder.path} are of another model or optimizer: "
                f"{misfit}. Build the same ones, or pass another directory."
            )
        raise ValueError(
            f"No checkpoint in {self.folder.path} can be read ({'; '.join(damaged)}): "
            "restore the directory, or pass another one to start anew."
        )

    # --- every step -----------------------------------------------------------------------------

    def take(self, step: int, tree: Any) -> None:
        """Copy what is due: to memory, to disk, or once for both."""
        every = self.plan.snapshot_every
        to_memory = every is not None and self._trial is None and step - self._copied_at >= every
        free = self._saving is None or self._saving.over
        to_disk = free and step - self._saved_at >= self.plan.save_every
        if not (to_memory or to_disk):
            return
        if to_disk:
            self.settle()
        snapshot = snapshots.take(step, tree, for_disk=to_disk)
        if to_memory:
            self._trial, self._copied_at = snapshot, step
        if to_disk:
            self._save(snapshot)

    def save(self, step: int, tree: Any) -> None:
        """Write this state, after what is being written; it is complete when this returns.

        It goes on probation, unless another checkpoint is: then that one's goes on.
        """
        self.settle()
        trial = self._saving
        if step not in self.journal.checkpoints:
            self._save(snapshots.take(step, tree, for_disk=True))
            self.settle()
        self._saving = trial or self._saving
        kept = step, self._saving.step if self._saving else step
        self._drop([s for s in self._candidates() if s not in kept])

    def _save(self, snapshot: Snapshot) -> None:
        step = snapshot.step
        self.journal.checkpoints[step] = CANDIDATE
        self._saved_at = step
        try:
            self.folder.write(self.journal)
            wait = checkpoints.save(self.folder.checkpoint(step), snapshot)
        except Exception as error:
            self._lose(step, error)
        else:
            self._saving = _Saving(step, snapshot.has_nan, wait)

    def learn(self, health: Health) -> bool:
        """Drop the copies that trouble followed, promote those it did not; True if one was."""
        in_memory = self._learn_memory(health)
        return self._learn_disk(health) or in_memory

    def _learn_memory(self, health: Health) -> bool:
        trial = self._trial
        if trial is None or health.step < trial.step:
            return False
        if health.is_trouble:
            self._trial, self._copied_at = None, LONG_AGO
        if health.is_trouble or not self._is_over(trial.step, health):
            return False
        self._trial = None
        if bool(trial.has_nan):
            return False
        self._memory = [*self._memory, trial][-IN_MEMORY:]
        return True

    def _learn_disk(self, health: Health) -> bool:
        saving = self._saving
        if saving is None or saving.over or health.step < saving.step:
            return False
        if health.is_trouble:
            self.journal.checkpoints.pop(saving.step, None)
            self._saved_at = LONG_AGO
        if not self._is_over(saving.step, health):
            return False
        self._saving = saving._replace(over=True)
        proven = self._is_good(saving)
        if not proven:
            self.settle()
        return proven

    def _is_good(self, saving: _Saving) -> bool:
        """No trouble has struck it from the journal, and it has no NaN."""
        return saving.step in self.journal.checkpoints and not bool(saving.has_nan)

    def _is_over(self, step: int, health: Health) -> bool:
        return health.step >= step + self.plan.probation and not health.suspected

    def settle(self) -> None:
        """Wait for the checkpoint that is being written: if it has proven healthy, it is a target.

        One that is still on probation stays there: a run that is killed may resume from it.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.wait()
        except Exception as error:
            self._lose(saving.step, error)
            return
        if saving.step in self.journal.checkpoints and not saving.over:
            self._saving = saving._replace(wait=_is_written)
            return
        good = self._is_good(saving)
        if good:
            self.journal.checkpoints[saving.step] = GOOD
        older = [s for s in self._candidates() if s < saving.step]
        self._drop([*older, *self._on_disk()[:-ON_DISK]] if good else [saving.step])

    def _lose(self, step: int, error: Exception) -> None:
        """A checkpoint could not be written: the run goes on as long as it has a target."""
        self._drop([step])
        _warn(
            f"The checkpoint of step {step} could not be written to {self.folder.path} "
            f"({_first_line(error)}): free space there; the next try is in "
            f"{self.plan.save_every} steps."
        )

    def _drop(self, steps: list[int]) -> None:
        """Journal first: what it does not name does not exist, even if this is interrupted."""
        for step in steps:
            self.journal.checkpoints.pop(step, None)
        try:
            self.folder.write(self.journal)
            for step in steps:
                checkpoints.delete(self.folder.checkpoint(step))
        except OSError as error:
            _warn(f"The journal in {self.folder.path} could not be written ({_first_line(error)}).")

    # --- a rollback -----------------------------------------------------------------------------

    def proven(self) -> list[tuple[int, str]]:
        """Steps and tiers, newest first; memory before disk.

        A proven checkpoint that is still being written is waited for.
        """
        if self._saving is not None and self._saving.over:
            self.settle()
        in_memory = [(snapshot.step, "memory") for snapshot in self._memory]
        on_disk = [(step, "disk") for step in self._on_disk()]
        return sorted(in_memory + on_disk, key=lambda t: (t[0], t[1] == "memory"), reverse=True)

    def load(self, step: int, tier: str, like: Any) -> Any:
        """The state of a target.

        Raises:
          Unreadable: if its checkpoint is damaged.
        """
        if tier == "disk":
            return checkpoints.load(self.folder.checkpoint(step), like)
        snapshot = next(s for s in self._memory if s.step == step)
        return snapshots.restore(snapshot, like)

    def return_to(self, step: int) -> None:
        """Forget everything after this step: it belongs to a run that is not continued."""
        if self._saving is not None:  # what lies before a proven state is proven with it
            self._saving = self._saving._replace(over=self._saving.step <= step)
            self.settle()
            self._saving = None
        self._memory = [snapshot for snapshot in self._memory if snapshot.step <= step]
        self._trial = None
        self._copied_at = self._saved_at = step
        self._drop([s for s in self.journal.checkpoints if s > step])

    def _candidates(self) -> list[int]:
        return [s for s, state in self.journal.checkpoints.items() if state == CANDIDATE]

    def _on_disk(self) -> list[int]:
        return sorted(s for s, state in self.journal.checkpoints.items() if state == GOOD)


def _is_written() -> None:
    """There is nothing to wait for."""


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
