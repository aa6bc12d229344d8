"""States to go back to: taken now and then, on probation until proven, in memory and on disk."""

from typing import NamedTuple

from lbw_optax.rollback import checkpoints, snapshots
from lbw_optax.rollback.cadence import Cadence
from lbw_optax.rollback.disk import Disk, warn
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import Journal
from lbw_optax.rollback.memory import Memory
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.verdict import Facts, Verdict
from lbw_optax.types import PyTree


class Plan(NamedTuple):
    """When copies are taken.

    Attributes:
      save_every: to disk.
      snapshot_every: steps between copies in memory; None for none.
      probation: steps.
    """

    save_every: Cadence
    snapshot_every: int | None
    probation: int


class Candidates:
    """Both tiers of one run."""

    def __init__(self, folder: Folder, plan: Plan):
        self._memory = Memory(plan.snapshot_every, plan.probation, self._judge)
        self._disk = Disk(folder, plan.save_every, plan.probation, self._judge)
        self._told: set[str] = set()

    @property
    def journal(self) -> Journal:
        return self._disk.journal

    @property
    def memory_bytes(self) -> int:
        return self._memory.nbytes

    def found(self) -> list[int]:
        """Steps that could be resumed from."""
        return self._disk.found()

    def resume(self, tree: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint; without one, `tree` is the first state to go back to.

        Raises:
          TypeError: if a leaf cannot be kept.
        """
        checkpoints.require_writable(tree)
        if self.found():
            step, tree = self._disk.resume(tree)
            self._memory.return_to(step)
            if self._memory.is_on:
                self._memory.put(snapshots.take(step, tree))
            return step, tree
        snapshot = snapshots.take(0, tree, for_disk=True)
        self._disk.begin(snapshot)
        self._memory.put(snapshot, proven=True)
        return 0, tree

    @property
    def facts(self) -> Facts:
        """What this process alone can know."""
        return self._disk.facts

    def take(self, step: int, tree: PyTree, said: Verdict | None, *, is_calm: bool) -> None:
        """Copy what is due: to memory, to disk, or once for both."""
        to_memory = is_calm and self._memory.is_due(step)
        to_disk = self._disk.is_due(step, said, is_calm=is_calm)
        if not (to_memory or to_disk):
            return
        snapshot = snapshots.take(step, tree, for_disk=to_disk)
        if to_memory:
            self._memory.put(snapshot)
        if to_disk:
            self._disk.write(snapshot, is_calm=is_calm)

    def save(self, step: int, tree: PyTree, *, is_calm: bool) -> None:
        """Write this state, after what is being written; it is complete when this returns."""
        self._disk.settle()
        if not self._disk.has(step):
            snapshot = snapshots.take(step, tree, for_disk=True)
            self._disk.write(snapshot, is_calm=is_calm, by_hand=True)
            self._disk.settle()

    def learn(self, verdict: Verdict) -> bool:
        """What was said of the steps after the copies; True if one has proven healthy."""
        in_memory = self._memory.learn(verdict)
        return self._disk.learn(verdict) or in_memory

    def proven(self) -> list[tuple[int, str]]:
        """Steps and tiers, newest first; memory before disk.

        A proven checkpoint that is still being written is waited for.
        """
        self._disk.settle_proven()
        in_memory = [(step, "memory") for step in self._memory.steps]
        on_disk = [(step, "disk") for step in self._disk.proven]
        return sorted(in_memory + on_disk, key=lambda t: (t[0], t[1] == "memory"), reverse=True)

    def load(self, step: int, tier: str, like: PyTree) -> PyTree:
        """A state that has proven healthy.

        Raises:
          Unreadable: if its checkpoint is damaged.
        """
        return (self._disk if tier == "disk" else self._memory).load(step, like)

    def return_to(self, step: int) -> None:
        """Forget everything after this step: it belongs to a run that is not continued."""
        self._memory.return_to(step)
        self._disk.return_to(step)

    def close(self, *, alone: bool) -> None:
        """Wait for the checkpoint that is being written; `alone` asks no other process."""
        if alone:
            self._disk.abandon()
        else:
            self._disk.settle()

    def _judge(self, snapshot: Snapshot | None, verdict: Verdict) -> bool:
        """Whether no NaN speaks against a state: one in its optimizer or its parameters does.

        A NaN elsewhere, as in statistics or in a loss that was never measured, is the run's own. A
        guard that governs says itself that the parameters are broken, by asking for a rollback.
        """
        if snapshot is None or not (verdict.is_calm or (verdict.broken and not verdict.governs)):
            return True
        in_optimizer, elsewhere = snapshot.nan_leaves()
        bad = in_optimizer + (elsewhere if verdict.broken else [])
        where = ", ".join(bad[:5])
        if bad and where not in self._told:
            self._told.add(where)
            warn(
                f"The state of step {snapshot.step} is none to go back to, for a NaN in {where}: "
                "find out where it comes from. Checkpoints to resume from are still written."
            )
        return not bad
