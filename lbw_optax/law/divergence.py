"""When skipping and scaling are not enough: the guard asks to go back to an earlier state.

`assess` is a pure function on scalars. Certain signs ask within two steps; uncertain ones need
evidence of several, and none within a grace after a rollback. What asks stays asked until
somebody answers (:class:`lbw_optax.RollbackManager`, or :func:`lbw_optax.override`).
"""

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import statistics as stats
from lbw_optax.law.control import BROKEN_STATE, SPIKE_FACTOR, Signal, first_of
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Telemetry


class Reason(enum.IntEnum):
    """Why a rollback is asked for."""

    NONE = 0
    PARAMETERS = 1  # not finite, or far longer than a step can make them
    INNER_STATE = 2  # it makes broken updates out of sound gradients
    SKIPS = 3  # too many in a row
    LOSS = 4  # it has risen, and stays there
    REQUEST = 5  # the host's


# Without a state to go back to, these are no reason to stop: the run may be sound.
UNCERTAIN = (Reason.SKIPS, Reason.LOSS)

# Steps in a row that make broken updates out of sound gradients: one may be an overflow.
INNER_STEPS = 2
# Skips in a row, of any kind. Skipping keeps the state whole and costs a step each time; when that
# has come to what a rollback costs, the state is suspected. A lasting shift of level is accepted
# after 18.
SKIP_STEPS = 20
# A broken first gradient cannot be told from a sound one, and an inner state remembers it: it is
# known by the norm of the next ones, as many as this, that falls by the square of SPIKE_FACTOR.
FIRST_STEPS = 2
# The loss (see `_watch_loss`): margin above its lowest mean, in standard deviations,
MARGIN_STDS = 3.0
# evidence of one step at most, so that no single batch asks,
MOST_EVIDENCE = 2.0
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


class Divergence(NamedTuple):
    """What speaks for a rollback: scalars."""

    rollback_asked: jax.Array  # int32, a `Reason`; NONE: nobody asks
    inner_steps: jax.Array  # int32, in a row: sound gradients, broken updates
    loss_excess: jax.Array  # float32, evidence that the loss has risen for good
    level: Running  # of symlog(loss) since the start or the last rollback
    innovation: Running  # of symlog(loss) less the level before it
    lowest: jax.Array  # float32, the lowest mean of the level
    last_innovation: jax.Array  # float32, in standard deviations
    autocorrelation: jax.Array  # float32, of an innovation with the one before it
    quiet_std: jax.Array  # float32, of the loss's noise before the loss rose
    grace: jax.Array  # int32, sound steps to go


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
        quiet_std=jnp.float32(stats.LOSS.floor),
        grace=whole,
    )


def after_rollback(divergence: Divergence) -> Divergence:
    """Nothing speaks for another one yet; the autocorrelation of the data's noise stays known."""
    return init()._replace(autocorrelation=divergence.autocorrelation, grace=jnp.int32(GRACE))


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
    watched = _watch_loss(divergence, seen, in_grace)
    sign = first_of(
        (seen.parameters_broken, Reason.PARAMETERS),
        ((inner >= INNER_STEPS) | _first_was_broken(seen, before), Reason.INNER_STATE),
        (~in_grace & (skips_in_a_row >= SKIP_STEPS), Reason.SKIPS),
        (watched.loss_excess >= ENOUGH_EVIDENCE, Reason.LOSS),
        otherwise=Reason.NONE,
    )
    asked = divergence.rollback_asked
    return watched._replace(
        rollback_asked=jnp.where(asked > 0, asked, sign),
        inner_steps=inner,
        grace=jnp.where(in_grace & sound, divergence.grace - 1, divergence.grace),
    )


def _first_was_broken(seen: Telemetry, before: Statistics) -> jax.Array:
    """In the first steps, each of which is small, log |g| falls below m - 2 log 10."""
    few = before.gradient.weight < 1 - stats.GRADIENT.decay ** (FIRST_STEPS + 0.5)
    few = few & (before.gradient.weight > 0) & seen.has_gradient & (seen.gradient_norm > 0)
    log_norm = jnp.log(jnp.where(few, seen.gradient_norm, 1.0))
    return few & (log_norm < before.gradient.mean - 2 * math.log(SPIKE_FACTOR))


def _watch_loss(divergence: Divergence, seen: Telemetry, in_grace: jax.Array) -> Divergence:
    r"""Page's test (CUSUM) for a loss that has risen above its lowest mean and stays there.

    With y = symlog(loss), l its fast mean, l* the lowest l, σ the standard deviation of the
    innovation y_t - l_{t-1} before the loss rose, at least 0.02, and ρ the correlation of an
    innovation with the one before it, less its standard error, in [0, 0.6],

    .. math::
      s = \sigma \sqrt{\frac{1 + \rho}{1 - \rho}}, \qquad
      e_t = \mathrm{clip}\big(e_{t-1} + \mathrm{clip}\big(\tfrac{y_t - l^*}{3 s} - 1, -1,\ 2\big),
      0,\ 7\big)

    and 7 asks: at least four steps, far above; fourteen at one and a half times 3 s; a single
    outlier of any size adds 2, and every step at the old level takes 1 back. While a loss falls,
    y_t - l_{t-1} has a mean, the trend, but varies no more than the noise. The root is by how much
    a mean of such noise wanders more than one of independent values: text that is read in its order
    has stretches that are harder than others.
    """
    y = stats.symlog(seen.loss)
    level = stats.update(divergence.level, y, seen.has_loss, stats.LOSS)
    has_level = divergence.level.weight > 0
    innovation = stats.update(
        divergence.innovation, y - divergence.level.mean, seen.has_loss & has_level, stats.LOSS
    )
    known = (divergence.lowest < stats.LARGEST) & ~in_grace
    evidence = (y - divergence.lowest) / (MARGIN_STDS * divergence.quiet_std) - 1
    excess = divergence.loss_excess + jnp.clip(evidence, -1.0, MOST_EVIDENCE)
    excess = jnp.where(
        seen.has_loss & known, jnp.clip(excess, 0.0, ENOUGH_EVIDENCE), divergence.loss_excess
    )
    last_innovation, autocorrelation = _autocorrelate(divergence, y, seen.has_loss)
    # A loss that is rising must not be taken for the level it is compared with.
    learning = (excess == 0) & _is_warm(level)
    correlation = jnp.clip(autocorrelation - AUTOCORRELATION_ERROR, 0.0, MOST_AUTOCORRELATION)
    std = _std(innovation) * jnp.sqrt((1 + correlation) / (1 - correlation))
    return divergence._replace(
        loss_excess=excess,
        level=level,
        innovation=innovation,
        last_innovation=last_innovation,
        autocorrelation=autocorrelation,
        lowest=jnp.where(learning, jnp.minimum(divergence.lowest, level.mean), divergence.lowest),
        quiet_std=jnp.where(learning, std, divergence.quiet_std),
    )


def _autocorrelate(
    divergence: Divergence, y: jax.Array, has_loss: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The innovation in its standard deviations, and the mean product of neighbours.

    Both are 0 before anything is known.
    """
    keep = has_loss & _is_warm(divergence.level)
    last, mean = divergence.last_innovation, divergence.autocorrelation
    missed = y - divergence.level.mean - divergence.innovation.mean
    u = jnp.clip(missed / _std(divergence.innovation), -FARTHEST, FARTHEST)
    mean_with_it = mean + AUTOCORRELATION_SHARE * (u * last - mean)
    return jnp.where(keep, u, last), jnp.where(keep, mean_with_it, mean)


def _is_warm(level: Running) -> jax.Array:
    return level.weight > 1 - stats.LOSS.decay ** (stats.START_STEPS - 0.5)


def _std(innovation: Running) -> jax.Array:
    return jnp.sqrt(innovation.variance + stats.LOSS.floor**2)
