"""The last interventions, kept on the device: a ring of fixed size inside the guard's state.

At most one event is recorded a step, so whoever reads every `SIZE` steps misses none.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law.control import Action, Decision, Regime, Signal
from lbw_optax.law.divergence import Reason

SIZE = 64
# The classifier's alarm, and what it is for; a group of leaves that is frozen, and that thaws:
# recorded beside the law's decisions, and none of them.
ALARM, RISK = 100, 100
FREEZE, THAW = 101, 102
# And what a user's own signal, constraint or policy decided, told under its name.
CUSTOM = 101


class Ring(NamedTuple):
    """The newest `SIZE` events, one array a field; event i lies at i % SIZE."""

    recorded: jax.Array  # int32, events in all
    at_step: jax.Array  # int32[SIZE], call of `update`
    action: jax.Array  # int32[SIZE], an `Action`, or ALARM, FREEZE, THAW
    regime: jax.Array  # int32[SIZE], a `Regime`
    signal: jax.Array  # int32[SIZE], a `Signal`, or RISK, CUSTOM; of a rollback, a `Reason`
    signal_value: jax.Array  # float32[SIZE]; of a rollback 0
    threshold: jax.Array  # float32[SIZE]; of a rollback 0
    scale_before: jax.Array  # float32[SIZE]
    scale_after: jax.Array  # float32[SIZE]
    from_step: jax.Array  # int32[SIZE], of a rollback; of FREEZE, THAW and CUSTOM which; else 0
    to_step: jax.Array  # int32[SIZE], of a rollback; else 0
    loss: jax.Array  # float32[SIZE], the newest that was measured; 0 before


class Event(NamedTuple):
    """One intervention, as Python values.

    Attributes:
      number: running number of the event, from 0.
      step: call of `update` in which it happened, from 0.
      regime: regime after it, one of `lbw_optax.REGIMES`.
      signal: the signal that decided, a user's own by its name; of a rollback, the reason.
      value: of that signal; of a rollback None.
      threshold: for that signal; of a rollback None.
      action: "skip", "clip" (of a gradient), "cut", "recover",
        "held" (the scale has come to rest well below 1: the learning rate looks 1 / scale_after
        times too high, if the guard governs; one that observes cannot tell), "rejecting" (the share
        of rejected steps is high in the long run: value), "alarm" (a divergence within ten steps
        has the probability value), "freeze" (a group of leaves stays as it is while the rest
        trains: value is how many are frozen, threshold how many may be, signal why), "thaw" (it
        trains again) or "rollback".
      scale_before: before the step.
      scale_after: after it.
      from_step: of a rollback, the step that it left.
      to_step: of a rollback, the step that it went back to.
      guard: where a state holds several guards, the path of this one in it.
      loss: the newest that was measured; None where the guard is given none.
      group: that is frozen or thaws; else "".
    """

    number: int
    step: int
    regime: str
    signal: str
    value: float | None
    threshold: float | None
    action: str
    scale_before: float
    scale_after: float
    from_step: int | None = None
    to_step: int | None = None
    guard: str = ""
    loss: float | None = None
    group: str = ""


def init() -> Ring:
    """A ring without events."""
    whole, real = jnp.zeros([SIZE], jnp.int32), jnp.zeros([SIZE], jnp.float32)
    return Ring(
        recorded=jnp.zeros([], jnp.int32),
        at_step=whole,
        action=whole,
        regime=whole,
        signal=whole,
        signal_value=real,
        threshold=real,
        scale_before=real,
        scale_after=real,
        from_step=whole,
        to_step=whole,
        loss=real,
    )


def record(
    ring: Ring,
    step: jax.Array,
    decision: Decision,
    loss: jax.Array,
    which: jax.Array | None = None,
) -> Ring:
    """Write this step's event, if there is one.

    `which` is the number of the group that is frozen or thaws, or of the user's own signal.
    """
    return _write(
        ring,
        decision.action != Action.NONE,
        at_step=step,
        action=decision.action,
        regime=decision.regime,
        signal=decision.signal,
        signal_value=decision.value,
        threshold=decision.threshold,
        scale_before=decision.scale_before,
        scale_after=decision.scale,
        from_step=jnp.int32(0) if which is None else which,
        to_step=jnp.int32(0),
        loss=loss,
    )


def record_rollback(
    ring: Ring,
    step: jax.Array,
    *,
    reason: jax.Array,
    from_step: jax.Array,
    to_step: jax.Array,
    regime: jax.Array,
    scale_before: jax.Array,
    scale_after: jax.Array,
    loss: jax.Array,
) -> Ring:
    """Write a rollback into the ring of the state that is left, which the restored state keeps."""
    nothing = jnp.zeros([], jnp.float32)
    return _write(
        ring,
        jnp.array(True),
        at_step=step,
        action=jnp.int32(Action.ROLLBACK),
        regime=regime,
        signal=reason,
        signal_value=nothing,
        threshold=nothing,
        scale_before=scale_before,
        scale_after=scale_after,
        from_step=from_step,
        to_step=to_step,
        loss=loss,
    )


def read(ring: Ring, groups: Sequence[str] = (), custom: Sequence[str] = ()) -> list[Event]:
    """The events still in the ring, oldest first. Waits for the device.

    Args:
      ring: of one run.
      groups: the names of the groups that may be frozen.
      custom: the names of a user's own signals, constraints and policy.
    """
    ring = jax.device_get(ring)
    total = int(ring.recorded)
    events = range(max(0, total - SIZE), total)
    return [_event(ring, number, groups, custom) for number in events]


def _write(ring: Ring, happened: jax.Array, **event: jax.Array) -> Ring:
    place = ring.recorded % SIZE

    def write(field: jax.Array, x: jax.Array) -> jax.Array:
        return field.at[place].set(jnp.where(happened, x, field[place]))

    written = {name: write(getattr(ring, name), x) for name, x in event.items()}
    recorded = jnp.where(happened, optax.safe_increment(ring.recorded), ring.recorded)
    return Ring(recorded=recorded, **written)


def _event(ring: Ring, number: int, groups: Sequence[str], custom: Sequence[str]) -> Event:
    at = number % SIZE
    action = _ACTIONS[int(ring.action[at])]
    is_rollback = action == _ACTIONS[Action.ROLLBACK]
    signal = (_REASONS if is_rollback else _SIGNALS)[int(ring.signal[at])]
    if signal == _SIGNALS[CUSTOM]:
        signal = _named(ring, at, custom)
    return Event(
        number=number,
        step=int(ring.at_step[at]),
        regime=Regime(int(ring.regime[at])).name.lower(),
        signal=signal,
        value=None if is_rollback else float(ring.signal_value[at]),
        threshold=None if is_rollback else float(ring.threshold[at]),
        action=action,
        scale_before=float(ring.scale_before[at]),
        scale_after=float(ring.scale_after[at]),
        from_step=int(ring.from_step[at]) if is_rollback else None,
        to_step=int(ring.to_step[at]) if is_rollback else None,
        loss=float(ring.loss[at]),
        group=_named(ring, at, groups) if int(ring.action[at]) in (FREEZE, THAW) else "",
    )


def _named(ring: Ring, at: int, names: Sequence[str]) -> str:
    number = int(ring.from_step[at])
    return names[number] if number < len(names) else str(number)


def _names(kinds: type[enum.IntEnum]) -> dict[int, str]:
    return {kind.value: kind.name.lower() for kind in kinds}


_ACTIONS = {**_names(Action), ALARM: "alarm", FREEZE: "freeze", THAW: "thaw"}
_SIGNALS = {**_names(Signal), RISK: "risk", CUSTOM: "custom"}
_REASONS = _names(Reason)
