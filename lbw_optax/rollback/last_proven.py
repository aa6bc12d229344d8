"""For those who keep their own Orbax manager: save healthy states, never lose the last proven one.

Needs no Orbax itself: its policies are protocols, and these are the two methods that they ask for.
"""

import logging
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from lbw_optax import sentences
from lbw_optax.law.divergence import Reason
from lbw_optax.rollback import snapshots, verdict
from lbw_optax.rollback.verdict import Report, Verdict
from lbw_optax.types import PyTree

_LOG = logging.getLogger("lbw_optax")
# A checkpoint that is due waits so many steps for a healthy state before that is said.
PATIENCE = 100


class LastProven:
    """Policy of saving and of preservation for Orbax: only what is healthy, and what has proven so.

    One object is both policies of one `CheckpointManager`, or of one `Checkpointer` (v1). Call
    :meth:`update` after every update of the parameters, before the manager's `save`.

    - A checkpoint that is due by `when` is written when nothing speaks against the state: the guard
      has not skipped the step, does not suspect the loss, asks for nothing, and no NaN is in the
      optimizer's state. Until then it is owed, and written at the first step where that holds. It
      is judged before Orbax copies the state, which waits for it in any case.
    - It has proven healthy when the guard has seen `probation` steps after it without trouble.
    - Kept are the newest proven one, those on probation, and the newest of all. Where nothing has
      proven healthy yet, nothing is deleted that this object has not seen fail.

    A guard that only observes withholds nothing, and asks for nothing. A run in which one that
    governs goes on asking, and nobody answers, saves nothing more: a warning says so after 100
    steps. Give ``AnySavePolicy([proven, PreemptionCheckpointingPolicy()])`` where something must be
    written all the same; it is judged like the others.

    With several processes all make the same calls, and the decisions are the same on all.

    Args:
      when: a policy of Orbax that says when a checkpoint is due, `FixedIntervalPolicy(1000)` say.
      probation: steps without trouble that prove a state healthy.
      reasons: what speaks against a state when the guard asks for it, as of `RollbackManager`.

    Raises:
      ValueError: if an argument is none of these, `update` was not called before a `save`, or the
        processes differ in their calls.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> from orbax.checkpoint.checkpoint_managers import FixedIntervalPolicy
      >>> proven = LastProven(FixedIntervalPolicy(10))
      >>> proven.update(0, lbw_optax.adamw(1e-3).init(jnp.ones(3)))
      >>> proven.last, proven.asked
      (None, '')
    """

    def __init__(self, when: Any, *, probation: int = 2, reasons: Collection[str] = verdict.ASKS):
        if not callable(getattr(when, "should_save", None)):
            raise ValueError(
                f"when must be a SaveDecisionPolicy of Orbax, as FixedIntervalPolicy(1000), "
                f"got {when!r}."
            )
        if isinstance(probation, bool) or not isinstance(probation, int) or probation < 1:
            raise ValueError(f"probation must be an integer of at least 1, got {probation!r}.")
        self._when, self._probation = when, probation
        self._reasons = verdict.reasons_of(reasons)
        self._first: int | None = None  # the first step that was given, or that was gone back to
        self._step: int | None = None  # the newest
        self._tree: PyTree = None
        self._report: Report | None = None
        self._said: Verdict | None = None
        self._guard_steps: int | None = None
        self._trouble = -1  # the newest step with trouble
        self._owed_since: int | None = None
        self._has_warned = False
        # Steps of checkpoints.
        self._trial: set[int] = set()
        self._proven: set[int] = set()
        self._failed: set[int] = set()
        self._left: set[int] = set()  # of the run before it went back

    @property
    def last(self) -> int | None:
        """The newest checkpoint that has proven healthy, to go back to; None without one."""
        return max(self._proven, default=None)

    @property
    def asked(self) -> str:
        """Why the guard asks to go back, as it was last heard, in words; "" if it does not."""
        said = self._said
        if said is None or not (said.asked and said.governs):
            return ""
        return sentences.ASKS[Reason(said.asked)]

    def update(self, step: int, state: PyTree) -> None:
        """Hand in the state that could be saved as `step`. Does not wait for it.

        Args:
          step: the number that its checkpoint would have.
          state: all of it, parameters and optimizer; it is held until the next call.
        """
        self._hear()
        if self._step is not None and step < self._step:
            self._go_back(step)
        if self._first is None:
            self._first = step
        self._step, self._tree = step, state
        self._report = verdict.begin(step, state)

    # --- what Orbax asks ------------------------------------------------------------------------

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        """Whether to save: it is due, and nothing speaks against the state. Waits if it is due."""
        if step.step != self._step:
            raise ValueError(
                f"LastProven is asked to save step {step.step} and was given step {self._step}: "
                "call update(step, state) after every update, before save."
            )
        self._take_note([x.step for x in previous_steps])
        is_due = self._owed_since is not None or self._when.should_save(
            step, previous_steps, context=context
        )
        if not is_due:
            return False
        if not self._is_healthy(step.step):
            self._owe(step.step)
            return False
        self._owed_since = None
        self._trial.add(step.step)
        self._left.discard(step.step)
        return True

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Which checkpoints to keep: see above."""
        steps = [x.step for x in checkpoints]
        self._take_note(steps)
        here = self._proven.intersection(steps)
        kept = self._trial | {max(here, default=-1), max(steps, default=-1)}
        unknown = set() if here else set(steps) - self._failed
        return [step in kept | unknown for step in steps]

    # --- what is known of the checkpoints -------------------------------------------------------

    def _take_note(self, steps: Iterable[int]) -> None:
        """Those that are there: others may save as well, and delete, and earlier processes have."""
        if self._first is None:  # nothing was seen of this run
            return
        there, seen = set(steps), self._first - 1
        self._proven &= there
        self._left &= there
        self._trial = {step for step in self._trial if step in there or step == self._step}
        new = there - self._trial - self._proven - self._failed - self._left
        self._failed |= {step for step in new if seen <= step <= self._trouble}
        self._trial |= {step for step in new if step >= seen} - self._failed
        stale = self._left & there
        if stale and not self._has_warned:
            self._has_warned = True
            _warn(
                f"Checkpoints of steps {sorted(stale)} are of a run that was left, and Orbax saves "
                "nothing below the newest: delete what is newer than the step that you go back to."
            )

    def _hear(self) -> None:
        """Read the verdict on the newest step, if nobody has."""
        if self._report is None:
            return
        said, self._report = verdict.read(self._report, self._guard_steps), None
        if said.complaint:
            raise ValueError(f"{said.complaint} (step {said.step} on this one).")
        self._guard_steps = said.guard_steps
        if said.asked and Reason(said.asked).name.lower() not in self._reasons:
            said = said._replace(asked=0)
        if "loss" not in self._reasons:
            said = said._replace(suspected=False)
        self._said = said
        if said.is_trouble:
            self._trouble = said.step
            self._failed |= self._trial
            self._trial = set()
        elif said.is_calm:
            over = {step for step in self._trial if said.proves(step, self._probation)}
            self._trial -= over
            self._proven |= over

    def _is_healthy(self, step: int) -> bool:
        """Whether nothing speaks against the newest state. Waits for it."""
        self._hear()
        if self._said is None or self._said.step != step:
            return False
        if not self._said.governs:
            return True
        if not self._said.is_calm:
            return False
        in_optimizer, _ = snapshots.look(step, self._tree).nan_leaves()
        return not in_optimizer

    def _owe(self, step: int) -> None:
        if self._owed_since is None:
            self._owed_since, self._has_warned = step, False
        if step - self._owed_since >= PATIENCE and not self._has_warned:
            self._has_warned = True
            why = self.asked or "steps are skipped, the loss is suspected, or a NaN is in the state"
            _warn(
                f"No checkpoint was saved since step {self._owed_since}, where one was due: {why}. "
                f"Go back to the last proven one ({self.last}), or go on with "
                "lbw_optax.reset(state); where a loss may rise, leave it out of reasons."
            )

    def _go_back(self, step: int) -> None:
        """The run goes on from an earlier state: what lies after it is of the run that was left."""
        known = self._trial | self._proven | self._failed | self._left
        self._left = {x for x in known if x > step}
        self._trial, self._failed = set(), {x for x in self._failed if x <= step}
        self._proven = {x for x in self._proven if x <= step}
        self._first, self._said, self._guard_steps = step, None, None
        self._trouble, self._owed_since, self._has_warned = -1, None, False


def _warn(message: str) -> None:
    _LOG.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
