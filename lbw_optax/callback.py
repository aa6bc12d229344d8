"""The guard's host side in three calls around any loop: on_restore, on_step, on_save."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax

from lbw_optax import audit, sentences
from lbw_optax.alerts import Alert, Listeners, OnEvent, tell
from lbw_optax.audit import AuditLog, GuardExhausted
from lbw_optax.exporters.lines import MetricsLog
from lbw_optax.law.events import SIZE
from lbw_optax.orders import Orders
from lbw_optax.rollback import snapshots, verdict
from lbw_optax.state import find_named
from lbw_optax.types import PyTree

if TYPE_CHECKING:
    from lbw_optax.rollback.manager import RollbackManager

_LOG = logging.getLogger("lbw_optax")

_metrics = jax.jit(audit.metrics)  # a program where there were fifty

OnMetrics = (
    Callable[[int, Mapping[str, Any]], object]
    | Iterable[Callable[[int, Mapping[str, Any]], object]]
)
"""A function of a step and its metrics, or several."""


class TrainGuard:
    """Reads the guard for you: logs, alerts, orders of `lbw-watch`, and rollback, around any loop.

    A step is the number of updates that a state has had, and a state is any pytree that holds the
    optimizer's: a tuple, a dict, a `TrainState`. Call :meth:`on_restore` once before the loop,
    :meth:`on_step` after every update, :meth:`on_save` where you save and at the end. What they
    return is what the loop goes on with: after a rollback an earlier step, after an order a state
    whose scale is pinned; else what they were given.

    In the directory it writes ``events.jsonl`` (:class:`lbw_optax.AuditLog`) and ``log.jsonl`` (the
    metrics of every so many steps), for `lbw-report` and `lbw-watch`; the latter's orders are
    obeyed. The logger ``"lbw_optax"`` is told in sentences what the guard does and why. When the
    guard can do no more, `on_step` raises :class:`lbw_optax.GuardExhausted`.

    With several processes all make the same calls; the first one writes.

    Args:
      directory: of the run, made if it is missing; one run at a time.
      every: steps between two looks at the guard, each of which waits for the device; at most 64.
      rollback: True for a :class:`lbw_optax.RollbackManager` with its checkpoints in `directory`
        (the extra ``rollback``), or one of your own, which you close.
      on_event: a function of a `lbw_optax.alerts.Alert`, or several: a
        :class:`lbw_optax.exporters.Webhook`.
      on_metrics: a function of a step and its metrics, or several, called at each look: a
        :class:`lbw_optax.exporters.PrometheusFile`.

    Raises:
      ValueError: if the state holds no guard, or `every` is no number from 1 to 64.
      OSError: if the directory cannot be written, or another run uses it.

    Example:
      >>> import jax.numpy as jnp, tempfile, lbw_optax
      >>> tx = lbw_optax.adamw(0.1)  # the one line that knows of the guard
      >>> @jax.jit
      ... def train_step(w, opt_state):
      ...     loss, grads = jax.value_and_grad(lambda w: jnp.sum((w - 2.0) ** 2))(w)
      ...     updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...     return w + updates, opt_state
      >>> w = jnp.ones(3)
      >>> with TrainGuard(tempfile.mkdtemp()) as guard:
      ...     step, state = guard.on_restore(0, (w, tx.init(w)))
      ...     while step < 20:
      ...         step, state = guard.on_step(step + 1, train_step(*state))
      ...     healthy = guard.on_save(step, state)
      >>> step, healthy
      (20, True)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 50,
        rollback: "RollbackManager | bool" = False,
        on_event: OnEvent = (),
        on_metrics: OnMetrics = (),
    ):
        if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= SIZE:
            raise ValueError(
                f"every must be a number of steps from 1 to {SIZE}, for the guard remembers its "
                f"last {SIZE} interventions; got {every!r}."
            )
        self._every, place = every, Path(directory)
        self._on_event: Listeners[[Alert]] = Listeners("on_event", on_event)
        self._on_metrics: Listeners[[int, Mapping[str, Any]]] = Listeners("on_metrics", on_metrics)
        self._audit: AuditLog | None = None
        self._log: MetricsLog | None = None
        self._next = self._last = 0  # step of the next look, and the newest
        self._asked = ""  # what was told of a guard that asks
        with contextlib.ExitStack() as opened:
            self._rollback = _manager(rollback, place, opened)
            if jax.process_index() == 0:
                place.mkdir(parents=True, exist_ok=True)
                self._audit = opened.enter_context(
                    AuditLog(place / "events.jsonl", on_event=self._on_event)
                )
                self._log = opened.enter_context(MetricsLog(place / "log.jsonl"))
            self._orders = Orders(place)
            self._opened = opened.pop_all()

    def on_restore(self, step: int, state: PyTree) -> tuple[int, PyTree]:
        """Where the run begins, or goes on: call it once before the loop.

        With rollback, ``(step, state)`` of the newest checkpoint in the directory; without, and in
        a new directory, what it is given. Without rollback call it as well whenever you have
        restored a checkpoint of your own.

        Args:
          step: updates that the state has had, 0 for a new one.
          state: freshly made, or restored by you.
        """
        find_named(state)
        if self._rollback is not None:
            resumed, state = self._rollback.resume(state)
            if step > resumed == 0:
                self._rollback.save(step, state)
            step = resumed or step
        self._read(step, state)
        return step, state

    def on_step(self, step: int, state: PyTree) -> tuple[int, PyTree]:
        """Hand in the state after `step` updates; get back what to go on with."""
        is_due = step >= self._next or step < self._last
        self._last = step
        if is_due:
            self._look(step, state)
        try:
            if self._rollback is None:
                if is_due:
                    audit.check(state)
            else:
                step, state = self._rollback.step(step, state)
        except GuardExhausted as error:
            if not is_due:
                self._look(step, state)
            if self._audit is not None:  # one process tells it for all
                tell(self._on_event, logging.ERROR, str(error), step, {"action": "exhausted"})
            raise
        if step < self._last:  # it went back
            self._look(step, state)
        state = self._orders.obey(state, step, log=self._audit, rollbacks=self._rollback)
        return step, state

    def on_save(self, step: int, state: PyTree) -> bool:
        """Call it where you save, and at the end; whether nothing speaks against this state.

        A checkpoint to go back to should be of a state of which this is True; one to resume from
        may be of any. With rollback this also writes a checkpoint, and waits for it. What the
        guard did is in the files when it returns.
        """
        self._look(step, state)
        if self._rollback is not None:
            self._rollback.save(step, state)
        said = verdict.read(verdict.begin(step, state), None)
        with_nan, _ = snapshots.look(step, state).nan_leaves()
        return said.is_calm and not with_nan

    def data_step(self, step: int) -> int:
        """Index of the batch for the update that follows `step`: after a rollback, a later one."""
        return step if self._rollback is None else self._rollback.data_step(step)

    def close(self) -> None:
        """Write what was kept back, and close the files."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _look(self, step: int, state: PyTree) -> None:
        """Write the metrics, and what is new."""
        own = {path: x._replace(inner_state=None) for path, x in find_named(state).items()}
        metrics = jax.device_get(_metrics(own))
        if self._log is not None:
            self._log(step, metrics)
            self._on_metrics(step, metrics)
        self._read(step, state)

    def _read(self, step: int, state: PyTree) -> None:
        """Write and say what is new."""
        self._next, self._last = step + self._every, step
        if self._audit is not None:
            self._audit.record(step, state)
            self._say(step, state)

    def _say(self, step: int, state: PyTree) -> None:
        """In a sentence each: what the guards do, and what one asks for that nobody answers."""
        asked, guards = "", find_named(state)
        for path, guard in guards.items():
            own = jax.device_get(guard._replace(inner_state=None))
            sentence = sentences.explain(own)
            if own.law.divergence.rollback_asked and self._rollback is None:
                asked = asked or sentence
            elif _LOG.isEnabledFor(logging.INFO):
                _LOG.info("%s%s", f"{path}: " if len(guards) > 1 else "", sentence)
        if asked and not self._asked:
            tell(self._on_event, logging.WARNING, asked, step, {"action": "asks", "step": step})
        self._asked = asked


def _manager(
    rollback: "RollbackManager | bool", place: Path, opened: contextlib.ExitStack
) -> "RollbackManager | None":
    """The manager that is asked for; one that is made here is closed here."""
    if rollback is True:
        from lbw_optax.rollback.manager import RollbackManager

        return opened.enter_context(RollbackManager(place))
    if rollback and not hasattr(rollback, "resume"):
        raise TypeError(f"rollback must be True, False or a RollbackManager, got {rollback!r}.")
    return rollback or None
