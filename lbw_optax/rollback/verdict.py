"""What the guards say of one step: packed into one small array, and read a step later.

The worst of all guards, devices and processes counts, so that all processes act alike.
"""

from collections.abc import Collection
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.law.divergence import Reason, is_suspected
from lbw_optax.rollback.agreement import is_one_a_device, largest
from lbw_optax.state import GuardState, Mode, find_all
from lbw_optax.types import PyTree

# What the guard may ask for; broken parameters are always answered.
ASKS = ("parameters", "inner_state", "skips", "loss")
# Copies of the guard's state are the same while log(scale) and log(loss) differ by less than this:
# the last bits may differ between machines.
TOLERANCE = 1e-3
# Fixed point for the two: int32 holds any logarithm of a float32.
_UNIT = 1e-5

Number = TypeVar("Number")  # an array on the device, a Python int on the host


class Numbers(NamedTuple, Generic[Number]):
    """What is packed, int32 each, in this order.

    Attributes:
      asked: a `Reason`, the most certain of all guards: those are the first, so the number of
        reasons less its own is packed, or 0 for none.
      guard_steps: updates that the guards have seen, the most.
      calm_steps: steps since a skip or a jump of the loss, the fewest.
      suspected: whether the loss is above its level anywhere.
      broken: whether the parameters that went into the step were.
      exhausted: whether a guard that governs can do no more.
      governs: whether any guard does.
      requested: whether a person asks for a rollback.
      step, least_step: that the processes hand in.
      saved_alone: whether a process has saved by hand and the others have not.
      scale, least_scale: mean log(scale), in units of 1e-5.
      loss, least_loss: mean log abs(loss), in units of 1e-5.
      skips, least_skips: of all guards together.
      time_is_up, is_writing, copy_every: as `Facts` says.
    """

    asked: Number
    guard_steps: Number
    calm_steps: Number
    suspected: Number
    broken: Number
    exhausted: Number
    governs: Number
    requested: Number
    step: Number
    least_step: Number
    saved_alone: Number
    scale: Number
    least_scale: Number
    loss: Number
    least_loss: Number
    skips: Number
    least_skips: Number
    time_is_up: Number
    is_writing: Number
    copy_every: Number


_LEAST = ("calm_steps", "least_step", "least_scale", "least_loss", "least_skips")


class Facts(NamedTuple):
    """What each process knows by itself; the largest goes for all.

    Attributes:
      time_is_up: whether the next checkpoint is due by its clock.
      is_writing: whether its part of the newest checkpoint is still being written.
      copy_every: steps between copies in memory that it would choose, 0 for none yet.
    """

    time_is_up: bool = False
    is_writing: bool = False
    copy_every: int = 0


class Report(NamedTuple):
    """A verdict on its way to the host."""

    step: int
    numbers: jax.Array


class Verdict(NamedTuple):
    """What was said of one step.

    Attributes:
      step: the step.
      asked: a `Reason`, 0 for none.
      guard_steps: updates that the guards have seen.
      troubled: a step since the verdict before was skipped, or the loss jumped.
      suspected: the loss is above its level.
      broken: the parameters of the step before are not finite, or jumped.
      exhausted: a guard that governs can do no more.
      governs: whether a guard does.
      requested: a person asks for a rollback.
      differs: the copies of the guard's state are not the same.
      saved_alone: a process has saved by hand and the others have not.
      complaint: what is wrong with the calls of the processes, or "".
      facts: of all processes, as they were before copies of this step were taken.
    """

    step: int
    asked: int
    guard_steps: int
    troubled: bool
    suspected: bool
    broken: bool
    exhausted: bool
    governs: bool
    requested: bool
    differs: bool
    saved_alone: bool
    complaint: str
    facts: Facts = Facts()

    @property
    def is_trouble(self) -> bool:
        return bool(self.asked) or self.troubled

    @property
    def is_calm(self) -> bool:
        return not (self.is_trouble or self.suspected)

    def proves(self, step: int, probation: int) -> bool:
        """Whether a state of that step has come through its probation; trouble would have shown."""
        return self.is_calm and self.step >= step + probation


def begin(
    step: int,
    tree: PyTree,
    *,
    requested: bool = False,
    saved_alone: bool = False,
    replicas: bool = False,
    facts: Facts | None = None,
) -> Report:
    """Pack what the guards in a state say, and start its way to the host. Does not wait.

    Args:
      step: that is handed in.
      tree: the state.
      requested: whether a person asks for a rollback.
      saved_alone: whether `save` was called on this process only.
      replicas: whether a state that is several in one, one on each device, is to be the same in
        all of them.
      facts: what this process knows.
    """
    guards = find_all(tree)
    compares = replicas and is_one_a_device(guards[0].guard_steps)
    call = _Call(requested, step % 2**31, saved_alone, compares, *(facts or Facts()))
    numbers = largest(_pack([_parts(guard) for guard in guards], np.array(call, np.int32)))
    numbers.copy_to_host_async()
    return Report(step, numbers)


def read(report: Report, guard_steps: int | None) -> Verdict:
    """The verdict, `guard_steps` being those of the verdict before; None for the first."""
    packed = Numbers[int](*np.asarray(report.numbers).tolist())
    said = packed._replace(**{name: -getattr(packed, name) for name in _LEAST})
    # Without one before it, of the newest update, if there was any.
    updates = min(said.guard_steps, 1) if guard_steps is None else said.guard_steps - guard_steps
    apart = max(said.scale - said.least_scale, said.loss - said.least_loss)
    return Verdict(
        step=report.step,
        asked=len(Reason) - said.asked if said.asked else 0,
        guard_steps=said.guard_steps,
        troubled=said.calm_steps < updates,
        suspected=bool(said.suspected),
        broken=bool(said.broken),
        exhausted=bool(said.exhausted),
        governs=bool(said.governs),
        requested=bool(said.requested),
        differs=apart * _UNIT > TOLERANCE or said.skips != said.least_skips,
        saved_alone=bool(said.saved_alone),
        complaint=_complain(said),
        facts=Facts(bool(said.time_is_up), bool(said.is_writing), said.copy_every),
    )


def reasons_of(names: Collection[str]) -> frozenset[str]:
    """The reasons that are answered, as a user has named them.

    Raises:
      ValueError: for a name that is none.
    """
    is_some = isinstance(names, Collection) and not isinstance(names, str)
    given = tuple(names) if is_some else ()
    if not is_some or any(name not in ASKS for name in given):
        raise ValueError(
            f"reasons must be a collection of names out of {ASKS}, got {names!r}: leave out "
            "what is not to be answered."
        )
    return frozenset({*given, "parameters"})


class _Call(NamedTuple):
    """What the host says with each call, in one transfer; int32 each."""

    requested: Any
    step: Any
    saved_alone: Any
    compares: Any
    time_is_up: Any
    is_writing: Any
    copy_every: Any


def _parts(guard: GuardState) -> dict[str, jax.Array]:
    """What is read of one guard."""
    return {
        "asked": guard.law.divergence.rollback_asked,
        "guard_steps": guard.guard_steps,
        "calm_steps": guard.law.control.calm_steps,
        "suspected": is_suspected(guard.law.divergence),
        "broken": guard.telemetry.parameters_broken,
        "exhausted": guard.law.control.exhausted,
        "mode": guard.mode,
        "log_scale": guard.law.control.log_scale,
        "loss": guard.telemetry.loss,
        "skips": guard.law.control.skips,
    }


@jax.jit
def _pack(guards: list[dict[str, jax.Array]], call: jax.Array) -> jax.Array:
    """As int32 of which the largest counts: where the least does, the negative is packed."""
    seen = {name: jnp.stack([guard[name] for guard in guards]) for name in guards[0]}
    governs, host = seen["mode"] == Mode.GOVERN, _Call(*call)
    scale, least_scale = _range(_fixed(seen["log_scale"]), host.compares)
    loss, least_loss = _range(_fixed(_log_of(seen["loss"])), host.compares)
    skips, least_skips = _range(seen["skips"].sum(0), host.compares)
    numbers = Numbers(
        asked=jnp.where(seen["asked"] > 0, len(Reason) - seen["asked"], 0).max(),
        guard_steps=seen["guard_steps"].max(),
        calm_steps=seen["calm_steps"].min(),
        suspected=seen["suspected"].any(),
        broken=seen["broken"].any(),
        exhausted=(seen["exhausted"] & governs).any(),
        governs=governs.any(),
        requested=host.requested,
        step=host.step,
        least_step=host.step,
        saved_alone=host.saved_alone,
        scale=scale,
        least_scale=least_scale,
        loss=loss,
        least_loss=least_loss,
        skips=skips,
        least_skips=least_skips,
        time_is_up=host.time_is_up,
        is_writing=host.is_writing,
        copy_every=host.copy_every,
    )
    signed = numbers._replace(**{name: -getattr(numbers, name) for name in _LEAST})
    return jnp.stack([x.astype(jnp.int32) for x in signed])


def _log_of(loss: jax.Array) -> jax.Array:
    size = jnp.abs(loss.astype(jnp.float32))
    return jnp.log(jnp.maximum(size, jnp.finfo(jnp.float32).tiny))


def _range(x: jax.Array, compares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most and the least of several runs in one; where they may differ, one number for all."""
    whole = x.sum() if jnp.issubdtype(x.dtype, jnp.integer) else jnp.round(x.mean())
    return jnp.where(compares, x.max(), whole), jnp.where(compares, x.min(), whole)


def _fixed(logs: jax.Array) -> jax.Array:
    """The mean over guards in fixed point; not a number counts as 1e4, which no logarithm is."""
    mean = jnp.mean(logs.astype(jnp.float32), axis=0)
    mean = jnp.nan_to_num(mean, nan=1e4, posinf=1e4, neginf=-1e4)
    return jnp.round(mean / _UNIT)


def _complain(said: Numbers[int]) -> str:
    if said.step != said.least_step:
        return (
            f"The processes hand in different steps ({said.least_step} to {said.step}): make the "
            "same calls on all of them"
        )
    return ""
