"""Going back to the last good state, around any training loop."""

import functools
import itertools
import logging
import math
import operator
import os
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.audit import GuardExhausted, check
from lbw_optax.law import classifier, divergence
from lbw_optax.law import events as ring
from lbw_optax.law.divergence import UNCERTAIN, Reason
from lbw_optax.paths import path_of
from lbw_optax.rollback import agreement, cadence, verdict
from lbw_optax.rollback.agreement import first_text, from_all, is_stack_of_equals
from lbw_optax.rollback.arrivals import Arrivals
from lbw_optax.rollback.candidates import MEASURED, Candidates, Plan
from lbw_optax.rollback.checkpointers import Checkpointer, Restore
from lbw_optax.rollback.checkpoints import OtherModel, Unreadable
from lbw_optax.rollback.folder import Folder
from lbw_optax.rollback.journal import Rollback
from lbw_optax.rollback.policy import SaveDecisionPolicy
from lbw_optax.rollback.tiers import Tiers
from lbw_optax.rollback.verdict import Report, Verdict
from lbw_optax.state import GuardState, find_all, map_guards
from lbw_optax.types import PyTree

_LOG = logging.getLogger("lbw_optax")
# `max_rollbacks` are allowed in so many calls of `step`.
WINDOW = 1000
# The copies of the guard's state may differ for so many steps: a fault of memory in one of them is
# answered by a rollback within two.
APART = 3
_SAVED_ALONE = (
    "save was called on some processes only{at}, and not within {seconds:g} seconds on the others: "
    "nothing was saved. Call it on all of them, at the same step."
)
_DIFFERS = (
    "Copies of the guard's state have differed for three steps, on processes or devices of this "
    "job: each was given a loss or gradients of its own. Pass the same to all of them, as "
    "value=jax.lax.pmean(loss, axis_name)."
)
_managers = itertools.count()  # the same number on all processes: all make the same ones


class RollbackManager:
    """Return to the last good state when the guard asks, and resume after a kill.

    A step is the number of updates that a state has had: 0 is the start. Call :meth:`resume` once
    before the loop and :meth:`step` after every update; the update that follows ``step`` takes the
    batch ``data_step(step)``. Nearly always `step` returns what it was given. When the guard asks
    (:mod:`lbw_optax.law.divergence`), or :meth:`request` was called, it returns an earlier step
    with its state.

    Only a state that has proven healthy is gone back to: after it, the guard must have seen
    ``probation`` steps without a skip, a jump of the loss, or a loss above its level. Copies are
    held in tiers, each as large as the state. In memory they are on the device where all of them
    take no more than a twentieth of what is free there, else in host memory, which is pinned and
    allocated before the first step where the backend can: two proven ones, four where they are
    small, and as many as are on probation at a time, ``ceil((probation + 1) / snapshot_every)``. On
    disk they are Orbax
    checkpoints, written while the run goes on: three proven ones, and at most three that are not,
    on probation, the newest, and being written.

    The cadence in memory is chosen after 64 steps, and looked at again every 64: the smallest n for
    which copies cost no more than the budget, copy / (n step) <= ``overhead``, with the seconds of
    a copy and of a step as they were measured, and at most what keeps `max_distance`. Until then
    it is 7. The slowest process decides for all. Where to go back to then depends on the machine's
    speed: give a number for a run that is to be the same anywhere.

    Checkpoints to resume from are written at their cadence whatever the guard thinks. A state with
    a NaN in the optimizer's state, or in parameters that the guard finds broken, is none to go back
    to, and a warning names the leaf. A NaN elsewhere, as in statistics of a batch, is the run's
    own. Nothing in the directory that a manager has not written is deleted.

    After a rollback the batches since that step are not used again and newer checkpoints are gone.
    For 20 steps the scale stays under half of what it was at that step. The guard learns the
    level of the loss anew, and asks for certain reasons only until it has seen 10 sound steps. The
    rollback is the newest of :func:`lbw_optax.events`, which the restored state takes over from the
    one that is left. If no other state has proven healthy since, the next rollback goes further
    back, and halves the ceiling again. A run that is killed after a rollback, and resumed, is the
    run that was not.

    The guard's verdict on a step is read one call later, so that the loop never waits for the step
    that was just dispatched. Nor does it wait for the disk: a checkpoint that is due while the last
    is still being written is left out, and a warning says so once. Only a rollback, `save` and
    `close` wait for it. One that cannot be written is a warning, and the run goes on with those
    that it has. An uncertain reason (skips, loss) never ends a run: while
    nothing has proven healthy, and when the budget of rollbacks is spent, the run goes on with a
    warning. A rise of the loss that is there again right after a rollback is the data's or the
    objective's, and only one of several times its size is answered from then on.

    With several processes all make the same calls, over one shared directory; what goes wrong on
    one of them is a warning or an error on all.

    With a `checkpointer`, a manager of Orbax that is yours, you save, and nothing else is written
    to disk but a journal, in a folder beside its directory: ``checkpoints.rollback`` beside
    ``checkpoints``. Its steps must be those that are handed in here. A rollback goes to the newest
    proven state in memory or of yours, which your manager restores, and asks it to delete what this
    run has saved after that. What it keeps and deletes else is up to its own policies.

    Args:
      directory: for the checkpoints, made if it is missing; one run at a time. None with a
        `checkpointer`.
      checkpointer: an `orbax.checkpoint.CheckpointManager`, or a `Checkpointer` of its v1 API, open
        as long as this one is.
      restore: with a `checkpointer`, from a step and an abstract state to a state, where it takes
        other arguments than ``StandardRestore(abstract)``, or in v1 ``load(step, abstract)``.
      max_distance: no rollback is longer, in steps, and no two calls of `step` are further apart.
      save_every: steps between checkpoints on disk; or a `datetime.timedelta`, for so much time and
        at least 100 steps; or a `SaveDecisionPolicy` of Orbax. Only where there are no copies in
        host memory has it a part in `max_distance`: then a time is cut to half as many steps.
      snapshot_every: steps between copies in memory; None switches that tier off.
      overhead: share of the time that copies in memory may take, if `snapshot_every` is measured.
      probation: steps without trouble that prove a state healthy; certain signs show within two,
        and while the loss is suspected nothing is proven.
      max_rollbacks: in 1000 calls of `step`; one more for a certain reason raises, for an uncertain
        one it is a warning, once, and the run goes on.
      reasons: which of "inner_state", "skips" and "loss" are answered. "parameters" (not finite, or
        broken) always are, and so is :meth:`request`.

    Raises:
      ValueError: if the arguments cannot keep `max_distance`, a reason is unknown, the journal is
        damaged, the state holds no guard, a step is out of order, the manager is closed, or the
        processes differ in their calls or in the loss that they pass.
      OSError: if the directory cannot be written, or another process uses it.
      GuardExhausted: from `step`, when the guard governs and can do no more, or when it should go
        back for a certain reason, or one that was requested, and may not or has nowhere to go. The
        newest good checkpoint stays.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, lbw_optax
      >>> tx = lbw_optax.adamw(0.1)
      >>> @jax.jit
      ... def update(w, state, batch):
      ...     loss, grads = jax.value_and_grad(lambda w: jnp.sum((w - batch) ** 2))(w)
      ...     updates, state = tx.update(grads, state, w, value=loss)
      ...     return w + updates, state
      >>> w = jnp.ones(3)
      >>> with lbw_optax.RollbackManager(tempfile.mkdtemp()) as rollback:
      ...     step, (w, state) = rollback.resume((w, tx.init(w)))
      ...     while step < 40:
      ...         w, state = update(w, state, 2.0 + rollback.data_step(step) % 2)
      ...         if step == 30 and not rollback.history:
      ...             w = w.at[0].set(jnp.nan)  # a fault
      ...         step, (w, state) = rollback.step(step + 1, (w, state))
      >>> [(r.from_step, r.to_step, r.reason) for r in rollback.history]
      [(33, 28, 'parameters')]
      >>> rollback.data_step(27), rollback.data_step(28), bool(jnp.isfinite(w).all())
      (27, 33, True)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        checkpointer: Any = None,
        restore: Restore | None = None,
        max_distance: int = 50,
        save_every: int | timedelta | SaveDecisionPolicy = cadence.DEFAULT,
        snapshot_every: int | Literal["measured"] | None = MEASURED,
        overhead: float = 0.01,
        probation: int = 2,
        max_rollbacks: int = 5,
        reasons: Collection[str] = verdict.ASKS,
    ):
        theirs = _checkpointer_of(checkpointer, restore, directory, save_every)
        _validate_counts(max_distance, snapshot_every, probation, max_rollbacks)
        # Without copies in memory it is the checkpoints that keep `max_distance`.
        most = max_distance // 2 if snapshot_every is None else None
        saves = cadence.of(save_every, most=most)
        plan = Plan(saves, snapshot_every, probation, max_distance, _validate_share(overhead))
        if theirs is None or snapshot_every is not None:
            _validate_distance(plan)
        self._reasons = verdict.reasons_of(reasons)
        self._max_distance, self._max_rollbacks = max_distance, max_rollbacks
        self._folder = theirs.folder() if theirs else Folder(path_of(directory, "directory"))
        try:
            self._candidates = Candidates(self._folder, plan, theirs)
        except ValueError:
            self._folder.release()
            raise
        self._journal = self._candidates.journal
        self._arrivals = Arrivals(self._folder.path / "arrivals")
        self.history = list(self._journal.rollbacks)
        """All rollbacks of this run, oldest first."""
        self._in_a_row = 0  # rollbacks since a state was last proven healthy
        self._report: Report | None = None
        self._guard_steps: int | None = None
        self._is_calm = True  # for all that is known
        self._apart = 0  # verdicts in a row in which copies of the guard's state differ
        self._requested: str | None = None
        self._number = next(_managers)
        self._replicas: bool | None = None  # a stack of copies that are the same; None: not known
        self._saves = 0  # calls of `save` since the last of `step`
        self._saved_alone = self._knows_alone = False
        self._last: int | None = None  # the step that was handed in last
        self._to_come: set[int] = set()  # steps of rollbacks that the resumed run comes by again
        self._resumed = False

    def resume(self, tree: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint as ``(step, tree)``, or ``(0, tree)`` in an empty directory.

        `tree` is a freshly made state: what is read takes its shapes, dtypes and shardings. One
        that cannot be read (its checksums are verified) is passed over with a warning. Where
        checkpoints lie without a journal, the newest that is whole is gone on from, with a warning.
        At the start of a run `tree` itself becomes the first candidate.

        Raises:
          ValueError: if the checkpoints are of another model (names, shapes and dtypes that differ
            are listed), if none can be read, or if the state holds no guard.
          TypeError: if a leaf of the state is none that a checkpoint can hold.
        """
        self._require_open()
        find_all(tree)
        self._resumed = True
        is_new = not self._candidates.found()
        step, tree = self._candidates.resume(tree)
        self._replicas = None
        self._are_replicas(tree)
        # A run that was under way without checkpoints may begin at any step.
        self._last = None if is_new else step
        self._report = self._guard_steps = None
        self._to_come = {start for start, _ in self._journal.jumps if start >= step}
        return step, self._arrive_again(step, tree)

    def step(self, step: int, tree: PyTree) -> tuple[int, PyTree]:
        """Hand in the state after `step` updates; get it back, or an earlier one."""
        self._require_open()
        last, self._last = self._last, self._follow(step)
        try:
            return self._take(self._last, tree)
        except BaseException:
            self._last = last  # whoever goes on hands in the same step again
            raise

    def _take(self, step: int, tree: PyTree) -> tuple[int, PyTree]:
        before = self._report
        self._report = verdict.begin(
            step,
            tree,
            requested=self._requested is not None,
            saved_alone=self._saved_alone,
            replicas=self._are_replicas(tree),
            facts=self._candidates.facts(step),
        )
        self._saves, self._saved_alone = 0, False
        self._require_resumed()
        self._journal.calls += 1
        said = self._hear(before)
        if said is not None and self._candidates.learn(said):
            self._in_a_row = 0
        reason, words = self._reason(said)
        if reason and self._is_answered(step, reason):
            return self._roll_back(step, tree, reason, words)
        if reason:
            tree = self._go_on(tree)
        self._require_strength(said, tree)
        if step in self._to_come:
            return step, self._arrive_again(step, tree)
        self._is_calm = said is None or said.is_calm
        self._candidates.take(step, tree, said, is_calm=self._is_calm)
        return step, tree

    def save(self, step: int, tree: PyTree) -> None:
        """Write a checkpoint of this state now, and wait: a run that stops here resumes here.

        It is no candidate for a rollback until it has proven healthy. With several processes all
        must call it, within 20 seconds, or nothing is saved and a warning says so on all.
        """
        self._require_open()
        step = self._follow(step, again=True)
        if jax.process_count() > 1 and not self._all_save(step):
            return
        self._require_resumed()
        self._candidates.save(step, tree, is_calm=self._is_calm)

    def _all_save(self, step: int) -> bool:
        """Whether all processes have called `save`; one that has come alone is told, and goes on.

        Or it would wait in `save`, and the others for it in their next training step.
        """
        if self._candidates.is_whole(step):
            return False
        self._saves += 1
        place = f"lbw_optax/save/{self._number}/{self._journal.calls}/{self._saves}"
        steps = from_all(place, str(step))
        if steps is None:
            self._saved_alone = self._knows_alone = True
            _warn(_SAVED_ALONE.format(at=f" at step {step}", seconds=agreement.PATIENCE))
            return False
        if len(set(steps)) > 1:
            raise ValueError(
                f"save was called at different steps on the processes ({', '.join(steps)}): call "
                "it on all of them at the same one."
            )
        return True

    def request(self, reason: str) -> None:
        """Roll back at the next call of `step`, whatever the guard says.

        Of a reason that is no text, as an exception, the history has what `str` makes of it. With
        several processes one may ask for all: then it is at the call after that.
        """
        words = "" if reason is None else str(reason)
        # Half a character, as an odd file name holds, can be neither logged nor written.
        self._requested = words.encode(errors="backslashreplace").decode() or "request"

    def data_step(self, step: int) -> int:
        """Index of the batch for the update that follows `step`; it never comes back to a batch."""
        return self._journal.data_step(step)

    def report(self) -> Tiers:
        """Where copies are kept, how often and why, and what they take: see `Tiers`.

        It asks no other process and does not wait: for a log, as often as you like.
        """
        return self._candidates.tiers

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the copies of this process take; `report` says which memory."""
        return self._candidates.memory_bytes

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and free the directory."""
        self._close(alone=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # The other processes may not have failed: they cannot be waited for.
        self._close(alone=kind is not None and jax.process_count() > 1)

    def _close(self, *, alone: bool) -> None:
        if not self._folder.is_open:
            return
        try:
            self._candidates.close(alone=alone)
        finally:
            self._folder.release()

    # --- what the guard says --------------------------------------------------------------------

    def _hear(self, report: Report | None) -> Verdict | None:
        """The verdict on the step before."""
        if report is None:
            return None
        said = verdict.read(report, self._guard_steps)
        self._require_same_calls(said)
        if said.saved_alone and not self._knows_alone:
            _warn(_SAVED_ALONE.format(at="", seconds=agreement.PATIENCE))
        self._knows_alone = self._knows_alone and not said.saved_alone
        self._guard_steps = said.guard_steps
        self._apart = self._apart + 1 if said.differs else 0
        if "loss" not in self._reasons:  # or no state of a run that is sound would be proven
            said = said._replace(suspected=False)
        return said

    def _reason(self, said: Verdict | None) -> tuple[Reason, str]:
        """Why to go back, NONE if nobody asks, and in words."""
        asked = self._requested or ""
        if jax.process_count() > 1:  # only what all processes have heard of
            asked = first_text(asked) if said is not None and said.requested else ""
        if asked or jax.process_count() == 1:
            self._requested = None
        if asked:
            return Reason.REQUEST, asked
        reason = Reason(said.asked if said is not None and said.governs else 0)
        return reason, _name(reason)

    def _is_answered(self, step: int, reason: Reason) -> bool:
        """Whether to go back for it: not when it is switched off, or uncertain and often enough."""
        if reason != Reason.REQUEST and _name(reason) not in self._reasons:
            return False
        if reason not in UNCERTAIN or not self._is_spent():
            return True
        self._reasons -= {_name(reason)}
        _warn(
            f"The guard asks for a rollback at step {step} ({_name(reason)}), and its budget of "
            f"{self._max_rollbacks} in {WINDOW} calls is spent{self._say_history()}. The run goes "
            "on, for this reason is not certain, and does not go back for it again. "
            "Where that is as it should be, as a loss that rises in reinforcement learning or in a "
            f"curriculum, switch it off: reasons={tuple(sorted(self._reasons))}."
        )
        return False

    def _go_on(self, tree: PyTree) -> PyTree:
        """What was asked for an uncertain reason, or one that is switched off, is dropped."""
        self._report = None
        kept = np.array([r not in UNCERTAIN and _name(r) in self._reasons for r in Reason])
        return map_guards(lambda guard: _place(_each(_calm_down, _own(guard), kept), guard), tree)

    def _require_strength(self, said: Verdict | None, tree: PyTree) -> None:
        """The guard must be able to do something, and be one and the same everywhere."""
        if self._apart >= APART:
            self._report, self._apart = None, 0
            if not self._replicas:
                raise ValueError(_DIFFERS)
            self._replicas = False  # they may be runs of their own that began alike
            _warn(
                f"{_DIFFERS} Independent runs, one on each device, may differ: none is looked at."
            )
        if said is None or not said.exhausted or self._report is None:
            return
        now, self._report = verdict.read(self._report, None), None
        if now.exhausted:
            raise GuardExhausted(f"{_last_words(tree)}{self._say_history()}.")

    # --- what may be asked of a manager ---------------------------------------------------------

    def _follow(self, step: int, *, again: bool = False) -> int:
        """The step as an integer: it comes after the one before, by no more than is useful."""
        try:
            number = operator.index(step)
        except TypeError:
            raise TypeError(f"step must be an integer, got {step!r}.") from None
        last = self._last
        least = (0 if last is None else last) + (not again)
        if number < least or (last is not None and number > last + self._max_distance):
            raise ValueError(
                f"step {number} was handed in after step {last or 0}: hand in every update, with "
                "the number of updates that the state has had, in order and at most "
                f"max_distance={self._max_distance} apart; resume says where to go on."
            )
        return number

    def _require_open(self) -> None:
        if not self._folder.is_open:
            raise ValueError(
                f"This RollbackManager of {self._folder.path} is closed, or belongs to another "
                "process: make a new one and begin with resume."
            )

    def _require_resumed(self) -> None:
        newest = None if self._resumed else max(self._candidates.found(), default=None)
        if newest is not None:
            raise ValueError(
                f"{self._candidates.where} holds checkpoints up to step {newest} of an earlier "
                "run: begin with step, tree = rollback.resume(tree), or pass an empty directory."
            )
        self._resumed = True

    def _are_replicas(self, tree: PyTree) -> bool:
        """Whether this is a state for each device, and all were the same when the run began here.

        So are the replicas of pmap. Independent runs, as of several seeds, begin differently.
        """
        if self._replicas is None:
            steps = find_all(tree)[0].guard_steps
            self._replicas = jnp.ndim(steps) == 1 and is_stack_of_equals(tree, len(steps))
        return self._replicas

    def _require_same_calls(self, said: Verdict) -> None:
        if said.complaint:
            self._report = None
            raise ValueError(f"{said.complaint} (step {said.step} on this one).")

    # --- going back -----------------------------------------------------------------------------

    def _roll_back(self, step: int, tree: PyTree, reason: Reason, words: str) -> tuple[int, PyTree]:
        self._require_budget(step, words)
        newest = self.history[-1].to_step if self._in_a_row else step
        for to_step, tier in self._candidates.proven():
            if to_step >= newest or step - to_step > self._max_distance:
                continue
            try:
                good = self._candidates.load(to_step, tier, tree)
            except (OtherModel, Unreadable) as error:
                _warn(f"The checkpoint of step {to_step} is passed over: {error}.")
                continue
            good = self._arrive(good, tree, step, to_step, reason, words, tier)
            return to_step, good
        asked = (
            f"The guard asks for a rollback at step {step} ({words}), and no state within "
            f"{self._max_distance} steps has proven healthy"
        )
        if reason not in UNCERTAIN:
            raise GuardExhausted(f"{asked}{self._say_history()}.")
        _warn(f"{asked}: the run goes on, for this reason is not certain.")
        return step, self._go_on(tree)

    def _arrive(
        self,
        good: PyTree,
        left: PyTree,
        step: int,
        to_step: int,
        reason: Reason,
        words: str,
        tier: str,
    ) -> PyTree:
        """Make the state that is gone back to ready to go on."""
        self._in_a_row += 1
        good = _rejoin(good, left, reason, step, to_step, divergence.CEILING**self._in_a_row)
        self._journal.jump(step, to_step)
        self._keep_arrival(to_step, good)
        rollback = Rollback(step, to_step, words, tier, step - to_step, self._journal.calls)
        self.history.append(rollback)
        _LOG.warning("Rollback from step %d to %d (%s), from %s.", step, to_step, words, tier)
        self._journal.rollbacks.append(rollback)
        self._candidates.return_to(to_step)
        self._report = self._guard_steps = None
        self._last, self._is_calm, self._apart = to_step, True, 0
        self._to_come.clear()
        return good

    def _keep_arrival(self, step: int, tree: PyTree) -> None:
        """A run that is killed now comes by this step again: then the guard is to be as it is."""
        oldest = min(self._journal.checkpoints, default=0)
        wanted = [self._batch_at(start) for start, _ in self._journal.jumps if start >= oldest]
        try:
            self._arrivals.save(*self._batch_at(step), tree, wanted)
        except OSError as error:
            _warn(
                f"What the guard knows after the rollback to step {step} could not be written to "
                f"{self._folder.path} ({error}): if the run is killed before its next checkpoint, "
                "the ceiling on its scale is lost."
            )

    def _arrive_again(self, step: int, tree: PyTree) -> PyTree:
        """The guard as the rollback to this step had left it, in a run that was killed since."""
        if step not in self._to_come:
            return tree
        self._to_come.discard(step)
        self._report = self._guard_steps = None
        return self._arrivals.take_over(*self._batch_at(step), tree)

    def _batch_at(self, step: int) -> tuple[int, int]:
        return step, self._journal.data_step(step)

    def _is_spent(self) -> bool:
        recent = [r for r in self.history if r.at_call > self._journal.calls - WINDOW]
        return len(recent) >= self._max_rollbacks

    def _require_budget(self, step: int, reason: str) -> None:
        if self._is_spent():
            raise GuardExhausted(
                f"The guard asks for a rollback at step {step} ({reason}), and its budget of "
                f"{self._max_rollbacks} in {WINDOW} calls is spent{self._say_history()}."
            )

    def _say_history(self) -> str:
        said = "; ".join(f"{r.from_step} to {r.to_step} ({r.reason})" for r in self.history[-10:])
        newest = max(self._journal.checkpoints, default=None)
        left = "none" if newest is None else f"of step {newest}"
        return (
            f". Rollbacks so far: {said or 'none'}. The newest checkpoint in "
            f"{self._candidates.where} is {left}: look at the data and the learning rate"
        )


def _checkpointer_of(
    checkpointer: Any, restore: Restore | None, directory: Any, save_every: Any
) -> Checkpointer | None:
    """The user's own checkpoint manager, None if there is none to be used."""
    if checkpointer is None and restore is not None:
        raise ValueError("restore says how a checkpointer restores: pass checkpointer=, too.")
    if checkpointer is None and directory is None:
        raise TypeError(
            "directory must be a path, a str or a pathlib.Path, got None. For a checkpoint manager "
            "of your own pass checkpointer=."
        )
    if checkpointer is None:
        return None
    if directory is not None:
        raise ValueError(
            "Pass a directory, for checkpoints that RollbackManager writes, or a checkpointer, "
            "which writes its own, not both."
        )
    if save_every is not cadence.DEFAULT:
        raise ValueError(
            "save_every is for checkpoints that RollbackManager writes: when yours are due is up "
            "to your checkpointer."
        )
    return Checkpointer(checkpointer, restore)


def _validate_counts(
    max_distance: int, snapshot_every: Any, probation: int, max_rollbacks: int
) -> None:
    counts = {
        "max_distance": max_distance,
        "snapshot_every": snapshot_every,
        "probation": probation,
        "max_rollbacks": max_rollbacks,
    }
    for name, x in counts.items():
        if name == "snapshot_every" and (x is None or (isinstance(x, str) and x == MEASURED)):
            continue
        if not isinstance(x, int | np.integer) or isinstance(x, bool):
            raise ValueError(f"{name} must be an integer, got {x!r}.")
        if x < 1:
            raise ValueError(f"{name} must be at least 1, got {x}.")


def _validate_share(overhead: float) -> float:
    is_real = isinstance(overhead, int | float | np.integer | np.floating)
    if not is_real or isinstance(overhead, bool) or not 0 < overhead < math.inf:
        raise ValueError(f"overhead must be a finite share above 0, got {overhead!r}.")
    return float(overhead)


def _validate_distance(plan: Plan) -> None:
    """Copies in memory keep `max_distance`; only where there are none must checkpoints do it."""
    every = 1 if plan.snapshot_every == MEASURED else plan.snapshot_every
    name, max_distance = "snapshot_every", plan.max_distance
    if every is None:
        name, every = "save_every", plan.save_every.at_most
    if every is None:
        raise ValueError(
            f"Without copies in memory (snapshot_every=None) {plan.save_every} keeps no "
            "max_distance: give save_every in steps, or snapshot_every."
        )
    age = every + plan.probation + 1
    if age > max_distance:
        raise ValueError(
            f"max_distance={max_distance} is too small for {name}={every} and "
            f"probation={plan.probation}: a good state can be {age} steps "
            f"old before the next has proven healthy; lower {name} or raise max_distance."
        )


def _name(reason: Reason) -> str:
    return reason.name.lower()


def _last_words(tree: PyTree) -> str:
    """What the exhausted guard has to say."""
    try:
        check(tree)
    except GuardExhausted as error:
        return str(error).removesuffix(".")
    return "The guard of another process is exhausted"


def _rejoin(
    good: PyTree, left: PyTree, reason: int, step: int, to_step: int, share: float
) -> PyTree:
    """The good state with the events of the one that is left, and under a ceiling for a while."""
    lefts = iter(find_all(left))
    steps = (np.int32(min(x, np.iinfo(np.int32).max)) for x in (step, to_step))  # as counters end
    numbers = np.int32(reason), *steps, np.float32(share)

    def joined(guard: GuardState) -> GuardState:
        return _place(_each(_back, _own(guard), _own(next(lefts)), *numbers), guard)

    return map_guards(joined, good)


@functools.partial(jax.jit, static_argnums=0)
def _each(function: Callable[..., GuardState], guard: GuardState, *arguments: Any) -> GuardState:
    """Of several runs in one state, as `vmap` and `pmap` make it, what a function makes of each."""
    axes = [0 if isinstance(x, GuardState) else None for x in (guard, *arguments)]
    for _ in range(jnp.ndim(guard.guard_steps)):
        function = jax.vmap(function, axes)
    return function(guard, *arguments)


def _back(
    guard: GuardState,
    left: GuardState,
    reason: jax.Array,
    step: jax.Array,
    to_step: jax.Array,
    share: jax.Array,
) -> GuardState:
    control, last = guard.law.control, left.law.control
    log_ceiling = control.log_scale + jnp.log(share)
    held = control._replace(
        # What a person has ordered since stays: a rollback overrules nobody.
        log_scale=jnp.where(last.pinned, last.log_scale, control.log_scale),
        pinned=last.pinned,
        log_ceiling=log_ceiling,
        ceiling_steps=jnp.int32(divergence.CEILING_STEPS),
    )
    known = divergence.leave(left.law.divergence, left.law.statistics.loss_unit)
    quiet = divergence.after_rollback(guard.law.divergence, known)
    return guard._replace(
        mode=left.mode,
        law=guard.law._replace(
            control=held,
            divergence=quiet,
            classifier=classifier.after_rollback(guard.law.classifier, left.law.classifier),
        ),
        events=ring.record_rollback(
            left.events,
            guard.guard_steps,
            reason=reason,
            from_step=step,
            to_step=to_step,
            regime=control.regime,
            scale_before=jnp.exp(control.log_scale),
            scale_after=jnp.exp(log_ceiling),
            loss=left.telemetry.loss,
        ),
    )


def _own(guard: GuardState) -> GuardState:
    return guard._replace(inner_state=None)


def _calm_down(guard: GuardState, kept: jax.Array) -> GuardState:
    """Nothing asked, but for the reasons that are kept."""
    asking = guard.law.divergence
    quiet = divergence.after_rollback(asking)
    stays = kept[asking.rollback_asked]
    quiet = jax.tree.map(lambda new, old: jnp.where(stays, old, new), quiet, asking)
    return guard._replace(law=guard.law._replace(divergence=quiet))


def _place(guard: GuardState, like: GuardState) -> GuardState:
    """Placed as before, so that the training step is not compiled anew."""

    def place(x: jax.Array, was: jax.Array) -> jax.Array:
        is_placed = isinstance(was, jax.Array) and was.committed  # not what is NumPy's
        return jax.device_put(x, was.sharding) if is_placed else x

    own = like._replace(inner_state=None)
    return jax.tree.map(place, guard, own)._replace(inner_state=like.inner_state)


def _warn(message: str) -> None:
    _LOG.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
