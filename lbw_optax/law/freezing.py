"""Which groups of leaves stay as they are in this step, while the rest trains.

A scale and a skip act on the whole model. Where one layer alone is out, that is too much: `arrive`
looks at each group's gradient before the optimizer runs, `propose` at its update before it is
applied. Both are pure functions on arrays of one entry a group; whose leaves those are is known to
:mod:`lbw_optax.groups`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbw_optax.apply import either
from lbw_optax.law import events
from lbw_optax.law import statistics as stats
from lbw_optax.law.control import Action, Decision, Signal
from lbw_optax.law.events import Ring
from lbw_optax.law.statistics import GRADIENT, SPIKE_FACTOR, SPIKE_STDS, UNKNOWN, Running
from lbw_optax.names import encoded

# No group is out alone where at least half of them have moved by this share of what makes one out:
# then it is the batch, or the rate.
MOVED = 1 / 3
# A frozen group is quiet while its gradient is within this share of what makes it out, and it thaws
# in the so many-th quiet step in a row.
CALM, QUIET_STEPS = 0.5, 3
# It thaws at this scale, whose logarithm grows by so much a step: it is 1 again after ten.
THAW, GROWTH = 0.1, 0.24


class Limits(NamedTuple):
    """The user's: Python numbers or scalars."""

    max_frozen: float  # share of the groups that may be frozen at a time, in (0, 1)
    max_steps: int  # in a row that one may be


class Freezing(NamedTuple):
    """What is remembered of G groups.

    Attributes:
      gradient_length: of log |g| of each group, float32[G].
      step_length: of log(|u| / |p|), with u as the optimizer proposes it, float32[G].
      gradient_jump: the longest log |g| of those that were out, float32[G].
      step_jump: and the longest log(|u| / |p|).
      frozen: bool[G], in the newest step.
      since: int32[G], steps that it has been as it is.
      quiet: int32[G], quiet steps in a row up to now, while it is frozen.
      cool_down: int32[G], steps to go before it may be frozen again.
      log_thaw: float32[G], of the scale of its updates after a thaw, at most 0.
      reason: int32[G], a `Signal`, why it was frozen last.
      told: bool[G], that it was frozen as far as events say.
      names: uint8[G, longest], UTF-8, so that whoever reads a state needs nothing else to know
        which layer is meant.
    """

    gradient_length: Running
    step_length: Running
    gradient_jump: jax.Array
    step_jump: jax.Array
    frozen: jax.Array
    since: jax.Array
    quiet: jax.Array
    cool_down: jax.Array
    log_thaw: jax.Array
    reason: jax.Array
    told: jax.Array
    names: jax.Array


class News(NamedTuple):
    """One group that was frozen or has thawed: scalars."""

    happened: jax.Array  # bool; False: nothing is to be told
    group: jax.Array  # int32, which
    decision: Decision  # as it is recorded
    steps_ago: jax.Array  # int32


def init(names: Sequence[str]) -> Freezing:
    """Before the first step."""
    groups = len(names)
    real, whole = jnp.zeros([groups], jnp.float32), jnp.zeros([groups], jnp.int32)
    no, nothing = jnp.zeros([groups], bool), Running(real, real, real)
    return Freezing(
        gradient_length=nothing,
        step_length=nothing,
        gradient_jump=real + UNKNOWN,
        step_jump=real + UNKNOWN,
        frozen=no,
        since=whole,
        quiet=whole,
        cool_down=whole,
        log_thaw=real,
        reason=whole,
        told=no,
        names=encoded(names),
    )


def named(state: Freezing, names: Sequence[str]) -> Freezing:
    """With these names, as many and as long: a group that had another begins anew."""
    fresh = init(names)
    same = jnp.all(state.names == fresh.names, axis=1)

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(same.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(choose, state, fresh)


def most(groups: int, limits: Limits) -> int | jax.Array:
    """How many groups may be frozen at a time: floor(max_frozen G), int32 of a traced limit."""
    share = limits.max_frozen
    if isinstance(share, jax.core.Tracer):
        return jnp.floor(share * groups + 1e-4).astype(jnp.int32)
    return math.floor(float(share) * groups + 1e-4)


def arrive(before: Freezing, squares: jax.Array, rest: jax.Array, limits: Limits) -> Freezing:
    r"""Decide by the gradients, before the optimizer sees them.

    With y = log |g| of a group and m, s its running mean and deviation, the group is out where

    .. math::
      e = \frac{y - m}{\max(6 s, \log 10)} > 1

    while fewer than half of the groups have e > 1/3, and y is ten times above the longest that was
    out before: what comes again is the group's own way, as in an expert that is seldom asked, and
    is learned from. A gradient that is not finite is out if
    those of all other groups, and of the leaves in none, are finite, and no more groups than may be
    frozen have one. What is out is frozen, unless it is cooling down; so is what was frozen, until
    its third quiet step in a row (e <= 1/2), and `max_steps` at most. Of more than `most` groups
    those farthest out are taken, first those whose gradient is not finite, then those that are
    frozen. A frozen group's own gradients go on to enter its history, winsorised: a lasting shift
    is accepted, and the group thaws.

    Args:
      before: after the step before.
      squares: float32[G], |g|^2 of each group.
      rest: float32 scalar, of the leaves that are in none.
      limits: the user's.

    Returns:
      The state in which those are frozen that are to be in this step.
    """
    finite = jnp.isfinite(squares)
    has_norm = finite & (squares > 0)
    log_norm = 0.5 * jnp.log(jnp.where(has_norm, squares, 1.0))
    excess = _excess(before.gradient_length, log_norm, has_norm)
    allowed = most(squares.size, limits)
    free = jnp.where(before.frozen, before.since < limits.max_steps, before.cool_down == 0)
    broken = ~finite
    saves = jnp.all(free | finite) & (jnp.sum(broken) <= allowed) & jnp.isfinite(rest)
    news, longest = _news(before.gradient_jump, log_norm, excess)
    out = news & _alone(excess, has_norm & ~before.frozen)
    quiet = jnp.where(before.frozen & finite & (excess <= CALM), before.quiet + 1, 0)
    stays = before.frozen & (before.since < limits.max_steps) & (quiet < QUIET_STEPS)
    wanted = stays | (free & ~before.frozen & ((broken & saves) | out))
    # In (0, 1) for what is newly out; those of a step that only freezing saves come first.
    urgency = jnp.where(stays, 1.0, _share(excess)) + 2.0 * (broken & saves)
    frozen = _first(wanted | (broken & saves), urgency, allowed)
    reason = jnp.where(broken, Signal.NONFINITE_GRADIENTS, Signal.GRADIENT_NORM)
    thaws = before.frozen & ~frozen
    grown = jnp.minimum(before.log_thaw + GROWTH, 0.0)
    return before._replace(
        gradient_length=stats.update(before.gradient_length, log_norm, has_norm, GRADIENT),
        gradient_jump=longest,
        frozen=frozen,
        since=jnp.where(frozen == before.frozen, optax.safe_increment(before.since), 1),
        quiet=jnp.where(frozen, quiet, 0),
        # As long as it was frozen: no group is for more than half of the time.
        cool_down=jnp.where(thaws, before.since, jnp.maximum(before.cool_down - 1, 0)),
        log_thaw=jnp.where(thaws, math.log(THAW), jnp.where(frozen, before.log_thaw, grown)).astype(
            jnp.float32
        ),
        reason=jnp.where(frozen & ~before.frozen, reason, before.reason).astype(jnp.int32),
    )


def propose(
    state: Freezing,
    gradients: jax.Array,
    updates: jax.Array,
    params: jax.Array,
    refused: jax.Array,
    limits: Limits,
) -> Freezing:
    r"""Freeze those whose relative step is out, too, before the updates are applied.

    As `arrive`, with :math:`y = \log(|u| / |p|)` and, for e, the scale after a thaw in it; for what
    room is left. A step of a group that has no gradient is what momentum and decay leave, and says
    nothing of the next one that has.

    Args:
      state: of `arrive`.
      gradients: float32[G], |g|^2 of each group, as `arrive` had it.
      updates: float32[G], |u|^2 of each group, as the optimizer proposes it.
      params: float32[G], |p|^2.
      refused: bool scalar, the gradient was; then there is no step.
      limits: the user's.
    """
    ratio = updates / jnp.where(params > 0, params, 1.0)
    measured = jnp.isfinite(ratio) & (ratio > 0) & (params > 0) & ~state.frozen & ~refused
    measured &= gradients != 0
    log_step = 0.5 * jnp.log(jnp.where(measured, ratio, 1.0))
    excess = _excess(state.step_length, log_step + state.log_thaw, measured)
    news, longest = _news(state.step_jump, log_step + state.log_thaw, excess)
    out = news & _alone(excess, measured) & (state.cool_down == 0)
    room = jnp.maximum(most(updates.size, limits) - jnp.sum(state.frozen), 0)
    begins = _first(out, _share(excess), room)
    return state._replace(
        step_length=stats.update(state.step_length, log_step, measured, GRADIENT),
        step_jump=longest,
        frozen=state.frozen | begins,
        since=jnp.where(begins, 1, state.since),
        reason=jnp.where(begins, Signal.RELATIVE_STEP, state.reason).astype(jnp.int32),
    )


def tell(state: Freezing, decision: Decision, limits: Limits) -> tuple[Freezing, News]:
    """One group a step is told, where the step has no other event; the others wait.

    Args:
      state: after this step.
      decision: what is to be recorded of it.
      limits: the user's.
    """
    begun, ended = state.frozen & ~state.told, state.told & ~state.frozen
    freezes = jnp.any(begun)
    group = jnp.argmax(jnp.where(freezes, begun, ended)).astype(jnp.int32)
    happened = (decision.action == Action.NONE) & (freezes | jnp.any(ended))
    news = decision._replace(
        action=jnp.where(freezes, jnp.int32(events.FREEZE), jnp.int32(events.THAW)),
        signal=state.reason[group],
        value=jnp.sum(state.frozen).astype(jnp.float32),
        threshold=jnp.float32(most(state.frozen.size, limits)),
    )
    is_told = happened & (jnp.arange(state.frozen.size) == group)
    told = jnp.where(is_told, state.frozen, state.told)
    recorded = Decision(*either(happened, news, decision))
    steps_ago = jnp.where(happened, state.since[group] - 1, 0)
    return state._replace(told=told), News(happened, group, recorded, steps_ago)


def record(
    ring: Ring, step: jax.Array, news: News, loss: jax.Array, which: jax.Array | None = None
) -> Ring:
    """Write what happened into the events; news of a group stand at the step that they are of.

    `which` is what is told instead where there are no news of a group.
    """
    which = jnp.where(news.happened, news.group, 0 if which is None else which)
    return events.record(ring, step - news.steps_ago, news.decision, loss, which)


def _excess(known: Running, y: jax.Array, measured: jax.Array) -> jax.Array:
    """How far above its own history, in units of what is out; 0 where nothing is known."""
    limit = jnp.maximum(SPIKE_STDS * stats.std(known, GRADIENT), math.log(SPIKE_FACTOR))
    return jnp.where(measured & (known.weight > 0), (y - known.mean) / limit, 0.0)


def _news(longest: jax.Array, y: jax.Array, excess: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether it is out, and by far the longest that ever was; and the longest with it."""
    out = excess > 1
    return out & (y > longest + math.log(SPIKE_FACTOR)), jnp.where(
        out, jnp.maximum(longest, y), longest
    )


def _alone(excess: jax.Array, counts: jax.Array) -> jax.Array:
    """Whether fewer than half of those that count have moved: it is not all of them."""
    return 2 * jnp.sum(counts & (excess > MOVED)) < jnp.sum(counts)


def _share(excess: jax.Array) -> jax.Array:
    """Into [0, 1), in the same order."""
    above = jnp.maximum(excess, 0.0)
    return above / (1 + above)


def _first(wanted: jax.Array, urgency: jax.Array, count: int | jax.Array) -> jax.Array:
    """Of those wanted the so many most urgent; of equal ones the first."""
    urgency, place = jnp.where(wanted, urgency, -1.0), np.arange(wanted.size)
    own, other = urgency[:, None], urgency[None, :]
    before = (other > own) | ((other == own) & (place[None, :] < place[:, None]))
    return wanted & (jnp.sum(before, axis=1) < count)
