"""Running statistics of this run: debiased, winsorised, and closed to non-finite values.

A threshold here is `mean + k * std`. Everything is float32 and scalar.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law.telemetry import Telemetry

# A value enters at most this many standard deviations away from the mean: one outlier of any size
# moves the mean by little, and a lasting shift is accepted within a stated number of steps.
WINSOR = 3.0
# A value beyond this is taken as this: its square is still a float32.
LARGEST = 1e18


# A spike of the loss or of log |g|: this many standard deviations above the mean.
SPIKE_STDS = 6.0
# And for the gradient norm at least this factor: a quiet run's norm may well triple.
SPIKE_FACTOR = 10.0
# The first row of spikes is over when the loss is back under the threshold that it had before; or
# after so many, when the level is taken as the data's. What comes again is the data's at once.
LONGEST_ROW = 50
# Each row of jumps that comes again lets the longest gradient grow by this factor: what comes again
# and again is learned from in the end, and a few bad batches win little by it.
AGAIN = 1.2


class Memory(NamedTuple):
    """How one quantity is remembered: Python floats, fixed for each quantity.

    Attributes:
      decay: beta in [0, 1); the memory is about 1 / (1 - beta) values.
      floor: least standard deviation, in units of the quantity.
      prior: standard deviation assumed before anything was seen; it fades as beta^(n / 2).
    """

    decay: float
    floor: float
    prior: float


GRADIENT = Memory(decay=0.95, floor=0.1, prior=1.0)  # log |g|
LOSS = Memory(decay=0.9, floor=0.02, prior=1.0)  # loss over the first one
LOSS_SLOW = Memory(decay=0.97, floor=0.02, prior=1.0)  # loss over the first one
# The mean overshoot is over this share of the run, and over so many steps at least: a run's age is
# the only measure of time that a short and a long one share.
SPAN, LEAST_SPAN = 1 / 8, 8
# A logarithm of nothing.
UNKNOWN = -100.0
# Least standard deviation of an overshoot, which without noise has none.
OVERSHOOT_FLOOR = 1e-5
# The loss at the start is the mean of this many first ones: fewer are one batch's luck.
START_STEPS = 10


class Running(NamedTuple):
    """Exponentially weighted mean and variance of one quantity.

    Attributes:
      mean: debiased mean, float32.
      variance: debiased variance about that mean, float32.
      weight: 1 - decay^n after n values, float32; 0 means that nothing has been seen.
    """

    mean: jax.Array
    variance: jax.Array
    weight: jax.Array


class Overshoot(NamedTuple):
    """Mean of the overshoot over about the last eighth of the run: scalars, float32.

    Attributes:
      mean: of the cosine.
      variance: of one cosine about its mean, from the differences of neighbours: a mean that moves
        adds nothing to it.
      last: the newest cosine.
    """

    mean: jax.Array
    variance: jax.Array
    last: jax.Array


class Jumps(NamedTuple):
    """Steps whose gradient or loss jumped: scalars."""

    log_longest: jax.Array  # float32, log |g| as the optimizer was given it; UNKNOWN before one
    episodes: jax.Array  # int32, rows of them
    in_one: jax.Array  # bool, the last one was among them
    row: jax.Array  # int32, how many there are in this row
    loss_bound: jax.Array  # float32, threshold of loss / loss_unit when it began


class Statistics(NamedTuple):
    """All that the guard remembers of this run's signals."""

    gradient: Running  # of log |g|
    jumps: Jumps
    overshoot: Overshoot
    loss: Running  # of loss / loss_unit, fast
    loss_slow: Running  # of loss / loss_unit, slow: reported, and nothing decides by it
    loss_start: Running  # of loss / loss_unit, the first ones only
    loss_unit: jax.Array  # float32, |loss| of the first one that is not 0; 0 before it


def init() -> Statistics:
    """Statistics that have seen nothing."""
    zero = jnp.zeros([], jnp.float32)
    nothing = Running(zero, zero, zero)
    whole = jnp.zeros([], jnp.int32)
    jumps = Jumps(jnp.float32(UNKNOWN), whole, jnp.array(False), whole, zero)
    overshoot = Overshoot(zero, zero, zero)
    return Statistics(nothing, jumps, overshoot, nothing, nothing, nothing, zero)


def absorb(
    statistics: Statistics,
    seen: Telemetry,
    jumped: jax.Array,
    log_factor: jax.Array,
    left_out: jax.Array,
    age: jax.Array,
) -> Statistics:
    """Take the signals of one step in.

    The gradient of a step that is rejected, or limited, says nothing of the way, so its overshoot
    stays out; its norm and loss enter, winsorised, so that a lasting shift of level is accepted in
    the end.

    Args:
      statistics: of the steps before.
      seen: what this step showed.
      jumped: bool, its gradient or its loss is far above what the run has shown.
      log_factor: float32, by which the gradient was scaled back, at most 0.
      left_out: bool, the overshoot stays out.
      age: int32, steps taken since the law began, this one not counted.
    """
    loss, teaches = relative_loss(statistics, seen), has_level(seen)
    starting = statistics.loss_start.weight < 1 - LOSS.decay ** (START_STEPS - 0.5)
    log_norm = jnp.log(seen.gradient_norm)
    return Statistics(
        gradient=update(statistics.gradient, log_norm, seen.has_gradient, GRADIENT),
        jumps=_absorb_jump(statistics, jumped, log_norm + log_factor, seen.has_gradient),
        overshoot=_absorb_overshoot(
            statistics.overshoot, seen.overshoot, seen.has_overshoot & ~left_out, age
        ),
        loss=update(statistics.loss, loss, teaches, LOSS),
        loss_slow=update(statistics.loss_slow, loss, teaches, LOSS_SLOW),
        loss_start=update(statistics.loss_start, loss, teaches & starting, LOSS),
        loss_unit=loss_unit(statistics, seen),
    )


def has_level(seen: Telemetry) -> jax.Array:
    """Whether this step's loss says anything of its level.

    A batch without a target, as one whose labels are all masked, has loss 0 and gradient 0.
    """
    nothing = (seen.loss == 0) & seen.has_gradient & (seen.gradient_norm == 0)
    return seen.has_loss & ~nothing


def relative_loss(statistics: Statistics, seen: Telemetry) -> jax.Array:
    """The loss over the first one's size, within 1e18: free of the unit; 0 while all are 0."""
    unit = loss_unit(statistics, seen)
    ratio = seen.loss / jnp.where(unit > 0, unit, 1.0)
    return jnp.where(unit > 0, jnp.clip(ratio, -LARGEST, LARGEST), 0.0)


def loss_unit(statistics: Statistics, seen: Telemetry) -> jax.Array:
    """That size, this step included: |loss| of the first that is not 0, and 0 before it."""
    size = jnp.abs(seen.loss)
    measured = seen.has_loss & (size >= jnp.finfo(jnp.float32).tiny)
    first = (statistics.loss_unit == 0) & measured
    return jnp.where(first, size, statistics.loss_unit)


def update(running: Running, x: jax.Array, keep: jax.Array, memory: Memory) -> Running:
    r"""Take one value in.

    .. math::
      w_t &= \beta w_{t-1} + (1 - \beta), \qquad a_t = (1 - \beta) / w_t \\
      d_t &= \mathrm{clip}(x_t - m_{t-1}, \pm 3 s_{t-1}) \\
      m_t &= m_{t-1} + a_t d_t, \qquad v_t = (1 - a_t) (v_{t-1} + a_t d_t^2)

    Without the clip this is the exponentially weighted mean and variance of the values seen so
    far, free of a bias towards the start. With it, one outlier of any size moves the mean by at
    most 3 a_t s (0.15 s for the gradient norm, once warm, and a threshold 6 s away by at most
    1.32 s), and a lasting shift of level widens s by a constant factor a step until it is
    accepted: a gradient norm 25 times as large after at most 9 limited steps, 10^6 times after 18.
    The first value is taken as it is.

    Args:
      running: the statistic so far.
      x: the new value, scalar; a non-finite one changes nothing.
      keep: bool scalar; False leaves the statistic as it is.
      memory: how the quantity is remembered.

    Returns:
      The statistic with x in it, or unchanged.
    """
    first = running.weight == 0
    keep = keep & jnp.isfinite(x)
    weight = memory.decay * running.weight + (1 - memory.decay)
    rate = (1 - memory.decay) / weight
    limit = jnp.where(first, LARGEST, WINSOR * std(running, memory))
    x = jnp.clip(jnp.where(keep, x, running.mean), -LARGEST, LARGEST)
    step = jnp.clip(x - running.mean, -limit, limit)
    updated = Running(
        mean=running.mean + rate * step,
        variance=(1 - rate) * (running.variance + rate * jnp.square(step)),
        weight=weight,
    )
    return jax.tree.map(lambda new, old: jnp.where(keep, new, old), updated, running)


def gradient_threshold(statistics: Statistics) -> jax.Array:
    """Of log |g|: m + max(6 s, log 10)."""
    width = SPIKE_STDS * std(statistics.gradient, GRADIENT)
    return statistics.gradient.mean + jnp.maximum(width, math.log(SPIKE_FACTOR))


def loss_threshold(statistics: Statistics) -> jax.Array:
    """Of loss / loss_unit: m + 6 s, or in a first row of spikes what that was before the row."""
    now = statistics.loss.mean + SPIKE_STDS * std(statistics.loss, LOSS)
    jumps = statistics.jumps
    in_row = jumps.in_one & (jumps.row < LONGEST_ROW) & ~recur(jumps)
    return jnp.where(in_row, jnp.minimum(jumps.loss_bound, now), now)


def _absorb_jump(
    before: Statistics, jumped: jax.Array, log_given: jax.Array, keep: jax.Array
) -> Jumps:
    jumps = before.jumps
    begins = jumped & ~jumps.in_one
    updated = Jumps(
        log_longest=jnp.maximum(jumps.log_longest, log_given),
        episodes=jnp.where(begins, optax.safe_increment(jumps.episodes), jumps.episodes),
        in_one=jumped,
        row=jnp.where(jumped & ~begins, optax.safe_increment(jumps.row), jumped),
        loss_bound=jnp.where(begins, loss_threshold(before), jumps.loss_bound),
    )
    keep = keep & jnp.isfinite(log_given)
    return jax.tree.map(lambda new, old: jnp.where(keep, new, old), updated, jumps)


def recur(jumps: Jumps) -> jax.Array:
    """Whether jumps have come again: what does so is the data's."""
    return jumps.episodes > jumps.in_one


def _absorb_overshoot(
    before: Overshoot, cosine: jax.Array, keep: jax.Array, age: jax.Array
) -> Overshoot:
    r"""Take one cosine in.

    With t = age + 1 and n the number of steps that a mean is over,

    .. math::
      n &= \min(\max(t / 8, 8), \max(t - 1, 1)) \\
      m_t &= m_{t-1} + (c_t - m_{t-1}) / n, \qquad
      v_t = v_{t-1} + (\tfrac12 (c_t - c_{t-1})^2 - v_{t-1}) / n

    and v = 0 until two have been seen.
    """
    steps = (age + 1).astype(jnp.float32)
    span = jnp.minimum(jnp.maximum(SPAN * steps, LEAST_SPAN), jnp.maximum(steps - 1, 1))
    keep = keep & jnp.isfinite(cosine)
    cosine = jnp.where(keep, jnp.clip(cosine, -1.0, 1.0), before.last)
    change = 0.5 * jnp.square(cosine - before.last) - before.variance
    updated = Overshoot(
        mean=before.mean + (cosine - before.mean) / span,
        variance=jnp.where(steps < 3, 0.0, before.variance + change / span),
        last=cosine,
    )
    return jax.tree.map(lambda new, old: jnp.where(keep, new, old), updated, before)


def in_stds(overshoot: Overshoot) -> jax.Array:
    """The mean overshoot over the standard deviation of one: m / sqrt(v + floor^2)."""
    return overshoot.mean / jnp.sqrt(overshoot.variance + OVERSHOOT_FLOOR**2)


def std(running: Running, memory: Memory) -> jax.Array:
    """Standard deviation for thresholds: sqrt(v + floor^2 + prior^2 (1 - w))."""
    fading = memory.prior**2 * (1 - running.weight)
    return jnp.sqrt(running.variance + memory.floor**2 + fading)
