"""A user's own signals, constraints and policy, inside the bounds of the guard.

A signal that jumps, or a constraint that is broken, counts as a jump of the loss does: in this step
the gradient is scaled back to a tenth, and the scale does not grow until the run has been calm. A
policy may shorten a step. None of them can end a run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.apply import either
from lbw_optax.law import events
from lbw_optax.law import statistics as stats
from lbw_optax.law.classifier import Risk
from lbw_optax.law.control import Action, Bounds, Decision, Signal
from lbw_optax.law.statistics import LOSS, SPIKE_STDS, Running
from lbw_optax.names import encoded
from lbw_optax.types import PyTree

# Each acts in so many steps; one is earned back in ten.
MOST, EARNED = 10.0, 0.1
# A policy shortens a step to this share of the law's at the least.
LEAST_SHARE = 0.1


class Step(NamedTuple):
    """What a signal or a constraint is given; all of it may be traced.

    Attributes:
      loss: float32 scalar, the newest that was measured; 0 before one.
      gradients: as `update` was given them.
      params: likewise, None if it was not.
      extra: the other keywords of `update`, by their names.
    """

    loss: jax.Array
    gradients: PyTree
    params: PyTree
    extra: Mapping[str, Any]


Measure = Callable[[Step], Any]
Policy = Callable[[jax.Array, jax.Array, Bounds], Any]


class Custom(NamedTuple):
    """A user's functions; `lbw_guard` has looked at them."""

    signals: Mapping[str, Measure]
    constraints: Mapping[str, Measure]
    policy: Policy | None

    @property
    def names(self) -> list[str]:
        """In the order of the state: signals, constraints, policy."""
        return [*self.signals, *self.constraints, *(["policy"] if self.policy else [])]


class Watched(NamedTuple):
    """What is remembered of S signals and C constraints.

    Attributes:
      level: of each signal over its unit, float32[S].
      unit: size of each signal's first value that is not 0, float32[S]; 0 before it.
      broken: bool[S + C], in the newest step: it jumped or is not finite, or does not hold.
      spent: float32[S + C], steps in which it acted and that are not earned back.
      share: float32 scalar, what the policy left of the newest step; 1 without one.
      names: uint8[N, longest], UTF-8, of signals, constraints and policy.
    """

    level: Running
    unit: jax.Array
    broken: jax.Array
    spent: jax.Array
    share: jax.Array
    names: jax.Array


class Noticed(NamedTuple):
    """What they say of one step: scalars."""

    acts: jax.Array  # bool
    number: jax.Array  # int32, which of them is told
    value: jax.Array  # float32, of that signal; of a constraint 1
    threshold: jax.Array  # float32, for that signal; of a constraint 0


def init(custom: Custom) -> Watched:
    """Before the first step."""
    signals = len(custom.signals)
    zero = jnp.zeros([signals], jnp.float32)
    both = signals + len(custom.constraints)
    return Watched(
        level=Running(zero, zero, zero),
        unit=zero,
        broken=jnp.zeros([both], bool),
        spent=jnp.zeros([both], jnp.float32),
        share=jnp.ones([], jnp.float32),
        names=encoded(custom.names),
    )


def look(custom: Custom, before: Watched | tuple[()], step: Step) -> tuple[Watched, Noticed]:
    r"""Ask signals and constraints, before the optimizer runs.

    With x a signal over the size of its first value, and m, s its running mean and deviation over
    about ten steps, winsorised as the loss is, it jumps where

    .. math::
      x > m + 6 s

    or is not finite. Each acts in ten steps at most that are not earned back, one in ten steps.

    Raises:
      ValueError: if a function gives no scalar, or the state was made for others.
    """
    before = _require(custom, before)
    x = _stacked(custom.signals, step)
    holds = _stacked(custom.constraints, step) != 0
    finite = jnp.isfinite(x)
    first = (before.unit == 0) & finite & (x != 0)
    unit = jnp.where(first, jnp.abs(x), before.unit)
    y = jnp.where(finite & (unit > 0), x / jnp.where(unit > 0, unit, 1.0), 0.0)
    threshold = before.level.mean + SPIKE_STDS * stats.std(before.level, LOSS)
    jumps = ~finite | ((before.level.weight > 0) & (y > threshold))
    broken = jnp.concatenate([jumps, ~holds])
    acting = broken & (before.spent <= MOST - 1)
    number = jnp.argmax(acting).astype(jnp.int32) if broken.size else jnp.int32(0)
    one, zero = jnp.ones_like(holds, jnp.float32), jnp.zeros_like(holds, jnp.float32)
    values = jnp.concatenate([jnp.nan_to_num(x), one, jnp.zeros([1])])
    thresholds = jnp.concatenate([threshold * unit, zero, jnp.zeros([1])])
    after = before._replace(
        level=stats.update(before.level, y, finite & (unit > 0), LOSS),
        unit=unit,
        broken=broken,
        spent=jnp.maximum(before.spent + jnp.where(acting, 1.0, -EARNED), 0.0),
    )
    return after, Noticed(jnp.any(acting), number, values[number], thresholds[number])


def shorten(
    custom: Custom, watched: Watched, risk: Risk, decision: Decision, bounds: Bounds
) -> tuple[Watched, Decision]:
    """Ask the policy, and shorten the step: to a tenth at the least, and not below `min_scale`.

    Raises:
      ValueError: if it gives no scalar.
    """
    if custom.policy is None:
        return watched, decision
    wanted = _scalar("policy", custom.policy(risk.soon, risk.kinds, bounds))
    share = jnp.clip(jnp.where(jnp.isfinite(wanted), wanted, 1.0), LEAST_SHARE, 1.0)
    scale = jnp.minimum(decision.scale, jnp.maximum(decision.scale * share, bounds.min_scale))
    return watched._replace(share=share), decision._replace(scale=scale)


def tell(
    before: Watched | tuple[()], after: Watched, noticed: Noticed, decision: Decision
) -> tuple[Decision, jax.Array]:
    """The decision as it is recorded, and the number of what decided, in the state's names.

    What a user's own signal or constraint did is told under its name, where the law itself had no
    other reason; and so is a policy that begins to shorten steps, where nothing else is told.
    """
    own = (decision.action == Action.CLIP) & noticed.acts & (decision.signal == Signal.LOSS)
    assert isinstance(before, Watched)
    begins = (after.share < 1) & (before.share == 1) & (decision.action == Action.NONE)
    named = decision._replace(
        signal=jnp.int32(events.CUSTOM), value=noticed.value, threshold=noticed.threshold
    )
    shortened = decision._replace(
        action=jnp.int32(Action.CUT),
        signal=jnp.int32(events.CUSTOM),
        value=after.share,
        threshold=jnp.float32(1),
    )
    told = Decision(*either(own, named, Decision(*either(begins, shortened, decision))))
    # The policy's name is the last.
    number = jnp.where(own, noticed.number, jnp.where(begins, after.broken.size, 0))
    return told, number.astype(jnp.int32)


def _require(custom: Custom, state: Watched | tuple[()]) -> Watched:
    wanted = init(custom)
    if isinstance(state, Watched) and _shapes(state) == _shapes(wanted):
        return state._replace(names=wanted.names)
    raise ValueError(
        f"This guard has {custom.names}, and this state was made with other signals or "
        "constraints: make it with tx.init of this optimizer, or keep the optimizer's own, "
        "lbw_optax.adopt(tx.init(params), lbw_optax.strip(state))."
    )


def _shapes(state: Watched) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(state)]


def _stacked(functions: Mapping[str, Measure], step: Step) -> jax.Array:
    found = [_scalar(name, fn(step)) for name, fn in functions.items()]
    return jnp.stack(found) if found else jnp.zeros([0], jnp.float32)


def _scalar(name: str, x: Any) -> jax.Array:
    if jnp.ndim(x) == 0 and any(jnp.issubdtype(jnp.asarray(x).dtype, kind) for kind in _KINDS):
        return jnp.asarray(x).astype(jnp.float32)
    raise ValueError(f"{name!r} must give one number or bool a step, got {x!r}.")


_KINDS = (jnp.bool_, jnp.integer, jnp.floating)
