"""The tier on disk where a team keeps a checkpoint manager of its own.

Its manager writes and deletes as it likes. What is known here of each checkpoint is whether it has
proven healthy, in a journal beside them. After a rollback the newer ones of this run are deleted,
by their manager: Orbax saves nothing below its newest step, and a run that is killed would go on
from what was left. What lay there before, and is none of this run's, is never deleted.
"""

import numpy as np

from lbw_optax.rollback import snapshots
from lbw_optax.rollback.checkpointers import Checkpointer
from lbw_optax.rollback.checkpoints import Unreadable
from lbw_optax.rollback.disk import first_line, warn
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import CANDIDATE, GOOD
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.rollback.verdict import Facts, Verdict
from lbw_optax.state import find_all
from lbw_optax.types import PyTree


class Theirs:
    """Checkpoints that somebody else writes, of which those that prove healthy are gone back to.

    Args:
      folder: of the journal.
      checkpointer: theirs.
      probation: steps without trouble that prove one healthy.
    """

    write_seconds = float("nan")
    left_out = 0
    facts = Facts()

    def __init__(self, folder: Folder, checkpointer: Checkpointer, probation: int):
        self._folder, self._checkpointer, self._probation = folder, checkpointer, probation
        self.journal = folder.read()
        self.cadence = f"what your {checkpointer.name} says"
        self.where = checkpointer.directory
        self._others: set[int] = set()  # that are none of this run's, for all that is known
        self._miscounted: set[int] = set()  # of these, what was saved under another count
        self._since = self._now = 0  # steps handed in: at the last look at theirs, and now
        self._trials: set[int] = set()
        self._updates: dict[int, int] = {}  # that the guard had seen at a step of a checkpoint
        self._copy_bytes = 0

    @property
    def nbytes(self) -> int:
        """Of this process's part of this run's checkpoints, each as large as the state."""
        return self._copy_bytes * len(self.journal.checkpoints)

    def found(self) -> list[int]:
        """Steps that could be resumed from."""
        return self._checkpointer.steps

    def begin(self, tree: PyTree) -> Snapshot | None:
        """The state that a run starts from is theirs to save, or not."""
        self._copy_bytes = snapshots.nbytes(tree)
        if self.journal.jumps:
            warn(
                f"{self.where} is empty, and {self._folder.path} remembers "
                f"{len(self.journal.rollbacks)} rollbacks: the run goes the same way again. To "
                "begin anew delete that folder."
            )
        self._write_journal()
        return None

    def resume(self, like: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint that can be read."""
        self._wait()
        self._delete_dropped()
        known = self.journal.checkpoints
        step, tree = self._read_newest(like)
        if not known:
            warn(
                f"{self._folder.path} has no journal of the checkpoints in {self.where}: the run "
                f"goes on from step {step}, and none before it is gone back to. It takes the "
                f"batches from {self.journal.data_step(step)} on: whether an earlier rollback has "
                "left some out is not known."
            )
        there = self._checkpointer.steps
        kept = {s: x for s, x in known.items() if s in there and s <= step}
        self.journal.checkpoints = {step: CANDIDATE, **kept}
        self._others = set(there) - set(self.journal.checkpoints)
        self._trials = {step} if self.journal.checkpoints[step] == CANDIDATE else set()
        self._updates, self._copy_bytes = {}, snapshots.nbytes(tree)
        self._since = self._now = step
        self._write_journal()
        return step, tree

    def _read_newest(self, like: PyTree) -> tuple[int, PyTree]:
        passed: list[str] = []
        for step in sorted(self._checkpointer.steps, reverse=True):
            try:
                tree = self._checkpointer.load(step, like)
            except Unreadable as error:
                passed.append(f"step {step}: {error}")
                continue
            if passed:
                warn(
                    f"Resumed from step {step} in {self.where}, because newer checkpoints cannot "
                    f"be restored ({'; '.join(passed)}). They are not deleted, and your "
                    f"{self._checkpointer.name} may save nothing before the run has passed them: "
                    "delete them, or repair them and start again."
                )
            return step, tree
        raise ValueError(
            f"No checkpoint in {self.where} can be restored ({'; '.join(passed)}): build the same "
            "model and optimizer; or, where your manager keeps several items or other arguments, "
            "pass restore=lambda step, abstract: ... that restores as you do."
        )

    # --- every step -----------------------------------------------------------------------------

    def at(self, step: int) -> None:
        """The loop hands in the state of this step."""
        self._now = step

    def learn(self, verdict: Verdict) -> bool:
        """What was said of the steps after checkpoints; True if one has proven healthy."""
        self._take_note()
        if verdict.step in self._trials:
            self._updates[verdict.step] = verdict.guard_steps
        seen = {step for step in self._trials if step <= verdict.step}
        if verdict.is_trouble:
            self._trials -= seen
            return False
        over = {step for step in seen if verdict.proves(step, self._probation)}
        if not over:
            return False
        self._trials -= over
        self.journal.checkpoints.update(dict.fromkeys(over, GOOD))
        self._write_journal()
        return True

    def _take_note(self) -> None:
        """Of what their manager has written since, and deleted."""
        there, known = set(self._checkpointer.steps), self.journal.checkpoints
        self._set_apart(there - set(known) - self._others - set(self.journal.dropped))
        gone = set(known) - there
        new = there - set(known) - self._others - set(self.journal.dropped)
        left = [step for step in self.journal.dropped if step in there]
        if not gone and not new and left == self.journal.dropped:
            return
        self._others &= there
        self._trials = (self._trials & there) | new
        kept = {step: x for step, x in known.items() if step in there}
        self.journal.checkpoints = kept | dict.fromkeys(new, CANDIDATE)
        self.journal.dropped = left
        self._updates = {step: x for step, x in self._updates.items() if step in there}
        self._write_journal()

    def _set_apart(self, new: set[int]) -> None:
        """What cannot have been saved under the number of its updates is not ours to judge.

        By another count, as of batches or epochs, a checkpoint that is older than the target of a
        rollback may have a higher number, and would be deleted; or one that is newer a lower.
        """
        since, self._since = self._since, self._now
        strange = {step for step in new if not since <= step <= self._now}
        if strange and not self._miscounted:
            warn(
                f"Your {self._checkpointer.name} has saved step {min(strange)} while the state "
                f"handed to RollbackManager was of step {self._now}: what is saved under another "
                "count is neither gone back to nor deleted. Save each state under the number of "
                "updates that it has had, as it is handed to RollbackManager.step."
            )
        self._miscounted |= strange
        self._others |= strange

    @property
    def proven(self) -> list[int]:
        """Steps of the checkpoints that have proven healthy and are there, oldest first."""
        there = set(self._checkpointer.steps)
        return sorted(s for s, x in self.journal.checkpoints.items() if x == GOOD and s in there)

    # --- a rollback -----------------------------------------------------------------------------

    def settle_proven(self) -> None:
        """Wait for what is being written: one that has proven healthy may be."""
        self._wait()

    def load(self, step: int, like: PyTree) -> PyTree:
        """The state of a checkpoint.

        Raises:
          Unreadable: if their manager cannot restore it, or it is none to go back to.
        """
        tree = self._checkpointer.load(step, like)
        in_optimizer, _ = snapshots.look(step, tree).nan_leaves()
        if in_optimizer:
            raise Unreadable(f"there is a NaN in {', '.join(in_optimizer[:5])}")
        updates = max(int(np.max(np.asarray(guard.guard_steps))) for guard in find_all(tree))
        expected = self._updates.get(step, updates)
        if updates != expected:
            raise Unreadable(
                f"its guard has seen {updates} updates, and that of the state which was handed in "
                f"as step {step}, {expected}: save each state under the number of updates that it "
                "has had, as it is handed to RollbackManager.step"
            )
        return tree

    def return_to(self, step: int) -> None:
        """What this run has saved after this step is deleted, by their manager."""
        self._wait()
        self._take_note()
        # What lies before a proven state is proven with it.
        before = {s: GOOD for s in self._trials if s <= step}
        self.journal.checkpoints.update(before)
        self._trials = set()
        self.journal.drop([s for s in self.journal.checkpoints if s > step])
        self._updates = {s: x for s, x in self._updates.items() if s <= step}
        # Before anything is deleted: what it drops does not exist, even if this is interrupted.
        self._write_journal()
        self._delete_dropped()
        self._since = self._now = step
        in_the_way = sorted(s for s in self._others - self._miscounted if s > step)
        if in_the_way:
            warn(
                f"Checkpoints of steps {in_the_way} in {self.where} are newer than step {step}, "
                "which the run has gone back to, and none of this run's: your "
                f"{self._checkpointer.name} may save nothing before the run has passed them. "
                "Delete them if nobody needs them."
            )

    def _delete_dropped(self) -> None:
        there = self._checkpointer.steps
        told = [self._checkpointer.delete(s) for s in self.journal.dropped if s in there]
        there = self._checkpointer.steps
        left = [s for s in self.journal.dropped if s in there]
        if left:
            why = next((x for x in told if x), "it says nothing")
            warn(
                f"Checkpoints of steps {left} in {self.where} are of the run before its rollback, "
                f"and your {self._checkpointer.name} did not delete them ({why}): delete them, or "
                "it may save nothing before the run has passed them."
            )
        if left != self.journal.dropped:
            self.journal.dropped = left
            self._write_journal()

    # --- the end, and what goes wrong -----------------------------------------------------------

    def close(self, *, alone: bool) -> None:
        """Theirs is not closed, nor waited for. The calls of `step` are counted on."""
        try:
            self._folder.write_calls(self.journal)
        except OSError as error:
            self._warn_of_journal(error)

    def _wait(self) -> None:
        problem = self._checkpointer.wait()
        if problem:
            warn(f"A checkpoint in {self.where} could not be written ({problem}).")

    def _write_journal(self) -> None:
        try:
            self._folder.write(self.journal)
        except OSError as error:
            self._warn_of_journal(error)

    def _warn_of_journal(self, error: OSError) -> None:
        warn(
            f"The journal in {self._folder.path} could not be written ({first_line(error)}): free "
            "space there, or a run that is killed does not know which checkpoints have proven "
            "healthy."
        )
