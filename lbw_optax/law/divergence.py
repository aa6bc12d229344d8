"""When skipping and scaling are not enough: the guard asks to go back to an earlier state.

`assess` is a pure function on scalars. Certain signs ask within two steps; uncertain ones need
evidence of several, and none within a grace after a rollback. What asks stays asked until
somebody answers (:class:`lbw_optax.RollbackManager`, or :func:`lbw_optax.override`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import statistics as stats
from lbw_optax.law.control import BROKEN_STATE, SPIKE_FACTOR
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Telemetry

REASONS = ("none", "parameters", "inner_state", "skips", "loss", "request")
_, PARAMETERS, INNER_STATE, TOO_MANY_SKIPS, LOSS, REQUEST = range(6)
# Without a state to go back to, these are no reason to stop: the run may be sound.
UNCERTAIN = ("skips", "loss")

# Steps in a row before it is asked: sound gradients that make broken updates, and skips of any
# kind. Skipping keeps the state whole and costs a step each time; when that has come to what a
# rollback costs, the state is suspected. A lasting shift of level is accepted after 18.
INNER_STEPS, SKIP_STEPS = 2, 20
# A broken first gradient cannot be told from a sound one, and an inner state remembers it: it is
# known by the norm of the next ones, as many as this, that falls by the square of SPIKE_FACTOR.
FIRST_STEPS = 2
# The loss (see `_watch_loss`): margin above its lowest mean in spreads, evidence of one step at
# most, and evidence that asks.
MARGIN_SPREADS, MOST_EVIDENCE, ENOUGH_EVIDENCE = 3.0, 2.0, 7.0
# The correlation of the loss's noise from step to step (see `_echo`): share of the newest step in
# it, its standard error where the noise is independent, how far a surprise counts, in spreads, and
# the most that is believed.
ECHO_SHARE, FARTHEST, MOST_ECHO = 0.01, 3.0, 0.6
ECHO_ERROR = math.sqrt(ECHO_SHARE / (2 - ECHO_SHARE))
# Sound steps after a rollback in which only certain signs ask, and the level of the loss is learned
# anew: a lasting shift of the data's level asks once.
GRACE = 10


class Distress(NamedTuple):
    """What speaks for a rollback: scalars."""

    rollback_asked: jax.Array  # int32, index into REASONS, or 0
    inner_steps: jax.Array  # int32, in a row: sound gradients, broken updates
    loss_excess: jax.Array  # float32, evidence that the loss has risen for good
    level: Running  # of symlog(loss) since the start or the last rollback
    surprise: Running  # of symlog(loss) less the level before it
    lowest: jax.Array  # float32, the lowest mean of the level
    last_surprise: jax.Array  # float32, in spreads
    echo: jax.Array  # float32, correlation of a surprise with the one before it
    quiet_spread: jax.Array  # float32, spread of the loss's noise before the loss rose
    grace: jax.Array  # int32, sound steps to go


def init() -> Distress:
    """Nothing speaks for a rollback, nothing is known of the loss."""
    whole, real = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
    nothing = Running(real, real, real)
    return Distress(
        rollback_asked=whole,
        inner_steps=whole,
        loss_excess=real,
        level=nothing,
        surprise=nothing,
        last_surprise=real,
        echo=real,
        lowest=jnp.float32(stats.LARGEST),
        quiet_spread=jnp.float32(stats.LOSS.floor),
        grace=whole,
    )


def after_rollback(distress: Distress) -> Distress:
    """Nothing speaks for another one yet; how the data's noise echoes stays known."""
    return init()._replace(echo=distress.echo, grace=jnp.int32(GRACE))


def assess(
    distress: Distress,
    seen: Telemetry,
    before: Statistics,
    why: jax.Array,
    skips_in_a_row: jax.Array,
) -> Distress:
    """Take the signals of one step in.

    Args:
      distress: before the step.
      seen: what the step showed.
      before: of the steps before it.
      why: int32, index into SIGNALS, why the step is poisoned, or 0.
      skips_in_a_row: int32, this step included.
    """
    sound, in_grace = why == 0, distress.grace > 0
    broken = (why == BROKEN_STATE[0]) | (why == BROKEN_STATE[1])
    # A skip of another kind neither counts nor ends the row.
    inner = jnp.where(broken, optax.safe_increment(distress.inner_steps), distress.inner_steps)
    inner = jnp.where(sound, 0, inner)
    watched = _watch_loss(distress, seen, in_grace)
    signs = [
        (seen.parameters_broken, PARAMETERS),
        ((inner >= INNER_STEPS) | _first_was_broken(seen, before), INNER_STATE),
        (~in_grace & (skips_in_a_row >= SKIP_STEPS), TOO_MANY_SKIPS),
        (watched.loss_excess >= ENOUGH_EVIDENCE, LOSS),
    ]
    sign = jnp.select([s for s, _ in signs], [jnp.int32(r) for _, r in signs], jnp.int32(0))
    asked = distress.rollback_asked
    return watched._replace(
        rollback_asked=jnp.where(asked > 0, asked, sign),
        inner_steps=inner,
        grace=jnp.where(in_grace & sound, distress.grace - 1, distress.grace),
    )


def _first_was_broken(seen: Telemetry, before: Statistics) -> jax.Array:
    """In the first steps, each of which is small, log |g| falls below m - 2 log 10."""
    few = before.gradient.weight < 1 - stats.GRADIENT.decay ** (FIRST_STEPS + 0.5)
    few = few & (before.gradient.weight > 0) & seen.has_gradient & (seen.gradient_norm > 0)
    log_norm = jnp.log(jnp.where(few, seen.gradient_norm, 1.0))
    return few & (log_norm < before.gradient.mean - 2 * math.log(SPIKE_FACTOR))


def _watch_loss(distress: Distress, seen: Telemetry, in_grace: jax.Array) -> Distress:
    r"""Page's test (CUSUM) for a loss that has risen above its lowest mean and stays there.

    With y = symlog(loss), l its fast mean, l* the lowest l, σ the spread of the surprise
    y_t - l_{t-1} before the loss rose, at least 0.02, and ρ the correlation of a surprise with the
    one before it, less its standard error, in [0, 0.6],

    .. math::
      s = \sigma \sqrt{\frac{1 + \rho}{1 - \rho}}, \qquad
      e_t = \mathrm{clip}\big(e_{t-1} + \mathrm{clip}\big(\tfrac{y_t - l^*}{3 s} - 1, -1,\ 2\big),
      0,\ 7\big)

    and 7 asks: at least four steps, far above; fourteen at one and a half times 3 s; a single
    outlier of any size adds 2, and every step at the old level takes 1 back. While a loss falls,
    y_t - l_{t-1} has a mean, the trend, but no more spread than the noise. The root is by how much
    a mean of such noise wanders more than one of independent values: text that is read in its order
    has stretches that are harder than others.
    """
    y = stats.symlog(seen.loss)
    level = stats.update(distress.level, y, seen.has_loss, stats.LOSS)
    has_level = distress.level.weight > 0
    surprise = stats.update(
        distress.surprise, y - distress.level.mean, seen.has_loss & has_level, stats.LOSS
    )
    known = (distress.lowest < stats.LARGEST) & ~in_grace
    evidence = (y - distress.lowest) / (MARGIN_SPREADS * distress.quiet_spread) - 1
    excess = distress.loss_excess + jnp.clip(evidence, -1.0, MOST_EVIDENCE)
    excess = jnp.where(
        seen.has_loss & known, jnp.clip(excess, 0.0, ENOUGH_EVIDENCE), distress.loss_excess
    )
    last_surprise, echo = _echo(distress, y, seen.has_loss)
    # A loss that is rising must not be taken for the level it is compared with.
    learning = (excess == 0) & _is_warm(level)
    correlation = jnp.clip(echo - ECHO_ERROR, 0.0, MOST_ECHO)
    spread = _spread(surprise) * jnp.sqrt((1 + correlation) / (1 - correlation))
    return distress._replace(
        loss_excess=excess,
        level=level,
        surprise=surprise,
        last_surprise=last_surprise,
        echo=echo,
        lowest=jnp.where(learning, jnp.minimum(distress.lowest, level.mean), distress.lowest),
        quiet_spread=jnp.where(learning, spread, distress.quiet_spread),
    )


def _echo(distress: Distress, y: jax.Array, has_loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The surprise in its spreads, and the mean product of neighbours: 0 before anything is known.

    The mean is slow, so that a rise of the loss does not pass for noise before it has asked.
    """
    keep = has_loss & _is_warm(distress.level)
    missed = y - distress.level.mean - distress.surprise.mean
    u = jnp.clip(missed / _spread(distress.surprise), -FARTHEST, FARTHEST)
    echo = distress.echo + ECHO_SHARE * (u * distress.last_surprise - distress.echo)
    return jnp.where(keep, u, distress.last_surprise), jnp.where(keep, echo, distress.echo)


def _is_warm(level: Running) -> jax.Array:
    return level.weight > 1 - stats.LOSS.decay ** (stats.START_STEPS - 0.5)


def _spread(surprise: Running) -> jax.Array:
    return jnp.sqrt(surprise.variance + stats.LOSS.floor**2)
