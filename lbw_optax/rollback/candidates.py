"""States to go back to: taken now and then, on probation until proven, in memory and on disk."""

import math
from typing import Literal, NamedTuple

import jax

from lbw_optax.rollback import checkpoints, places, snapshots
from lbw_optax.rollback import pace as pace_of
from lbw_optax.rollback.agreement import first_text
from lbw_optax.rollback.cadence import Cadence
from lbw_optax.rollback.checkpointers import Checkpointer
from lbw_optax.rollback.disk import Disk, warn
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import Journal
from lbw_optax.rollback.memory import KEPT, KEPT_SMALL, Memory, on_trial
from lbw_optax.rollback.pace import Bounds, Pace
from lbw_optax.rollback.places import Place
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.theirs import Theirs
from lbw_optax.rollback.tiers import Tiers
from lbw_optax.rollback.verdict import Facts, Verdict
from lbw_optax.types import PyTree

MEASURED: Literal["measured"] = "measured"
"""A cadence of copies that is chosen from what they cost."""


class Plan(NamedTuple):
    """When copies are taken.

    Attributes:
      save_every: to disk.
      snapshot_every: steps between copies in memory; None for none.
      probation: steps.
      max_distance: steps that are gone back at most.
      overhead: share of the time that copies in memory may take, if their cadence is measured.
    """

    save_every: Cadence
    snapshot_every: int | Literal["measured"] | None
    probation: int
    max_distance: int
    overhead: float


class Candidates:
    """Both tiers of one run; that on disk may be a checkpointer of somebody else's."""

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        checkpointer: Checkpointer | None = None,
        pace: Pace | None = None,
    ):
        every, self._plan = plan.snapshot_every, plan
        first = pace_of.FIRST if every == MEASURED else every
        self._memory = Memory(first, plan.probation, self._judge)
        self._disk: Disk | Theirs = (
            Disk(folder, plan.save_every, plan.probation, self._judge)
            if checkpointer is None
            else Theirs(folder, checkpointer, plan.probation)
        )
        self._pace = pace or Pace()
        self._place: Place | None = None  # until there is a state
        self._bounds: Bounds | None = None
        self._wish = 0  # the cadence in memory that this process would choose, 0 for none yet
        self._told: set[str] = set()

    @property
    def journal(self) -> Journal:
        return self._disk.journal

    @property
    def memory_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def where(self) -> str:
        """The checkpoints are."""
        return self._disk.where

    @property
    def _own(self) -> Disk:
        if isinstance(self._disk, Disk):
            return self._disk
        raise ValueError(
            "This RollbackManager was given a checkpointer, and writes no checkpoints of its own: "
            "save with that one."
        )

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
            self._prepare(tree)
            if self._memory.is_on:
                self._memory.put(self._copy(step, tree))
            return step, tree
        snapshot = self._disk.begin(tree)
        self._prepare(tree, held=int(snapshot is not None))
        if self._memory.is_on:
            self._memory.put(self._copy(0, tree, snapshot), proven=True)
        return 0, tree

    def _prepare(self, tree: PyTree, held: int = 0) -> None:
        """Before the first step: choose the place of the copies, allocate it, and time a copy.

        Args:
          tree: the state.
          held: copies in host memory that there are.
        """
        if self._place is not None or not self._memory.is_on:
            return
        plan, device = self._plan, _device(tree)
        copies = KEPT_SMALL + on_trial(1, plan.probation)  # at most
        nbytes = copies * snapshots.nbytes(tree) // jax.local_device_count()
        found = (device.platform, places.kinds(device), nbytes)
        is_small = places.choose(*found, places.free_bytes(device)).is_small
        # On all processes, or on none: they run the same programs.
        is_small = not first_text("" if is_small else "large")
        self._place = places.choose(*found, 10**30 if is_small else None)
        self._memory.kept = KEPT_SMALL if is_small else KEPT
        if self._place.name == places.PINNED:
            on_host = 1 + KEPT + on_trial(self._memory.every or 1, plan.probation)
            snapshots.reserve(tree, on_host - held)
        if plan.snapshot_every == MEASURED:
            self._bounds = pace_of.bounds(plan.max_distance, plan.probation, is_small=is_small)
            self._memory.every = self._bounds.keep(pace_of.FIRST)
            self._pace.copy_seconds = self._time_copy(tree)

    def _time_copy(self, tree: PyTree) -> float:
        """Of the second one: the first is compiled."""
        jax.block_until_ready(tree)
        for _ in range(2):
            began = self._pace.clock()
            taken = self._copy(0, tree)
            jax.block_until_ready((taken.leaves, taken.has_nan))
            seconds = self._pace.clock() - began
            del taken
        return seconds

    def _copy(self, step: int, tree: PyTree, on_host: Snapshot | None = None) -> Snapshot:
        """A copy in memory, which may be the one that is taken for the disk."""
        on_device = self._place is not None and self._place.name == "device"
        if on_host is not None and not on_device:
            return on_host
        return snapshots.take(step, tree, on_device=on_device)

    def facts(self, step: int) -> Facts:
        """What this process alone can know, as the loop hands in this step."""
        if isinstance(self._disk, Theirs):
            self._disk.at(step)
        if self._pace.tick(step) and self._bounds is not None:
            self._wish = pace_of.choose(
                self._pace.copy_seconds, self._pace.step_seconds, self._plan.overhead, self._bounds
            )
        return self._disk.facts._replace(copy_every=self._wish)

    def take(self, step: int, tree: PyTree, said: Verdict | None, *, is_calm: bool) -> None:
        """Copy what is due: to memory, to disk, or once for both."""
        if said is not None and said.facts.copy_every and self._bounds is not None:
            self._memory.every = said.facts.copy_every  # the process with the slowest copies
        to_memory = is_calm and self._memory.is_due(step)
        disk = self._disk if isinstance(self._disk, Disk) else None  # theirs is written by others
        to_disk = disk is not None and disk.is_due(step, said, is_calm=is_calm)
        snapshot = snapshots.take(step, tree, for_disk=True) if to_disk else None
        if to_memory:
            self._prepare(tree)
            self._memory.put(self._copy(step, tree, snapshot))
        if disk is not None and snapshot is not None:
            disk.write(snapshot, is_calm=is_calm)

    @property
    def tiers(self) -> Tiers:
        """What was chosen and measured."""
        every, pace, place = self._memory.every, self._pace, self._place
        name = "off" if every is None else place.name if place else "host"
        held, on_device = self._memory.nbytes, name == "device"
        step = pace.step_seconds
        return Tiers(
            place=name,
            snapshot_every=every,
            step_seconds=step,
            copy_seconds=pace.copy_seconds,
            overhead=pace.copy_seconds / (every * step) if every and step else math.nan,
            save_every=self._disk.cadence,
            write_seconds=self._disk.write_seconds,
            left_out=self._disk.left_out,
            device_bytes=held if on_device else 0,
            host_bytes=0 if on_device else held,
            disk_bytes=self._disk.nbytes,
        )

    def save(self, step: int, tree: PyTree, *, is_calm: bool) -> None:
        """Write this state, after what is being written; it is complete when this returns."""
        disk = self._own
        disk.settle()
        if disk.has(step):
            disk.compare(step, tree)
            return
        snapshot = snapshots.take(step, tree, for_disk=True)
        disk.write(snapshot, is_calm=is_calm, by_hand=True)
        disk.settle()

    def is_whole(self, step: int) -> bool:
        """Whether a checkpoint of this step lies on disk, and nothing is being written."""
        return self._own.is_whole(step)

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
        self._disk.close(alone=alone)

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


def _device(tree: PyTree) -> jax.Device:
    """One of this process's, that a part of the state lies on."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return arrays[0].addressable_shards[0].device if arrays else jax.local_devices()[0]
