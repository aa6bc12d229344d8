"""When skipping and scaling are not enough: the guard asks to go back to an earlier state.

`assess` is a pure function on scalars. Certain signs ask within two steps; uncertain ones need
evidence of several, and none within a grace after a rollback. What asks stays asked until
somebody answers (:class:`lbw_optax.RollbackManager`, or :func:`lbw_optax.reset`); a certain sign
takes the place of an uncertain one. Nothing here depends on the unit of the loss.
"""

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import statistics as stats
from lbw_optax.law.control import BROKEN_STATE, Signal, first_of
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Telemetry


class Reason(enum.IntEnum):
    """Why a rollback is asked for, the most certain first."""

    NONE = 0
    PARAMETERS = 1  # not finite, or far longer than a step can make them
    INNER_STATE = 2  # it makes broken updates out of sound gradients
    SKIPS = 3  # too many in a row
    LOSS = 4  # it has risen, and stays there
    REQUEST = 5  # the host's


# These never end a run, for it may be sound.
UNCERTAIN = (Reason.SKIPS, Reason.LOSS)

# Steps in a row that make broken updates out of sound gradients: one may be an overflow.
INNER_STEPS = 2
# Skips in a row, of any kind. Skipping keeps the state whole and costs a step each time; when that
# has come to what a rollback costs, the state is suspected.
SKIP_STEPS = 20
# A broken first gradient cannot be told from a sound one, and an inner state remembers it: the
# longest of so many first ones is known by the longest of so many next ones, which is shorter by
# this power of SPIKE_FACTOR. One shorter gradient alone says nothing where batches' weights differ.
FIRST_STEPS, NEXT_STEPS, FIRST_POWER = 2, 8, 2.0
# The loss (see `_watch_loss`): margin above its lowest mean, in standard deviations,
MARGIN_STDS = 3.0
# which are at least this share of its level and of how far it has fallen,
LEAST_STD = 0.02
# the share of the margin by which the lowest mean is forgotten in a step: what rises by less in
# the fifty steps of a rollback cannot be undone by one,
FORGOTTEN = 0.02
# evidence of one step at least and at most, so that no single batch asks,
LEAST_EVIDENCE, MOST_EVIDENCE = -1.0, 2.0
# and evidence that asks.
ENOUGH_EVIDENCE = 7.0
# The autocorrelation of the loss's noise (see `_autocorrelate`): share of the newest step in it;
# slow, so that a rise of the loss does not pass for noise before it has asked.
AUTOCORRELATION_SHARE = 0.01
# How far an innovation counts in it, in standard deviations.
FARTHEST = 3.0
# The most that is believed: above it hardly any rise would stand out.
MOST_AUTOCORRELATION = 0.6
# Its standard error where the noise is independent.
AUTOCORRELATION_ERROR = math.sqrt(AUTOCORRELATION_SHARE / (2 - AUTOCORRELATION_SHARE))
# Sound steps after a rollback in which only certain signs ask, and the level of the loss is learned
# anew: a lasting shift of the data's level asks once.
GRACE = 10
# A rise that is there again in the first losses after the rollback, this many, is the data's or the
# objective's: the state was sound, and only a divergence would have to come about again. There
# again is what has come back by more than this share.
RETURN_STEPS, RETURN_SHARE = 3, 0.5
# From then on only a rise of this many times its size asks.
TOLERANCE = 5.0
# So is one that comes about again in the steps after the rollback, this many, and slowly: in more
# steps than these, as with an objective that rises as the run learns. A sudden one, as of another
# fault, is not, until the run was left for it so often.
RETURN_WITHIN, SUDDEN, OFTEN = 300, 5, 2
# After a rollback the scale stays under this share of what it was, for so many steps.
CEILING, CEILING_STEPS = 0.5, 20
# Least standard deviation at all, over the size of the first loss.
TINY = 1e-12
# The newest losses, in which the risen level shows: share of the newest.
RECENT_SHARE = 0.5


class Divergence(NamedTuple):
    """What speaks for a rollback: scalars."""

    rollback_asked: jax.Array  # int32, a `Reason`; NONE: nobody asks
    inner_steps: jax.Array  # int32, in a row: sound gradients, broken updates
    loss_excess: jax.Array  # float32, evidence that the loss has risen for good
    level: Running  # of loss / loss_unit since the start or the last rollback
    innovation: Running  # of loss / loss_unit less the level before it
    lowest: jax.Array  # float32, the lowest mean of the level
    recent: jax.Array  # float32, the mean of the last few losses, in their unit
    last_innovation: jax.Array  # float32, in standard deviations
    autocorrelation: jax.Array  # float32, of an innovation with the one before it
    quiet_std: jax.Array  # float32, of the loss's noise before the loss rose
    grace: jax.Array  # int32, sound steps to go
    tolerance: jax.Array  # float32, a rise of the loss by so much, in its unit, is the data's
    left_lowest: jax.Array  # float32, of the run that was left for its loss, lest it was the data's
    left_recent: jax.Array  # float32, likewise
    left_times: jax.Array  # int32, rollbacks for the loss in a row
    steps_since: jax.Array  # int32, losses since then, up to `RETURN_WITHIN`
    rising_steps: jax.Array  # int32, losses since the evidence was none
    first_gradients: "FirstGradients"


class FirstGradients(NamedTuple):
    """How long the first gradients of a run are: scalars."""

    seen: jax.Array  # int32, up to FIRST_STEPS + NEXT_STEPS
    first: jax.Array  # float32, log of the longest of the first ones
    next: jax.Array  # float32, log of the longest of the next ones


def init() -> Divergence:
    """Nothing speaks for a rollback, nothing is known of the loss."""
    whole, real = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
    nothing = Running(real, real, real)
    return Divergence(
        rollback_asked=whole,
        inner_steps=whole,
        loss_excess=real,
        level=nothing,
        innovation=nothing,
        last_innovation=real,
        autocorrelation=real,
        lowest=jnp.float32(stats.LARGEST),
        recent=real,
        quiet_std=jnp.float32(stats.LOSS.floor),
        grace=whole,
        tolerance=real,
        left_lowest=real,
        left_recent=real,
        left_times=whole,
        steps_since=whole,
        rising_steps=whole,
        first_gradients=FirstGradients(
            whole, jnp.float32(stats.UNKNOWN), jnp.float32(stats.UNKNOWN)
        ),
    )


def after_rollback(divergence: Divergence, left: "Left | None" = None) -> Divergence:
    """Nothing speaks for another one yet; what is known of the data stays known.

    Args:
      divergence: of the state that is gone on from.
      left: what is known of the loss of the run that was left, if that was another state.
    """
    left = left or Left(divergence.tolerance, jnp.float32(0), jnp.float32(0), jnp.int32(0))
    return init()._replace(
        autocorrelation=divergence.autocorrelation,
        grace=jnp.int32(GRACE),
        tolerance=left.tolerance,
        left_lowest=left.lowest,
        left_recent=left.recent,
        left_times=left.times,
        first_gradients=divergence.first_gradients._replace(
            seen=jnp.int32(FIRST_STEPS + NEXT_STEPS)
        ),
    )


class Left(NamedTuple):
    """The loss of a run that was left, in its own numbers; both levels are 0 if it was not why."""

    tolerance: jax.Array
    lowest: jax.Array
    recent: jax.Array
    times: jax.Array


def leave(divergence: Divergence, unit: jax.Array) -> Left:
    """What is known of the loss of a run that is left for an earlier state.

    Args:
      divergence: of that run.
      unit: of its loss, as `Statistics.loss_unit`.
    """
    rose = divergence.rollback_asked == Reason.LOSS
    of_late = divergence.steps_since < RETURN_WITHIN
    return Left(
        divergence.tolerance,
        jnp.where(rose, _finite(divergence.lowest * unit), 0.0),
        jnp.where(rose, _finite(divergence.recent * unit), 0.0),
        jnp.where(rose, jnp.where(of_late, divergence.left_times, 0) + 1, 0),
    )


def assess(
    divergence: Divergence,
    seen: Telemetry,
    before: Statistics,
    rejected: jax.Array,
    skips_in_a_row: jax.Array,
) -> Divergence:
    """Take the signals of one step in.

    Args:
      divergence: before the step.
      seen: what the step showed.
      before: of the steps before it.
      rejected: int32, a `Signal`, why the step must not be applied, or NONE.
      skips_in_a_row: int32, this step included.
    """
    sound, in_grace = rejected == Signal.NONE, divergence.grace > 0
    broken = (rejected == BROKEN_STATE[0]) | (rejected == BROKEN_STATE[1])
    # A skip of another kind neither counts nor ends the row.
    inner = jnp.where(broken, optax.safe_increment(divergence.inner_steps), divergence.inner_steps)
    inner = jnp.where(sound, 0, inner)
    watched = _watch_loss(divergence, seen, before, in_grace)
    first_gradients, first_was_broken = _compare_first(divergence.first_gradients, seen)
    sign = first_of(
        (seen.parameters_broken, Reason.PARAMETERS),
        ((inner >= INNER_STEPS) | first_was_broken, Reason.INNER_STATE),
        (~in_grace & (skips_in_a_row >= SKIP_STEPS), Reason.SKIPS),
        (watched.loss_excess >= ENOUGH_EVIDENCE, Reason.LOSS),
        otherwise=Reason.NONE,
    )
    asked = divergence.rollback_asked
    # The first reason stays, but for a more certain one: those come first.
    stays = (asked > 0) & ((sign == 0) | (asked <= sign))
    return watched._replace(
        rollback_asked=jnp.where(stays, asked, sign),
        inner_steps=inner,
        grace=jnp.where(in_grace & sound, divergence.grace - 1, divergence.grace),
        first_gradients=first_gradients,
    )


@jax.jit  # called of concrete states after every step
def is_suspected(divergence: Divergence) -> jax.Array:
    """Whether something speaks against the state, if not enough to ask for another."""
    first, after, fewest = divergence.first_gradients, FIRST_STEPS + NEXT_STEPS, FIRST_STEPS
    pending = (first.seen > fewest) & (first.seen < after)
    return (divergence.loss_excess > 0) | (pending & _fell(first))


def _compare_first(before: FirstGradients, seen: Telemetry) -> tuple[FirstGradients, jax.Array]:
    """The longest of the first gradients and of the next ones, and whether the first was broken."""
    counts = seen.has_gradient & (seen.gradient_norm > 0) & (before.seen < FIRST_STEPS + NEXT_STEPS)
    log_norm = jnp.log(jnp.where(counts, seen.gradient_norm, 1.0))
    is_first = before.seen < FIRST_STEPS
    after = FirstGradients(
        before.seen + counts,
        jnp.where(counts & is_first, jnp.maximum(before.first, log_norm), before.first),
        jnp.where(counts & ~is_first, jnp.maximum(before.next, log_norm), before.next),
    )
    told = counts & (after.seen == FIRST_STEPS + NEXT_STEPS)
    return after, told & _fell(after)


def _fell(gradients: FirstGradients) -> jax.Array:
    return gradients.first - gradients.next > FIRST_POWER * math.log(stats.SPIKE_FACTOR)


def _watch_loss(
    divergence: Divergence, seen: Telemetry, before: Statistics, in_grace: jax.Array
) -> Divergence:
    r"""Page's test (CUSUM) for a loss that has risen above its lowest mean and stays there.

    With y the loss over the size of the first one, l its fast mean, l* the lowest l of late, σ the
    standard deviation of the innovation y_t - l_{t-1} before the loss rose, y_0 the mean of the
    first losses, ρ the correlation of an innovation with the one before it, less its standard
    error, in [0, 0.6], and τ what is tolerated,

    .. math::
      s &= \sqrt{\sigma^2 + 0.02^2 \big(l^2 + \max(y_0 - l, 0)^2\big)}
           \sqrt{\frac{1 + \rho}{1 - \rho}}, \qquad M = 3 s + \tau \\
      e_t &= \mathrm{clip}\big(e_{t-1} + \mathrm{clip}\big(\tfrac{y_t - l^*}{M} - 1, -1,\ 2\big),
      0,\ 7\big), \qquad l^* \leftarrow \min(l, l^* + 0.02 M)

    and 7 asks: at least four steps, far above; about twenty at one and a half times M; a single
    outlier of any size adds 2, and every step at the old level takes 1 back. While a loss falls,
    y_t - l_{t-1} has a mean, the trend, but varies no more than the noise. The root is by how much
    a mean of such noise wanders more than one of independent values: text that is read in its order
    has stretches that are harder than others. A rise that was there again right after a rollback is
    the data's: τ is then 5 times its size. So is one that has slowly come about again.
    """
    y, has_loss = stats.relative_loss(before, seen), stats.has_level(seen)
    unit = stats.loss_unit(before, seen)
    level = stats.update(divergence.level, y, has_loss, stats.LOSS)
    has_level = divergence.level.weight > 0
    innovation = stats.update(
        divergence.innovation, y - divergence.level.mean, has_loss & has_level, stats.LOSS
    )
    floor = _floor(level, before)
    tolerance = _tolerate(divergence, level, unit)
    tolerated = jnp.minimum(divergence.tolerance / jnp.where(unit > 0, unit, 1.0), stats.LARGEST)
    margin = MARGIN_STDS * divergence.quiet_std + tolerated
    known = (divergence.lowest < stats.LARGEST) & ~in_grace
    evidence = (y - divergence.lowest) / margin - 1
    excess = divergence.loss_excess + jnp.clip(evidence, LEAST_EVIDENCE, MOST_EVIDENCE)
    excess = jnp.where(
        has_loss & known, jnp.clip(excess, 0.0, ENOUGH_EVIDENCE), divergence.loss_excess
    )
    again = _comes_again(divergence, excess)
    tolerance = _at_least(tolerance, y * unit - divergence.lowest * unit, again)
    excess = jnp.where(again, 0.0, excess)
    last_innovation, autocorrelation = _autocorrelate(divergence, y, has_loss, floor)
    # A loss that is rising must not be taken for the level it is compared with.
    learning = (excess == 0) & _is_warm(level)
    correlation = jnp.clip(autocorrelation - AUTOCORRELATION_ERROR, 0.0, MOST_AUTOCORRELATION)
    std = _std(innovation, floor) * jnp.sqrt((1 + correlation) / (1 - correlation))
    forgotten = jnp.where(has_loss & known, FORGOTTEN * margin, 0.0)
    lowest = jnp.minimum(divergence.lowest + forgotten, stats.LARGEST)
    recent = divergence.recent + jnp.where(has_level, RECENT_SHARE, 1.0) * (y - divergence.recent)
    return divergence._replace(
        loss_excess=excess,
        level=level,
        innovation=innovation,
        last_innovation=last_innovation,
        autocorrelation=autocorrelation,
        lowest=jnp.where(learning, jnp.minimum(lowest, level.mean), lowest),
        recent=jnp.where(has_loss, recent, divergence.recent),
        quiet_std=jnp.where(learning, std, divergence.quiet_std),
        tolerance=tolerance,
        steps_since=jnp.minimum(divergence.steps_since + has_loss, RETURN_WITHIN),
        rising_steps=jnp.where(excess > 0, divergence.rising_steps + has_loss, 0),
    )


def _tolerate(divergence: Divergence, level: Running, unit: jax.Array) -> jax.Array:
    """What a rise may come to from now on, in the loss's own numbers.

    With the last of the first losses after a rollback for the loss it shows whether they are as
    high as those that were left, or as low as before the rise: nearer to which.
    """
    decay = stats.LOSS.decay
    before, after = (1 - decay ** (RETURN_STEPS - x) for x in (0.5, -0.5))
    is_told = (divergence.level.weight < before) & (before < level.weight) & (level.weight < after)
    low, high = divergence.left_lowest, divergence.left_recent
    here = _finite(level.mean * unit)
    is_datas = is_told & (low < high) & (here - low > RETURN_SHARE * (high - low))
    return _at_least(divergence.tolerance, here - low, is_datas)


def _at_least(tolerance: jax.Array, rise: jax.Array, is_datas: jax.Array) -> jax.Array:
    told = jnp.maximum(_finite(TOLERANCE * rise), tolerance)
    return jnp.where(is_datas & ~jnp.isnan(told), told, tolerance)


def _comes_again(divergence: Divergence, excess: jax.Array) -> jax.Array:
    """Whether what would ask is a rise like the one that was left, come about again."""
    was_left = divergence.left_lowest < divergence.left_recent
    of_late = divergence.steps_since < RETURN_WITHIN
    slowly = divergence.rising_steps >= SUDDEN
    often = divergence.left_times >= OFTEN
    return was_left & of_late & (slowly | often) & (excess >= ENOUGH_EVIDENCE)


def _autocorrelate(
    divergence: Divergence, y: jax.Array, has_loss: jax.Array, floor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The innovation in its standard deviations, and the mean product of neighbours.

    Both are 0 before anything is known.
    """
    keep = has_loss & _is_warm(divergence.level)
    last, mean = divergence.last_innovation, divergence.autocorrelation
    missed = y - divergence.level.mean - divergence.innovation.mean
    u = jnp.clip(missed / _std(divergence.innovation, floor), -FARTHEST, FARTHEST)
    mean_with_it = mean + AUTOCORRELATION_SHARE * (u * last - mean)
    return jnp.where(keep, u, last), jnp.where(keep, mean_with_it, mean)


def _is_warm(level: Running) -> jax.Array:
    return level.weight > 1 - stats.LOSS.decay ** (stats.START_STEPS - 0.5)


def _floor(level: Running, before: Statistics) -> jax.Array:
    """Least standard deviation: a share of the level, and of how far the loss has come."""
    start = before.loss_start
    fallen = jnp.where(start.weight > 0, jnp.maximum(start.mean - level.mean, 0.0), 0.0)
    return LEAST_STD * jnp.hypot(level.mean, fallen)


def _std(innovation: Running, floor: jax.Array) -> jax.Array:
    # The last term keeps the square of a loss that has become 0 from underflow.
    return jnp.sqrt(innovation.variance + jnp.square(floor) + TINY**2)


def _finite(loss: jax.Array) -> jax.Array:
    """A loss in its own unit, where twice and half of it are still float32."""
    most = float(jnp.finfo(jnp.float32).max) / 4
    return jnp.clip(loss, -most, most)
