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
LAW = "I"


class Regime(enum.IntEnum):
    """What state a run is in."""

    NOMINAL = 0  # the scale is near 1
    STRESSED = 1  # it was cut by a fifth or more
    UNSTABLE = 2  # a skip or the first loss spikes in the last steps: no growth
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
    # 2 was a law's before this one
    CUT = 3  # the scale fell by a fifth
    RECOVER = 4  # it grows again
    ROLLBACK = 5  # the host's
    CLIP = 6  # a gradient was scaled back, for its length or its loss jumped
    HELD = 7  # the scale has come to rest well below 1
    REJECTING = 8  # a large share of the steps has been rejected for long


REGIMES = tuple(regime.name.lower() for regime in Regime)
# Rejected for one of these: sound gradients made broken updates.
BROKEN_STATE = (Signal.NONFINITE_UPDATES, Signal.RELATIVE_STEP)

# The mean overshoot that is held, in standard deviations of one: below it steps are lengthened.
SET_POINT = 1.0
# An alarm is within these: a mean overshoot far off says no more than one that is off by this.
LEAST_ALARM, MOST_ALARM = -1.0, 1.0
# Bounds of log(scale)'s change, over the age of the run: growth and cut as power laws of time.
GROWTH, CUT = 2.0, 1.5
# And in one step.
MOST = 0.4
# Until an alarm above this growth is that quick, for a soft start should not cost more steps than
# it must; before this step nothing is known.
FIRST_ALARM, SETTLED_FROM = 0.25, 4
# The longest relative step, over this power of the run's age; with a power of 1 from scratch at 10
# times the tuned rate 8 to 14 % was lost (docs/research.md, attempt 32).
CEILING, CEILING_POWER = 0.0015, 0.5
# Where the mean cosine of the overshoot is below SHORT, steps fall far short of what the run could
# take, and the ceiling is higher: by e to this power for each 1 below, up to that factor, once the
# mean is over more than its least number of steps.
SHORT, ROOM, MOST_ROOM = -0.3, 8.0, 2.0
# From this scale on the learning rate is the user's own, and has the benefit of the doubt:
FULL = 0.9
# overshoot of so many standard deviations more is no reason to cut.
TRUST = 2.0
# A relative step of this many times the longest of late is not taken: as after a jump of the
# learning rate.
JUMP = 2.0
# A step is far shorter that at full rate is less than the shortest of late over this: as after a
# fall of the learning rate, where what the law has learned of long steps only hinders.
FALL = 4.0
# After so many steps in a row that are as long or as short the law begins anew.
OTHER_STEPS = 3
# A step that jumps stands alone when so many before it did not.
APART = 10
# Before this age steps lengthen as quickly as that in sound runs.
JUMPS_FROM = 8
# The longest and the shortest of late are forgotten as age to the power of this.
FORGOTTEN = 0.5
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
# The share of rejected and limited steps is that of the last so many; above the bound, once so many
# were seen, it is reported, and again when it had fallen to this share of that.
LONG_RUN, REJECTED_BOUND, REJECTED_FROM, REJECTED_AGAIN = 1000, 0.05, 200, 0.5


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
    age: jax.Array  # int32, steps taken since the law began
    log_longest: jax.Array  # float32, of the relative steps taken of late; UNKNOWN before one
    log_shortest: jax.Array  # float32, of those at scale 1 of late; UNKNOWN before one
    others_in_a_row: jax.Array  # int32, steps far longer than the one or far shorter than the other
    since_jump: jax.Array  # int32, steps since one was far longer, up to `APART`
    since_outlier: jax.Array  # int32, since a gradient or a loss jumped, up to `COOL_DOWN`
    settled: jax.Array  # bool, an alarm has been raised since: growth is no longer quick
    log_ceiling: jax.Array  # float32, of the scale for a while after a rollback
    ceiling_steps: jax.Array  # int32, steps to go under that ceiling
    rest: Rest
    rejections: Rejections


class Arrival(NamedTuple):
    """What is known of a step before the optimizer sees its gradient."""

    rejected: jax.Array  # int32, a `Signal`: why it must be skipped, or NONE
    jumps: jax.Array  # bool, its gradient is far longer than the run has shown
    spikes: jax.Array  # bool, its loss is far higher than the run has shown
    startles: jax.Array  # bool, and such losses have not come again: not the data's own
    log_factor: jax.Array  # float32, by which the gradient is scaled back, at most 0

    @property
    def limited(self) -> jax.Array:
        """Whether anything is taken from the gradient."""
        return self.log_factor < 0


class Evidence(NamedTuple):
    """What a step's signals amount to."""

    rejected: jax.Array  # int32, a `Signal`: why this step must be skipped, or NONE
    limited: jax.Array  # bool, its gradient was scaled back
    outlier: jax.Array  # bool, its gradient or its loss jumped
    spike: jax.Array  # bool, the loss jumped, and had not done so before
    alarm: jax.Array  # float32 in [-1, 1], > 0: the scale is too large
    log_step: jax.Array  # float32, of the relative step at the scale before; 0 if there is none
    log_ceiling: jax.Array  # float32, of the longest relative step that may be taken
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


class Rules(NamedTuple):
    """The two equations that move the scale; others than the law's own are for experiments."""

    alarm: Callable[[jax.Array], jax.Array]  # of the mean overshoot in standard deviations
    log_ceiling: Callable[[jax.Array, jax.Array], jax.Array]  # of age and mean cosine


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
        age=zero,
        log_longest=jnp.float32(stats.UNKNOWN),
        log_shortest=jnp.float32(stats.UNKNOWN),
        others_in_a_row=zero,
        since_jump=zero,
        since_outlier=jnp.int32(COOL_DOWN),
        settled=jnp.array(False),
        log_ceiling=jnp.zeros([], jnp.float32),
        ceiling_steps=zero,
        rest=Rest(first, zero, jnp.zeros([], jnp.float32)),
        rejections=Rejections(jnp.zeros([], jnp.float32), zero, zero, jnp.array(False)),
    )


def arrive(seen: Telemetry, before: Statistics) -> Arrival:
    """What is to be done about a gradient and a loss, before the optimizer sees them.

    What is not finite is rejected. A norm that jumps, log |g| > m + max(6 s, log 10) with m and s
    of the steps before, is scaled back to exp(m), the length that the run has shown; and to a tenth
    of its length the gradient of a loss that jumps, y > m + 6 s, until it is back. Nothing finite
    is thrown away, or a source of data that is rare would never be learned from. Once jumps have
    come again they are the data's: from then on a gradient is only scaled back to the longest one
    so far, which grows by a fifth with each row of them, so that a source whose gradients are long
    is learned from at full length in the end.
    """
    rejected = first_of(
        (seen.nonfinite_gradients > 0, Signal.NONFINITE_GRADIENTS),
        (~seen.has_gradient, Signal.NONFINITE_GRADIENTS),
        (seen.nonfinite_loss > 0, Signal.NONFINITE_LOSS),
        otherwise=Signal.NONE,
    )
    log_norm, gradient, sound = (
        jnp.log(seen.gradient_norm),
        before.gradient,
        rejected == Signal.NONE,
    )
    known = sound & (gradient.weight > 0) & (seen.gradient_norm > 0)
    jumps = known & (log_norm > stats.gradient_threshold(before))
    spikes = sound & stats.has_level(seen) & (before.loss.weight > 0)
    spikes = spikes & (stats.relative_loss(before, seen) > stats.loss_threshold(before))
    again = stats.recur(before.jumps)
    grown = jnp.where(before.jumps.in_one, 0.0, math.log(stats.AGAIN))
    longest = jnp.where(again, before.jumps.log_longest + grown, gradient.mean)
    allowed = jnp.maximum(gradient.mean, longest)
    log_factor = jnp.where(jumps, jnp.minimum(allowed - log_norm, 0.0), 0.0)
    startles = spikes & ~again
    tenth = jnp.where(startles, -math.log(stats.SPIKE_FACTOR), 0.0)
    return Arrival(rejected, jumps, spikes, startles, jnp.minimum(log_factor, tenth))


def heed(arrival: Arrival, alarm: jax.Array) -> Arrival:
    """The same where a user's own signal says that something jumps: as where the loss does.

    But for what comes again: a signal is not the data's.
    """
    sound = alarm & (arrival.rejected == Signal.NONE)
    tenth = jnp.where(sound, -math.log(stats.SPIKE_FACTOR), 0.0)
    return arrival._replace(
        spikes=arrival.spikes | sound,
        startles=arrival.startles | sound,
        log_factor=jnp.minimum(arrival.log_factor, tenth),
    )


def reject(arrival: Arrival, seen: Telemetry) -> jax.Array:
    """Why this step must not be applied: int32, a `Signal`, NONE if it may.

    What was rejected as it arrived; and, though the gradients are sound, updates that are not
    finite, or overflow or jump, as those of a corrupted moment do.
    """
    return first_of(
        (arrival.rejected > 0, arrival.rejected),
        (seen.nonfinite_updates > 0, Signal.NONFINITE_UPDATES),
        (seen.updates_broken, Signal.RELATIVE_STEP),
        otherwise=Signal.NONE,
    )


def judge(
    control: Control,
    seen: Telemetry,
    before: Statistics,
    after: Statistics,
    arrival: Arrival,
    rules: "Rules",
) -> Evidence:
    """Weigh the signals of one step: thresholds of the steps before, mean overshoot with it."""
    rejected = reject(arrival, seen)
    overshoot = stats.in_stds(after.overshoot)
    alarm = jnp.where(seen.has_overshoot, rules.alarm(_without_doubt(control, overshoot)), 0.0)
    log_step = jnp.log(jnp.maximum(seen.relative_step, 1e-30))
    has_step = seen.has_step & jnp.isfinite(log_step)
    log_step = jnp.where(has_step, log_step, 0.0)
    log_ceiling = rules.log_ceiling(control.age + 1, after.overshoot.mean)
    by_step = has_step & (log_step > log_ceiling)
    signal = first_of(
        (rejected > 0, rejected),
        (arrival.jumps & arrival.limited, Signal.GRADIENT_NORM),
        (arrival.spikes, Signal.LOSS),
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
        Signal.GRADIENT_NORM: jnp.exp(stats.gradient_threshold(before)),
        Signal.LOSS: stats.loss_threshold(before) * before.loss_unit,
        Signal.OVERSHOOT: SET_POINT,
        Signal.RELATIVE_STEP: jnp.exp(log_ceiling),
    }
    return Evidence(
        rejected=rejected,
        limited=arrival.limited,
        outlier=arrival.jumps | arrival.spikes,
        spike=arrival.startles,
        alarm=alarm,
        log_step=log_step,
        log_ceiling=log_ceiling,
        has_step=has_step,
        signal=signal,
        value=_pick(values, signal),
        threshold=_pick(thresholds, signal),
    )


def alarm(overshoot: jax.Array) -> jax.Array:
    """How much too large the scale is: clip(z - 1, -1, 1), z the mean overshoot in deviations."""
    return jnp.clip(overshoot - SET_POINT, LEAST_ALARM, MOST_ALARM)


def log_ceiling(age: jax.Array, cosine: jax.Array) -> jax.Array:
    r"""Of the longest relative step, by the age t and the mean cosine c of the overshoot.

    .. math::
      \log(0.0015 \sqrt{t}) + \mathrm{clip}(8 (-0.3 - c),\ 0,\ \log 2)

    A tuned run's steps lengthen as it leaves its start, and no overshoot tells a rate that is too
    high before the damage of the first steps is done. Where gradients go on pointing along the
    steps for long, as in a run whose weights must grow far beyond their start, steps are too
    short: c is above -0.2 in language models at any rate, and below -0.4 in such runs.
    """
    room = jnp.clip(ROOM * (SHORT - cosine), 0.0, math.log(MOST_ROOM))
    room = jnp.where(age > stats.LEAST_SPAN, room, 0.0)
    return math.log(CEILING) + CEILING_POWER * jnp.log(age.astype(jnp.float32)) + room


RULES = Rules(alarm, log_ceiling)


def _without_doubt(control: Control, overshoot: jax.Array) -> jax.Array:
    """Near the full rate, s >= 0.9, the benefit of the doubt is the user's: up to 2 above 1."""
    full = control.log_scale >= math.log(FULL)
    doubt = jnp.clip(overshoot - SET_POINT, 0.0, jnp.where(full, TRUST, 0.0))
    return overshoot - doubt


def decide(control: Control, evidence: Evidence, bounds: Bounds) -> tuple[Control, Decision]:
    """One step of the law: skip or not, the new scale, the regime, the budget."""
    skip = evidence.rejected > 0
    trouble = skip | evidence.spike
    calm = jnp.where(trouble, 0, optax.safe_increment(control.calm_steps))
    moved, begins = _next_scale(control, evidence, calm, bounds)
    limit, lasting, control = _limit(control, evidence, moved, bounds)
    # A step that is too long is cut to the limit at once; the scale, which lasts, by at most so
    # much, since the next update may be as short as those before.
    least = jnp.where(
        begins, limit, jnp.minimum(control.log_scale - MOST, _by_host(control, bounds))
    )
    log_scale = jnp.minimum(moved, jnp.maximum(lasting, least))
    # The soft start sets a scale, and so does the host after a rollback: neither turns one.
    by_host = (control.ceiling_steps > 0) & (log_scale >= _by_host(control, bounds))
    turning_point = jnp.where(begins | by_host, log_scale, control.turning_point)
    control = control._replace(turning_point=turning_point)
    regime, turning_point = _next_regime(control, log_scale, trouble, calm)
    action = _action(control.regime, regime, skip, evidence.limited)
    action, rest = _report_rest(control, log_scale, calm, action)
    left_out = jnp.where(skip | evidence.limited, evidence.signal, Signal.NONE)
    action, rejections = _report_rejections(control.rejections, left_out, action)
    intervened = (action == Action.SKIP) | (action == Action.CUT)
    outstanding = control.outstanding + jnp.where(intervened, 1.0, -EARNED)
    in_a_row = jnp.where(skip, optax.safe_increment(control.skips_in_a_row), 0)
    # Cuts spend, too, but end no run: their reason is a guess, and they may swing in a sound one.
    spent = (in_a_row >= bounds.max_skips) | (skip & (outstanding > bounds.max_interventions))
    alarmed = (control.age + 1 >= SETTLED_FROM) & (evidence.alarm > FIRST_ALARM)
    new = control._replace(
        log_scale=log_scale,
        turning_point=turning_point,
        regime=regime,
        calm_steps=calm,
        skips_in_a_row=in_a_row,
        skips=jnp.where(skip, optax.safe_increment(control.skips), control.skips),
        outstanding=jnp.clip(outstanding, 0.0, bounds.max_interventions).astype(jnp.float32),
        exhausted=control.exhausted | spent,
        started=control.started | begins,
        settled=control.settled | (alarmed & ~skip),
        ceiling_steps=jnp.maximum(control.ceiling_steps - 1, 0),
        rest=rest,
        rejections=rejections,
    )
    is_share = action == Action.REJECTING
    return new, Decision(
        skip=skip,
        scale=jnp.exp(limit),
        scale_before=jnp.exp(control.log_scale),
        regime=regime,
        action=action,
        signal=jnp.where(is_share, rejections.newest, evidence.signal),
        value=jnp.where(is_share, rejections.share, jnp.nan_to_num(evidence.value)),
        threshold=jnp.where(is_share, REJECTED_BOUND, jnp.nan_to_num(evidence.threshold)),
    )


def _next_scale(
    control: Control, evidence: Evidence, calm: jax.Array, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    r"""The log-scale that the alarm asks for, and whether the soft start sets it in this step.

    .. math::
      \log s_t = \log s_{t-1} - a_t \min(0.4,\ (2 \text{ if } a_t < 0 \text{ else } 1.5) / t)

    No change on a skipped step, no growth until calm, and growth by 0.4 until the first alarm. The
    first step that can be measured sets the scale by its relative step.
    """
    age = (control.age + 1).astype(jnp.float32)
    grows = evidence.alarm < 0
    most = jnp.minimum(jnp.where(grows, GROWTH, CUT) / age, MOST)
    most = jnp.where(grows & ~control.settled, MOST, most)
    change = -most * jnp.clip(evidence.alarm, LEAST_ALARM, MOST_ALARM)
    change = jnp.where((calm < COOL_DOWN) & (change > 0), 0.0, change)
    skip = evidence.rejected > 0
    begins = evidence.has_step & ~control.started & ~skip
    change = jnp.where(begins, math.log(FIRST_STEP) - evidence.log_step, change)
    change = jnp.where(skip | ~jnp.isfinite(change), 0.0, change)
    floor = jnp.log(jnp.asarray(bounds.min_scale, jnp.float32))
    moved = jnp.clip(control.log_scale + change, floor, 0.0)
    return jnp.where(control.pinned, control.log_scale, moved), begins


def _limit(
    control: Control, evidence: Evidence, moved: jax.Array, bounds: Bounds
) -> tuple[jax.Array, jax.Array, Control]:
    """The log-scales that this step and what lasts may have, and what is remembered of lengths.

    By the ceiling, by the longest step of late, and for a while after a rollback by what the host
    set. A rate that has jumped for good is found by several steps in a row that are cut for it, one
    that has fallen by several that are far shorter: the run is another one from there, and the law
    begins anew. Where the scale is full, a fall leaves nothing to mend. A step that is long in the
    wake of a long gradient is cut, and the scale stays: no rate is to blame.
    """
    skip, age = evidence.rejected > 0, (control.age + 1).astype(jnp.float32)
    measured = evidence.has_step & ~skip
    at_full = evidence.log_step - control.log_scale  # the relative step at scale 1
    known = measured & (control.log_longest > stats.UNKNOWN) & (age >= JUMPS_FROM)
    allowed = jnp.minimum(moved, evidence.log_ceiling - at_full)
    longest = control.log_longest + math.log(JUMP)
    jumps = known & (allowed + at_full > longest)
    falls = known & (at_full < control.log_shortest - math.log(FALL))
    falls = falls & (control.log_scale < math.log(FULL))
    floor, by_host = jnp.log(jnp.asarray(bounds.min_scale, jnp.float32)), _by_host(control, bounds)

    def bounded(allowed: jax.Array) -> jax.Array:
        allowed = jnp.where(measured & jnp.isfinite(allowed), allowed, moved)
        limit = jnp.maximum(jnp.minimum(allowed, by_host), floor)
        return jnp.where(control.pinned, moved, limit)

    since_outlier = jnp.minimum(control.since_outlier + 1, COOL_DOWN)
    since_outlier = jnp.where(evidence.outlier, 0, since_outlier)
    limit = bounded(jnp.where(jumps, longest - at_full, allowed))
    lasting = jnp.where(since_outlier < COOL_DOWN, bounded(allowed), limit)
    others = jnp.where(jumps | falls, control.others_in_a_row + 1, 0)
    control = control._replace(
        age=jnp.where(skip, control.age, optax.safe_increment(control.age)),
        log_longest=_longest(control, limit + at_full, measured, jumps, evidence.outlier),
        log_shortest=_shortest(control, at_full, measured, falls),
        others_in_a_row=jnp.where(measured, others, control.others_in_a_row),
        since_jump=jnp.where(jumps, 0, jnp.minimum(control.since_jump + measured, APART)),
        since_outlier=since_outlier,
    )
    return limit, lasting, _begin_anew(control)


def _by_host(control: Control, bounds: Bounds) -> jax.Array:
    """The log-scale that the host has set as the most, for a while after a rollback."""
    floor = jnp.log(jnp.asarray(bounds.min_scale, jnp.float32))
    return jnp.where(control.ceiling_steps > 0, jnp.maximum(control.log_ceiling, floor), 0.0)


def _longest(
    control: Control,
    log_step: jax.Array,
    measured: jax.Array,
    jumps: jax.Array,
    outlier: jax.Array,
) -> jax.Array:
    """log of the longest step taken of late; it lengthens no faster than the law's own growth."""
    age = control.age + 1
    known = (age >= JUMPS_FROM) & (control.log_longest > stats.UNKNOWN)
    # At full rate the start is over, too, and the law lengthens nothing: what grows is the rate.
    started = control.settled | (control.log_scale >= math.log(FULL))
    most = jnp.where(started, jnp.minimum(GROWTH / age, MOST), MOST)
    followed = jnp.where(known, jnp.minimum(log_step, control.log_longest + most), log_step)
    faded = control.log_longest - FORGOTTEN / age
    # A step that jumps alone, or with its gradient, may be of a rare source of data, which a rate
    # that jumps or drifts is not: no other one jumped shortly before.
    grown = control.log_longest + math.log(stats.AGAIN)
    alone = (control.since_jump >= APART) | (outlier & (control.since_outlier > 0))
    longest = jnp.where(jumps, jnp.where(alone, grown, faded), jnp.maximum(faded, followed))
    return jnp.where(measured, jnp.maximum(longest, stats.UNKNOWN), control.log_longest)


def _shortest(
    control: Control, at_full: jax.Array, measured: jax.Array, falls: jax.Array
) -> jax.Array:
    """log of the shortest step of late at scale 1; one that falls is none until it stays so."""
    risen = control.log_shortest + FORGOTTEN / (control.age + 1)
    known = control.log_shortest > stats.UNKNOWN
    shortest = jnp.where(falls, risen, jnp.where(known, jnp.minimum(risen, at_full), at_full))
    return jnp.where(measured, jnp.maximum(shortest, stats.UNKNOWN), control.log_shortest)


def _begin_anew(control: Control) -> Control:
    """The state as in the law's first step, if the last steps were those of another run.

    In the wake of a long gradient steps are long, and short again, whatever the rate: there it
    takes ten more of them.
    """
    in_wake = control.since_outlier < COOL_DOWN
    anew = control.others_in_a_row >= OTHER_STEPS + jnp.where(in_wake, COOL_DOWN, 0)
    return control._replace(
        age=jnp.where(anew, 0, control.age),
        log_longest=jnp.where(anew, stats.UNKNOWN, control.log_longest),
        log_shortest=jnp.where(anew, stats.UNKNOWN, control.log_shortest),
        others_in_a_row=jnp.where(anew, 0, control.others_in_a_row),
    )


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


def _action(was: jax.Array, regime: jax.Array, skip: jax.Array, limited: jax.Array) -> jax.Array:
    """What to report: every skip and clip, and every change of regime but the return to nominal."""
    entered = regime != was
    return first_of(
        (skip, Action.SKIP),
        (limited, Action.CLIP),
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
        reported=(before.reported | reports) & (share > REJECTED_AGAIN * REJECTED_BOUND),
    )


def first_of(*rules: tuple[jax.Array, int | jax.Array], otherwise: int | jax.Array) -> jax.Array:
    """The number of the first rule that holds, int32."""
    numbers = [jnp.asarray(number, jnp.int32) for _, number in rules]
    return jnp.select([when for when, _ in rules], numbers, jnp.asarray(otherwise, jnp.int32))


def _pick(candidates: dict[Signal, jax.Array | float], signal: jax.Array) -> jax.Array:
    """What belongs to this signal, float32; 0 for one that is not among the candidates."""
    values = [jnp.asarray(candidates.get(s, 0.0), jnp.float32) for s in Signal]
    return jnp.stack(values)[signal]
