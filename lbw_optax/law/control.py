"""The control law: from what was seen to what is done, as pure functions on scalars.

`judge` turns signals and statistics into evidence, `decide` turns evidence into a new scale, a
regime, and whether the step is skipped. Any float whatever goes in; the scale stays in bounds.
"""

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import statistics as stats
from lbw_optax.law.statistics import Statistics
from lbw_optax.law.telemetry import Telemetry

# The version of all that decides: this module, `statistics`, `divergence` and the signals they
# read. Records of benchmarks carry it. Whoever changes a decision raises it and runs the tables
# again.
LAW = "H"


class Regime(enum.IntEnum):
    """What state a run is in."""

    NOMINAL = 0  # the scale is near 1
    STRESSED = 1  # it was cut by a fifth or more
    UNSTABLE = 2  # a skip or a loss spike in the last steps: no growth
    RECOVERING = 3  # it grows again


class Signal(enum.IntEnum):
    """What decided."""

    NONE = 0
    NONFINITE_GRADIENTS = 1
    NONFINITE_LOSS = 2
    NONFINITE_UPDATES = 3
    GRADIENT_NORM = 4
    LOSS = 5
    OVERSHOOT = 6
    RELATIVE_STEP = 7


class Action(enum.IntEnum):
    """What was done, as far as it is reported."""

    NONE = 0
    SKIP = 1  # the step changes nothing
    HOLD = 2  # no growth of the scale
    CUT = 3  # the scale fell by a fifth
    RECOVER = 4  # it grows again
    ROLLBACK = 5  # the host's
    CLIP = 6  # chained before an optimizer: a gradient that jumped was scaled back
    HELD = 7  # the scale has come to rest well below 1
    REJECTING = 8  # a large share of the steps has been rejected for long


REGIMES = tuple(regime.name.lower() for regime in Regime)
# Rejected for one of these: sound gradients made broken updates.
BROKEN_STATE = (Signal.NONFINITE_UPDATES, Signal.RELATIVE_STEP)

# A spike of the loss or of log |g|: this many standard deviations above the mean.
SPIKE_STDS = 6.0
# And for the gradient norm at least this factor: a quiet run's norm may well triple.
SPIKE_FACTOR = 10.0
# The relative step that is tolerated for good, whatever the progress.
KAPPA = 0.01
# Weight of log(r / kappa) against standard errors of the overshoot: an e-fold too long weighs as
# much as an overshoot that is hardly chance.
STEP_WEIGHT = 4.0
# Progress beyond this many standard deviations of the loss earns credit: less may be noise.
CREDIT_FROM = 3.0
# Change of log(scale) a unit of alarm.
GAIN = 0.05
# Bounds of one step's change of log(scale): a cut, growth at kappa, growth far below it.
MOST_CUT, GROWTH, MOST_GROWTH = 0.4, 0.1, 0.5
# A step of more than FAR times kappa is cut to that at once, to a tenth of the scale at most: ten
# such steps would ruin the run.
FAR, AT_ONCE = 3.0, 10.0
# From this scale on the learning rate is the user's own, and has the benefit of the doubt:
FULL = 0.9
# overshoot of this many standard errors is no reason to cut,
TRUST = 3.0
# nor is a step of this many times kappa.
TRUST_STEP = 1.5
# Growth gains up to this much more, e-fold by e-fold below kappa, until the first alarm of one
# standard error: a soft start should not cost more steps than it must.
QUICK, FIRST_ALARM = 2.0, 1.0
# Soft start: the first step moves the parameters by this share of their length.
FIRST_STEP = 0.001
# The scale before anything could be measured.
FIRST_SCALE = 0.01
# A turn of the scale by this factor is an intervention (down) or a recovery (up): less is wavering.
TURN = 0.8
# Steps without evidence of trouble before the scale may grow again after an unstable step.
COOL_DOWN = 10
# The budget is spent by interventions and earned back, this much a step.
EARNED = 0.1
# A scale below this that has kept within a fifth for so many steps is reported, and again when it
# has moved by as much as this and come to rest anew.
LOW, REST_STEPS = 0.5, 20
# The share of rejected steps is that of the last so many; above the bound, once so many were seen,
# it is reported, and again when it had fallen to half of that.
LONG_RUN, REJECTED_BOUND, REJECTED_FROM = 1000, 0.05, 200


class Bounds(NamedTuple):
    """The user's limits; Python numbers or scalars."""

    min_scale: float = 0.001
    max_skips: int = 30
    max_interventions: int = 50


class Rest(NamedTuple):
    """Whether the scale keeps still: scalars."""

    log_scale: jax.Array  # float32, where it began to
    steps: jax.Array  # int32, since then, in which it was free to grow
    reported: jax.Array  # float32, log(scale) of the newest report; 0 once it has been full


class Rejections(NamedTuple):
    """How many steps are rejected in the long run: scalars."""

    share: jax.Array  # float32, of the last `LONG_RUN` steps
    steps: jax.Array  # int32, that it is of, up to `LONG_RUN`
    newest: jax.Array  # int32, a `Signal`, why the newest was
    reported: jax.Array  # bool, that there are too many


class Control(NamedTuple):
    """The law's own state: scalars."""

    log_scale: jax.Array  # float32, in [log(min_scale), 0]
    turning_point: jax.Array  # float32, extreme of log_scale since the last turn
    regime: jax.Array  # int32, a `Regime`
    calm_steps: jax.Array  # int32, since the last skip or loss spike
    skips_in_a_row: jax.Array  # int32
    skips: jax.Array  # int32, in all
    outstanding: jax.Array  # float32, interventions not yet earned back
    exhausted: jax.Array  # bool, stays True until a person clears it
    pinned: jax.Array  # bool, a person holds the scale
    started: jax.Array  # bool, the soft start has set the first scale
    settled: jax.Array  # bool, an alarm has been raised since: growth is no longer quick
    log_ceiling: jax.Array  # float32, of the scale for a while after a rollback
    ceiling_steps: jax.Array  # int32, steps to go under that ceiling
    rest: Rest
    rejections: Rejections


class Evidence(NamedTuple):
    """What a step's signals amount to."""

    rejected: jax.Array  # int32, a `Signal`: why this step must be skipped, or NONE
    spike: jax.Array  # bool, the loss jumped
    alarm: jax.Array  # float32, > 0: the scale is too large
    log_step: jax.Array  # float32, log(r / kappa); 0 if r could not be measured
    has_step: jax.Array  # bool, r could be measured
    signal: jax.Array  # int32, a `Signal`: what decided
    value: jax.Array  # float32, of that signal
    threshold: jax.Array  # float32, for that signal


class Decision(NamedTuple):
    """What is done in this step."""

    skip: jax.Array  # bool
    scale: jax.Array  # float32
    scale_before: jax.Array  # float32
    regime: jax.Array  # int32, a `Regime`, after the step
    action: jax.Array  # int32, an `Action`; NONE: nothing to report
    signal: jax.Array  # int32, a `Signal`: what decided
    value: jax.Array  # float32, of that signal
    threshold: jax.Array  # float32, for that signal


Alarm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""How much too large the scale is, of overshoot, log(r / kappa) and progress; see `alarm`."""


def init(bounds: Bounds) -> Control:
    """Before the soft start: a small scale, and the regime is `recovering`."""
    first = jnp.log(jnp.maximum(jnp.asarray(bounds.min_scale, jnp.float32), FIRST_SCALE))
    zero = jnp.zeros([], jnp.int32)
    return Control(
        log_scale=first,
        turning_point=first,
        regime=jnp.int32(Regime.RECOVERING),
        calm_steps=jnp.int32(COOL_DOWN),
        skips_in_a_row=zero,
        skips=zero,
        outstanding=jnp.zeros([], jnp.float32),
        exhausted=jnp.array(False),
        pinned=jnp.array(False),
        started=jnp.array(False),
        settled=jnp.array(False),
        log_ceiling=jnp.zeros([], jnp.float32),
        ceiling_steps=zero,
        rest=Rest(first, zero, jnp.zeros([], jnp.float32)),
        rejections=Rejections(jnp.zeros([], jnp.float32), zero, zero, jnp.array(False)),
    )


def reject(seen: Telemetry, before: Statistics) -> jax.Array:
    """Why this step must not be applied: int32, a `Signal`, NONE if it may.

    Non-finite gradients, loss or updates; a gradient norm that overflows; one that jumps:
    log |g| > m + max(6 s, log 10), with m and s of the steps before; and, though the gradients are
    sound, updates that overflow or jump, as those of a corrupted moment do.
    """
    jump = jnp.log(seen.gradient_norm) > _gradient_threshold(before)
    jump = (jump & (before.gradient.weight > 0)) | ~seen.has_gradient
    return first_of(
        (seen.nonfinite_gradients > 0, Signal.NONFINITE_GRADIENTS),
        (seen.nonfinite_loss > 0, Signal.NONFINITE_LOSS),
        (jump, Signal.GRADIENT_NORM),
        (seen.nonfinite_updates > 0, Signal.NONFINITE_UPDATES),
        (seen.updates_broken, Signal.RELATIVE_STEP),
        otherwise=Signal.NONE,
    )


def judge(
    control: Control,
    seen: Telemetry,
    before: Statistics,
    after: Statistics,
    rejected: jax.Array,
    alarm: Alarm,
) -> Evidence:
    """Weigh the signals of one step: thresholds of the steps before, mean overshoot with it."""
    loss_threshold = before.loss.mean + SPIKE_STDS * stats.std(before.loss, stats.LOSS)
    spike = stats.has_level(seen) & (before.loss.weight > 0)
    spike = spike & (stats.relative_loss(before, seen) > loss_threshold)
    overshoot = after.overshoot.mean / stats.standard_error(after.overshoot, stats.OVERSHOOT)
    log_step = jnp.where(seen.has_step, jnp.log(jnp.maximum(seen.relative_step, 1e-30) / KAPPA), 0)
    against = _without_doubt(control, overshoot, log_step)
    measured = seen.has_step | seen.has_overshoot
    by_step = STEP_WEIGHT * log_step > jnp.maximum(overshoot, 0)
    signal = first_of(
        (rejected > 0, rejected),
        (spike, Signal.LOSS),
        (by_step, Signal.RELATIVE_STEP),
        otherwise=Signal.OVERSHOOT,
    )
    values: dict[Signal, jax.Array | float] = {
        Signal.NONFINITE_GRADIENTS: seen.nonfinite_gradients,
        Signal.NONFINITE_LOSS: seen.nonfinite_loss,
        Signal.NONFINITE_UPDATES: seen.nonfinite_updates,
        Signal.GRADIENT_NORM: seen.gradient_norm,
        Signal.LOSS: seen.loss,
        Signal.OVERSHOOT: overshoot,
        Signal.RELATIVE_STEP: seen.relative_step,
    }
    thresholds: dict[Signal, jax.Array | float] = {
        Signal.GRADIENT_NORM: jnp.exp(_gradient_threshold(before)),
        Signal.LOSS: loss_threshold * before.loss_unit,
        Signal.RELATIVE_STEP: KAPPA,
    }
    return Evidence(
        rejected=rejected,
        spike=spike,
        alarm=jnp.where(measured, alarm(*against, progress(after)), 0.0),
        log_step=log_step,
        has_step=seen.has_step,
        signal=signal,
        value=_pick(values, signal),
        threshold=_pick(thresholds, signal),
    )


def alarm(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    r"""How much too large the scale is, in standard errors of the overshoot; 0 holds it.

    With z the mean overshoot in standard errors, r the relative step, P the progress, and the
    credit C that progress earns,

    .. math::
      C &= \max(P - 3, 0), \qquad z' = z - \min(\max(z, 0), C) \\
      a &= \begin{cases}
        \max(z', -1) + 4 \log(r / \kappa) & r > \kappa \\
        z' - \min(4 \log(\kappa / r),\ C) & r \le \kappa
      \end{cases}

    Overshoot alone holds a run that starts near its goal, as fine-tuning does. A run that has
    come far learns best at the edge of stability, where overshoot is normal: its credit forgives
    that, and lets steps grow to kappa, which alone holds them then.
    """
    credit = jnp.maximum(progress - CREDIT_FROM, 0.0)
    overshoot = overshoot - jnp.clip(overshoot, 0.0, credit)
    step = STEP_WEIGHT * log_step
    small = overshoot + jnp.maximum(step, -credit)
    return jnp.where(log_step > 0, jnp.maximum(overshoot, -1.0) + step, small)


def progress(statistics: Statistics) -> jax.Array:
    """How far the loss has come from its start, in standard deviations of the loss, at least 0.

    Without a loss nothing is known, and nothing is granted.
    """
    gained = statistics.loss_start.mean - statistics.loss.mean
    return jnp.maximum(gained / stats.std(statistics.loss, stats.LOSS), 0.0)


def _without_doubt(
    control: Control, overshoot: jax.Array, log_step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Near the full rate, s >= 0.9, the benefit of the doubt is the user's.

    z is less by min(max(z, 0), 3) there, and r up to 1.5 kappa counts as at most kappa.
    """
    full = control.log_scale >= math.log(FULL)
    trusted = full & (log_step < math.log(TRUST_STEP))
    overshoot = overshoot - jnp.clip(overshoot, 0.0, jnp.where(full, TRUST, 0.0))
    return overshoot, jnp.where(trusted, jnp.minimum(log_step, 0.0), log_step)


def decide(control: Control, evidence: Evidence, bounds: Bounds) -> tuple[Control, Decision]:
    """One step of the law: skip or not, the new scale, the regime, the budget."""
    skip = evidence.rejected > 0
    trouble = skip | evidence.spike
    calm = jnp.where(trouble, 0, optax.safe_increment(control.calm_steps))
    log_scale = _next_scale(control, evidence, calm, bounds)
    floor = jnp.log(jnp.asarray(bounds.min_scale, jnp.float32))
    ceiling = jnp.where(control.ceiling_steps > 0, jnp.maximum(control.log_ceiling, floor), 0.0)
    log_scale = jnp.where(control.pinned, log_scale, jnp.minimum(log_scale, ceiling))
    # The soft start sets a scale; it does not turn one.
    begins = evidence.has_step & ~control.started & ~skip
    turning_point = jnp.where(begins, log_scale, control.turning_point)
    control = control._replace(turning_point=turning_point)
    regime, turning_point = _next_regime(control, log_scale, trouble, calm)
    action = _action(control.regime, regime, skip)
    action, rest = _report_rest(control, log_scale, calm, action)
    action, rejections = _report_rejections(control.rejections, evidence.rejected, action)
    intervened = (action == Action.SKIP) | (action == Action.CUT) | (action == Action.HOLD)
    outstanding = control.outstanding + jnp.where(intervened, 1.0, -EARNED)
    in_a_row = jnp.where(skip, optax.safe_increment(control.skips_in_a_row), 0)
    spent = (in_a_row >= bounds.max_skips) | (outstanding > bounds.max_interventions)
    new = Control(
        log_scale=log_scale,
        turning_point=turning_point,
        regime=regime,
        calm_steps=calm,
        skips_in_a_row=in_a_row,
        skips=jnp.where(skip, optax.safe_increment(control.skips), control.skips),
        outstanding=jnp.clip(outstanding, 0.0, bounds.max_interventions).astype(jnp.float32),
        exhausted=control.exhausted | spent,
        pinned=control.pinned,
        started=control.started | begins,
        settled=control.settled | (control.started & ~skip & (evidence.alarm > FIRST_ALARM)),
        log_ceiling=control.log_ceiling,
        ceiling_steps=jnp.maximum(control.ceiling_steps - 1, 0),
        rest=rest,
        rejections=rejections,
    )
    is_share = action == Action.REJECTING
    return new, Decision(
        skip=skip,
        scale=jnp.exp(log_scale),
        scale_before=jnp.exp(control.log_scale),
        regime=regime,
        action=action,
        signal=jnp.where(is_share, rejections.newest, evidence.signal),
        value=jnp.where(is_share, rejections.share, jnp.nan_to_num(evidence.value)),
        threshold=jnp.where(is_share, REJECTED_BOUND, jnp.nan_to_num(evidence.threshold)),
    )


def _next_scale(control: Control, evidence: Evidence, calm: jax.Array, bounds: Bounds) -> jax.Array:
    """Bounded change of the log-scale; none on a skipped step, no growth until calm.

    Growth is quick far below kappa and slow near it: at most GROWTH (1 + log(kappa / r)), and until
    the first alarm with a gain of GAIN (1 + min(log(kappa / r), QUICK)). The first step that can be
    measured sets the scale by its relative step. Later, one that is far above kappa, as after a
    jump of the learning rate, is cut at once: ten such steps would ruin the run.
    """
    far_below = jnp.maximum(-evidence.log_step, 0.0)
    most = jnp.clip(GROWTH * (1 + far_below), GROWTH, MOST_GROWTH)
    quick = (evidence.alarm < 0) & ~control.settled
    gain = GAIN * jnp.where(quick, 1 + jnp.minimum(far_below, QUICK), 1.0)
    change = jnp.clip(-gain * evidence.alarm, -MOST_CUT, jnp.where(calm < COOL_DOWN, 0.0, most))
    excess = jnp.clip(evidence.log_step - math.log(FAR), 0.0, math.log(AT_ONCE))
    change = jnp.where(excess > 0, jnp.minimum(change, -excess), change)
    first = jnp.log(FIRST_STEP / KAPPA) - evidence.log_step
    change = jnp.where(evidence.has_step & ~control.started, first, change)
    change = jnp.where((evidence.rejected > 0) | ~jnp.isfinite(change), 0.0, change)
    floor = jnp.log(jnp.asarray(bounds.min_scale, jnp.float32))
    moved = jnp.clip(control.log_scale + change, floor, 0.0)
    return jnp.where(control.pinned, control.log_scale, moved)


def _next_regime(
    control: Control, log_scale: jax.Array, trouble: jax.Array, calm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Turns of the scale decide: a fifth under its last peak is stress, as much above ends it.

    A skip or a loss spike makes the run unstable until it has been calm for the cool-down.
    """
    was, turn = control.regime, -jnp.log(jnp.float32(TURN))
    fell = log_scale < control.turning_point - turn
    rose = log_scale > control.turning_point + turn
    regime = first_of(
        (trouble, Regime.UNSTABLE),
        ((was == Regime.UNSTABLE) & (calm < COOL_DOWN), Regime.UNSTABLE),
        (was == Regime.UNSTABLE, Regime.RECOVERING),
        ((was == Regime.STRESSED) & rose, Regime.RECOVERING),
        ((was != Regime.STRESSED) & fell, Regime.STRESSED),
        ((was == Regime.RECOVERING) & (log_scale >= -turn), Regime.NOMINAL),
        otherwise=was,
    )
    peak = jnp.maximum(control.turning_point, log_scale)
    trough = jnp.minimum(control.turning_point, log_scale)
    followed = jnp.where(regime == Regime.STRESSED, trough, peak)
    restart = (regime == Regime.UNSTABLE) | ((regime != was) & (regime != Regime.NOMINAL))
    return regime, jnp.where(restart, log_scale, followed)


def _action(was: jax.Array, regime: jax.Array, skip: jax.Array) -> jax.Array:
    """What to report: every skip, and every change of regime but the return to nominal."""
    entered = regime != was
    return first_of(
        (skip, Action.SKIP),
        (entered & (regime == Regime.UNSTABLE), Action.HOLD),
        (entered & (regime == Regime.STRESSED), Action.CUT),
        (entered & (regime == Regime.RECOVERING), Action.RECOVER),
        otherwise=Action.NONE,
    )


def _report_rest(
    control: Control, log_scale: jax.Array, calm: jax.Array, action: jax.Array
) -> tuple[jax.Array, Rest]:
    """`HELD`, where nothing else is to be reported, once each time that a low scale comes to rest.

    A scale that a person has pinned is none that the law holds.
    """
    rest = control.rest
    still = jnp.abs(log_scale - rest.log_scale) <= -math.log(TURN)
    free = jnp.where(calm >= COOL_DOWN, optax.safe_increment(rest.steps), rest.steps)
    steps = jnp.where(still, free, 0)
    is_new = jnp.abs(log_scale - rest.reported) > -math.log(LOW)
    low = (log_scale < math.log(LOW)) & ~control.pinned
    held = low & (steps >= REST_STEPS) & is_new & (action == Action.NONE)
    reported = jnp.where(log_scale >= math.log(FULL), 0.0, rest.reported)
    return jnp.where(held, jnp.int32(Action.HELD), action), Rest(
        log_scale=jnp.where(still, rest.log_scale, log_scale),
        steps=steps,
        reported=jnp.where(held, log_scale, reported),
    )


def _report_rejections(
    before: Rejections, rejected: jax.Array, action: jax.Array
) -> tuple[jax.Array, Rejections]:
    """`REJECTING`, where nothing else is to be reported, once each time that the share is high.

    The share is a mean of all steps at first, and an exponential one later on.
    """
    steps = jnp.minimum(before.steps + 1, LONG_RUN)
    share = before.share + ((rejected > 0) - before.share) / steps
    many = (share > REJECTED_BOUND) & (steps >= REJECTED_FROM)
    reports = many & ~before.reported & (action == Action.NONE)
    return jnp.where(reports, jnp.int32(Action.REJECTING), action), Rejections(
        share=share,
        steps=steps,
        newest=jnp.where(rejected > 0, rejected, before.newest),
        reported=(before.reported | reports) & (share > REJECTED_BOUND / 2),
    )


def _gradient_threshold(before: Statistics) -> jax.Array:
    width = SPIKE_STDS * stats.std(before.gradient, stats.GRADIENT)
    return before.gradient.mean + jnp.maximum(width, jnp.log(jnp.float32(SPIKE_FACTOR)))


def first_of(*rules: tuple[jax.Array, int | jax.Array], otherwise: int | jax.Array) -> jax.Array:
    """The number of the first rule that holds, int32."""
    numbers = [jnp.asarray(number, jnp.int32) for _, number in rules]
    return jnp.select([when for when, _ in rules], numbers, jnp.asarray(otherwise, jnp.int32))


def _pick(candidates: dict[Signal, jax.Array | float], signal: jax.Array) -> jax.Array:
    """What belongs to this signal, float32; 0 for one that is not among the candidates."""
    values = [jnp.asarray(candidates.get(s, 0.0), jnp.float32) for s in Signal]
    return jnp.stack(values)[signal]
