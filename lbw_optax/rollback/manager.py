"""Going back to the last good state, around any training loop."""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.audit import GuardExhausted
from lbw_optax.law import divergence
from lbw_optax.law import events as ring
from lbw_optax.law.divergence import UNCERTAIN, Reason
from lbw_optax.rollback.agreement import largest
from lbw_optax.rollback.candidates import Health, Plan, Targets
from lbw_optax.rollback.checkpoints import Unreadable
from lbw_optax.rollback.folder import Folder
from lbw_optax.state import GuardState, Mode, find_all, map_guards

_REASONS = {reason.name.lower(): reason for reason in Reason}
_UNCERTAIN = tuple(reason.name.lower() for reason in UNCERTAIN)
# After a rollback the scale stays under this share of what it was, for so many steps.
CEILING, CEILING_STEPS = 0.5, 20
# `max_rollbacks` are allowed in so many calls of `step`.
WINDOW = 1000


class Rollback(NamedTuple):
    """One return to an earlier state.

    Attributes:
      from_step: the step that was left.
      to_step: the step that it went back to.
      reason: a `lbw_optax.law.divergence.Reason` by its name, or what `request` was given.
      tier: "memory" or "disk".
      skipped_batches: batches that are not used again.
      at_call: calls of `step` before it.
    """

    from_step: int
    to_step: int
    reason: str
    tier: str
    skipped_batches: int
    at_call: int


class RollbackManager:
    """Return to the last good state when the guard asks, and resume after a kill.

    A step is the number of updates that a state has had: 0 is the start. Call :meth:`resume` once
    before the loop and :meth:`step` after every update; the update that follows ``step`` takes the
    batch ``data_step(step)``. Nearly always `step` returns what it was given. When the guard asks
    (:mod:`lbw_optax.law.divergence`), or :meth:`request` was called, it returns an earlier step
    with its state.

    Only a state that has proven healthy is gone back to: after it, the guard must have seen
    ``probation`` steps without a skip, a jump of the loss, or a loss above its level. Copies are
    held in two tiers: at most three in host memory (pinned, where the backend has it), and at most
    four Orbax checkpoints (five with :meth:`save`), written while the run goes on. Each is as large
    as the state.

    After a rollback the batches since the target are not used again and newer checkpoints are
    gone. For 20 steps the scale stays under half of what it was at the target. The guard learns the
    level of the loss anew, and asks for certain reasons only until it has seen 10 sound steps. The
    rollback is the newest of :func:`lbw_optax.events`, which the restored state takes over from the
    one that is left. If no other state has proven healthy since, the next rollback goes further
    back, and halves the ceiling again.

    The guard's verdict on a step is read one call later, so that the loop never waits for the step
    that was just dispatched. A checkpoint that is still being written is waited for when the next
    one is due, and when it is to be gone back to. One that cannot be written is a warning, and the
    run goes on with the targets that it has. So is an uncertain ask (skips, loss) while nothing has
    proven healthy. With several processes all make the same calls, over one shared directory.

    Args:
      directory: for the checkpoints, made if it is missing; one run at a time.
      max_distance: no rollback is longer, in steps.
      save_every: steps between checkpoints on disk.
      snapshot_every: steps between copies in host memory; None switches that tier off.
      probation: steps without trouble that prove a state healthy; certain signs show within two,
        and while the loss is suspected nothing is proven.
      max_rollbacks: in 1000 calls of `step`; one more raises.

    Raises:
      ValueError: if the arguments cannot keep `max_distance`, or the state holds no guard.
      OSError: if the directory cannot be written, or another process uses it.
      GuardExhausted: from `step`, when it should go back but may not, or when the state is broken
        and there is nowhere to go. The newest good checkpoint stays.

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
        directory: str | os.PathLike[str],
        *,
        max_distance: int = 50,
        save_every: int = 25,
        snapshot_every: int | None = 7,
        probation: int = 2,
        max_rollbacks: int = 5,
    ):
        plan = Plan(save_every, snapshot_every, probation)
        _validate(plan, max_distance, max_rollbacks)
        self._max_distance, self._max_rollbacks = max_distance, max_rollbacks
        folder = Folder(Path(directory))
        try:
            self._targets = Targets(folder, plan)
        except ValueError:
            folder.release()
            raise
        self._journal = self._targets.journal
        self.history = [Rollback(**r) for r in self._journal.rollbacks]
        """All rollbacks of this run, oldest first."""
        self._calls = max((r.at_call for r in self.history), default=0)
        self._in_a_row = 0  # rollbacks since a state was last proven healthy
        self._report: tuple[int, jax.Array] | None = None
        self._guard_steps: int | None = None
        self._requested: str | None = None
        self._resumed = False

    def resume(self, tree: Any) -> tuple[int, Any]:
        """The newest checkpoint as ``(step, tree)``, or ``(0, tree)`` in an empty directory.

        `tree` is a freshly made state: what is read takes its shapes, dtypes and shardings. One
        that cannot be read (its checksums are verified) is passed over with a warning. At the start
        of a run `tree` itself becomes the first target.

        Raises:
          ValueError: if the checkpoints are of another model (names, shapes and dtypes that differ
            are listed), if none can be read, or if the state holds no guard.
        """
        find_all(tree)
        self._resumed = True
        if self._journal.checkpoints:
            return self._targets.resume(tree)
        self._targets.begin(tree)
        return 0, tree

    def step(self, step: int, tree: Any) -> tuple[int, Any]:
        """Hand in the state after `step` updates; get it back, or an earlier one."""
        self._require_resumed()
        self._calls += 1
        before, self._report = self._report, (step, _start_report(tree))
        health = self._read(before) if before is not None else None
        if health is not None and self._targets.learn(health):
            self._in_a_row = 0
        reason, self._requested = self._requested, None
        if health is not None and health.governs and health.asked:
            reason = reason or Reason(health.asked).name.lower()
        if reason is not None:
            return self._roll_back(step, tree, reason)
        if health is None or not (health.is_trouble or health.suspected):
            self._targets.take(step, tree)
        return step, tree

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint of this state now, and wait: a run that stops here resumes here.

        It is no target of a rollback until it has proven healthy.
        """
        self._require_resumed()
        self._targets.save(step, tree)

    def request(self, reason: str) -> None:
        """Roll back at the next call of `step`, whatever the guard says."""
        self._requested = reason

    def data_step(self, step: int) -> int:
        """Index of the batch for the update that follows `step`; it never comes back to a batch."""
        return self._journal.data_step(step)

    @property
    def memory_bytes(self) -> int:
        """Bytes of host memory that the snapshots of this process take."""
        return self._targets.memory_bytes

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and free the directory."""
        try:
            self._targets.settle()
        finally:
            self._targets.folder.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, report: tuple[int, jax.Array]) -> Health:
        """What the guard said of the step before."""
        step, numbers = report
        asked, minus_calm, guard_steps, suspected, governs = (int(x) for x in np.asarray(numbers))
        updates = 1 if self._guard_steps is None else guard_steps - self._guard_steps
        self._guard_steps = guard_steps
        return Health(step, asked, -minus_calm < updates, bool(suspected), bool(governs))

    def _roll_back(self, step: int, tree: Any, reason: str) -> tuple[int, Any]:
        self._require_budget(step, reason)
        newest = self.history[-1].to_step if self._in_a_row else step
        for to_step, tier in self._targets.proven():
            if to_step >= newest or step - to_step > self._max_distance:
                continue
            try:
                good = self._targets.load(to_step, tier, tree)
            except Unreadable as error:
                _warn(f"The checkpoint of step {to_step} is passed over: {error}.")
                continue
            return to_step, self._arrive(good, tree, step, to_step, reason, tier)
        asked = (
            f"The guard asks for a rollback at step {step} ({reason}), and no state within "
            f"{self._max_distance} steps has proven healthy"
        )
        if reason not in _UNCERTAIN:
            raise GuardExhausted(f"{asked}{self._say_history()}.")
        _warn(f"{asked}: the run goes on, for this reason is not certain.")
        self._report = None
        return step, map_guards(lambda guard: _place(_calm_down(guard), guard), tree)

    def _arrive(self, good: Any, left: Any, step: int, to_step: int, reason: str, tier: str) -> Any:
        """Make the state that is gone back to ready to go on."""
        self._in_a_row += 1
        self._journal.jump(step, to_step)
        rollback = Rollback(step, to_step, reason, tier, step - to_step, self._calls)
        self.history.append(rollback)
        self._journal.rollbacks.append(rollback._asdict())
        self._targets.return_to(to_step)
        self._report = self._guard_steps = None
        number = _REASONS.get(reason, Reason.REQUEST)
        return _rejoin(good, left, number, step, to_step, CEILING**self._in_a_row)

    def _require_resumed(self) -> None:
        newest = max(self._journal.checkpoints, default=None)
        if newest is not None and not self._resumed:
            raise ValueError(
                f"{self._targets.folder.path} holds checkpoints up to step {newest} of an earlier "
                "run: begin with step, tree = rollback.resume(tree), or pass an empty directory."
            )
        self._resumed = True

    def _require_budget(self, step: int, reason: str) -> None:
        recent = [r for r in self.history if r.at_call > self._calls - WINDOW]
        if len(recent) >= self._max_rollbacks:
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
            f"{self._targets.folder.path} is {left}: look at the data and the learning rate"
        )


def _validate(plan: Plan, max_distance: int, max_rollbacks: int) -> None:
    for name, x in {**plan._asdict(), "max_rollbacks": max_rollbacks}.items():
        if x is not None and x < 1:
            raise ValueError(f"{name} must be at least 1, got {x}.")
    every = {"save_every": plan.save_every, "snapshot_every": plan.snapshot_every or 1}
    for name, x in every.items():
        if x + plan.probation + 1 > max_distance:
            raise ValueError(
                f"max_distance={max_distance} is too small for {name}={x} and "
                f"probation={plan.probation}: a target can be {x + plan.probation + 1} steps old "
                f"before the next has proven healthy; lower {name} or raise max_distance."
            )


def _start_report(tree: Any) -> jax.Array:
    """The guard's verdict in one small array of its own, on its way to the host."""
    parts = [
        (
            guard.law.divergence.rollback_asked,
            guard.law.control.calm_steps,
            guard.guard_steps,
            guard.law.divergence.loss_excess,
            guard.mode,
        )
        for guard in find_all(tree)
    ]
    numbers = largest(_summarise(parts))
    numbers.copy_to_host_async()
    return numbers


@jax.jit
def _summarise(parts: list[tuple[jax.Array, ...]]) -> jax.Array:
    asked, calm, steps, excess, mode = (jnp.stack(x) for x in zip(*parts, strict=True))
    governs = mode == Mode.GOVERN
    numbers = [asked.max(), (-calm).max(), steps.max(), (excess > 0).any(), governs.any()]
    return jnp.stack([x.astype(jnp.int32) for x in numbers])


def _rejoin(good: Any, left: Any, reason: int, step: int, to_step: int, share: float) -> Any:
    """The good state with the events of the one that is left, and under a ceiling for a while."""
    rings = iter([guard.events for guard in find_all(left)])
    numbers = np.int32(reason), np.int32(step), np.int32(to_step), np.float32(share)
    return map_guards(lambda guard: _place(_back(guard, next(rings), *numbers), guard), good)


@jax.jit
def _back(
    guard: GuardState, events: ring.Ring, reason: Any, step: Any, to_step: Any, share: Any
) -> GuardState:
    control = guard.law.control
    log_ceiling = control.log_scale + jnp.log(share)
    held = control._replace(log_ceiling=log_ceiling, ceiling_steps=jnp.int32(CEILING_STEPS))
    calm = _calm_down(guard)
    return calm._replace(
        law=calm.law._replace(control=held),
        events=ring.record_rollback(
            events,
            guard.guard_steps,
            reason=reason,
            from_step=step,
            to_step=to_step,
            regime=control.regime,
            scale_before=jnp.exp(control.log_scale),
            scale_after=jnp.exp(log_ceiling),
        ),
    )


@jax.jit
def _calm_down(guard: GuardState) -> GuardState:
    quiet = divergence.after_rollback(guard.law.divergence)
    return guard._replace(inner_state=None, law=guard.law._replace(divergence=quiet))


def _place(guard: GuardState, like: GuardState) -> GuardState:
    """Placed as before, so that the training step is not compiled anew."""

    def place(x: jax.Array, was: jax.Array) -> jax.Array:
        return jax.device_put(x, was.sharding) if was.committed else x

    own = like._replace(inner_state=None)
    return jax.tree.map(place, guard, own)._replace(inner_state=like.inner_state)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
