"""The last interventions, kept on the device: a ring of fixed size inside the guard's state.

At most one event is recorded a step, so whoever reads every `SIZE` steps misses none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law.control import ACTIONS, REGIMES, ROLLBACK, SIGNALS, Control, Decision, Evidence
from lbw_optax.law.divergence import REASONS

SIZE = 64


class Ring(NamedTuple):
    """The newest `SIZE` events, one array a field; event i lies at i % SIZE."""

    recorded: jax.Array  # int32, events in all
    at_step: jax.Array  # int32[SIZE]
    regime: jax.Array  # int32[SIZE]
    signal: jax.Array  # int32[SIZE]
    action: jax.Array  # int32[SIZE]
    signal_value: jax.Array  # float32[SIZE]
    threshold: jax.Array  # float32[SIZE]
    scale_before: jax.Array  # float32[SIZE]
    scale_after: jax.Array  # float32[SIZE]


class Event(NamedTuple):
    """One intervention, as Python values.

    Attributes:
      number: running number of the event, from 0.
      step: call of `update` in which it happened, from 0.
      regime: regime after it, one of `lbw_optax.REGIMES`.
      signal: the signal that decided; of a rollback, the reason.
      value: of that signal; of a rollback, the step that it left.
      threshold: for that signal; of a rollback, the step that it went back to.
      action: "skip", "cut", "hold" (no growth of the scale), "recover" or "rollback".
      scale_before: before the step.
      scale_after: after it.
    """

    number: int
    step: int
    regime: str
    signal: str
    value: float
    threshold: float
    action: str
    scale_before: float
    scale_after: float


def init() -> Ring:
    """A ring without events."""
    whole, real = jnp.zeros([SIZE], jnp.int32), jnp.zeros([SIZE], jnp.float32)
    return Ring(jnp.zeros([], jnp.int32), *[whole] * 4, *[real] * 4)


def record(
    ring: Ring, step: jax.Array, control: Control, evidence: Evidence, decision: Decision
) -> Ring:
    """Write this step's event, if there is one."""
    happened, place = decision.action > 0, ring.recorded % SIZE
    new = {
        "at_step": step,
        "regime": control.regime,
        "signal": evidence.signal,
        "action": decision.action,
        "signal_value": jnp.nan_to_num(evidence.value),
        "threshold": jnp.nan_to_num(evidence.threshold),
        "scale_before": decision.scale_before,
        "scale_after": decision.scale,
    }

    def write(field: jax.Array, x: jax.Array) -> jax.Array:
        return field.at[place].set(jnp.where(happened, x, field[place]))

    written = {name: write(getattr(ring, name), x) for name, x in new.items()}
    recorded = jnp.where(happened, optax.safe_increment(ring.recorded), ring.recorded)
    return Ring(recorded=recorded, **written)


def record_rollback(ring: Ring, at_step: jax.Array, event: dict[str, jax.Array]) -> Ring:
    """Write a rollback into the ring of the state that is left, which the restored state keeps."""
    place = ring.recorded % SIZE
    new = {"at_step": at_step, "action": jnp.int32(ROLLBACK), **event}
    written = {name: getattr(ring, name).at[place].set(x) for name, x in new.items()}
    return Ring(recorded=optax.safe_increment(ring.recorded), **written)


def read(ring: Ring) -> list[Event]:
    """The events still in the ring, oldest first. Waits for the device."""
    ring = jax.device_get(ring)
    total = int(ring.recorded)
    return [_event(ring, number) for number in range(max(0, total - SIZE), total)]


def _event(ring: Ring, number: int) -> Event:
    at = number % SIZE
    names = REASONS if ring.action[at] == ROLLBACK else SIGNALS
    return Event(
        number=number,
        step=int(ring.at_step[at]),
        regime=REGIMES[ring.regime[at]],
        signal=names[ring.signal[at]],
        value=float(ring.signal_value[at]),
        threshold=float(ring.threshold[at]),
        action=ACTIONS[ring.action[at]],
        scale_before=float(ring.scale_before[at]),
        scale_after=float(ring.scale_after[at]),
    )
