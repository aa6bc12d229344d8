"""The NumPy reference: telemetry, statistics and law once more, in float64 and plain Python.

Written from the equations, not from the code: means and variances are weighted sums over the
whole history, the law is a sequence of `if`s. A signal that is missing is None. Constants are
read from the package, so that an experiment with them needs no second change here.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lbw_optax.law import control, divergence, statistics
from lbw_optax.law.telemetry import HISTOGRAM_EDGES

# --- telemetry of pytrees that are small enough to be sampled whole --------------------------


def flat(leaves) -> np.ndarray:
    parts = [np.asarray(leaf).astype(np.float64).ravel() for leaf in leaves]
    return np.concatenate(parts) if parts else np.zeros(0)


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / lengths) if lengths > 0 else None


def mean_parameters(mean: np.ndarray | None, here: np.ndarray, step: int) -> np.ndarray:
    """With those of this step, counted from 1: over the last half of the run."""
    return here if mean is None else mean + (here - mean) / min(max(step / 2, 4), step)


def side(shape: tuple[int, ...]) -> int:
    """Of all matrices that these axes make, the largest of the smaller sides; 1 of a vector."""
    matrices = [np.zeros(shape).reshape(math.prod(shape[:i]), -1) for i in range(1, len(shape))]
    return max([27, *(min(matrix.shape) for matrix in matrices)]) if matrices else 1


def histogram(gradient: np.ndarray) -> np.ndarray:
    """Counts of log2 |g| in the buckets [2^k, 2^(k+2)); both ends take what lies beyond."""
    sizes = np.abs(gradient[np.isfinite(gradient)])
    edges = 2.0 ** np.array(HISTOGRAM_EDGES[1:], float)
    return np.bincount(np.searchsorted(edges, sizes, side="right"), minlength=len(HISTOGRAM_EDGES))


# --- running statistics -----------------------------------------------------------------------


class RunningReference:
    """The weighted mean and variance of every value that entered, from the whole history."""

    def __init__(self, memory: statistics.Memory):
        self.memory = memory
        self.entered: list[float] = []
        self.mean = self.variance = 0.0

    @property
    def weight(self) -> float:
        return 1 - self.memory.decay ** len(self.entered)

    @property
    def std(self) -> float:
        prior = self.memory.prior**2 * self.memory.decay ** len(self.entered)
        return math.sqrt(self.variance + self.memory.floor**2 + prior)

    def add(self, x: float | None) -> None:
        if x is None or not math.isfinite(x):
            return
        x = float(np.clip(x, -statistics.LARGEST, statistics.LARGEST))
        if self.entered:
            limit = statistics.WINSOR * self.std
            x = self.mean + float(np.clip(x - self.mean, -limit, limit))
        self.entered.append(x)
        weights = self.memory.decay ** np.arange(len(self.entered))[::-1].astype(float)
        self.mean = float(np.average(self.entered, weights=weights))
        squares = np.square(np.array(self.entered) - self.mean)
        self.variance = float(np.average(squares, weights=weights))


class OvershootReference:
    """The mean cosine of about the last eighth of the run, and the deviation of one about it."""

    def __init__(self):
        self.mean = self.variance = self.last = 0.0

    def add(self, cosine: float | None, t: int) -> None:
        if cosine is None:
            return
        over = min(max(t * statistics.SPAN, statistics.LEAST_SPAN), max(t - 1, 1))
        self.mean = self.mean * (1 - 1 / over) + cosine / over
        halved = (cosine - self.last) ** 2 / 2
        self.variance = 0.0 if t < 3 else self.variance * (1 - 1 / over) + halved / over
        self.last = cosine

    @property
    def in_stds(self) -> float:
        return self.mean / math.hypot(math.sqrt(self.variance), statistics.OVERSHOOT_FLOOR)


# --- the law ----------------------------------------------------------------------------------


@dataclass
class Signals:
    """What one step shows; None is a signal that could not be measured."""

    gradient_norm: float | None = 1.0  # None: it is not finite
    overshoot: float | None = None
    relative_step: float | None = None
    loss: float | None = None
    nonfinite_gradients: int = 0
    nonfinite_loss: int = 0
    nonfinite_updates: int = 0
    updates_broken: bool = False
    parameters_broken: bool = False


class Outcome(NamedTuple):
    """What the law makes of one step."""

    skip: bool
    log_scale: float
    log_applied: float
    regime: str
    action: str
    signal: str
    value: float
    threshold: float
    outstanding: float
    exhausted: bool
    calm_steps: int
    skips_in_a_row: int
    skips: int
    rollback_asked: str
    loss_excess: float
    grace: int
    rejected_share: float
    age: int


@dataclass
class LawReference:
    """Statistics and law as a Python object: `step` takes the signals of one step."""

    min_scale: float = 0.001
    max_skips: int = 30
    max_interventions: int = 50
    log_scale: float = field(init=False)
    turning_point: float = field(init=False)

    def __post_init__(self):
        self.gradient = RunningReference(statistics.GRADIENT)
        self.overshoot = OvershootReference()
        self.loss = RunningReference(statistics.LOSS)
        self.loss_slow = RunningReference(statistics.LOSS_SLOW)
        self.loss_start = RunningReference(statistics.LOSS)
        self.log_scale = self.turning_point = math.log(max(self.min_scale, control.FIRST_SCALE))
        self.started = self.settled = False
        self.since_jump = 0
        self.age, self.longest, self.shortest, self.others_in_a_row = 0, None, None, 0
        self.gradient_norms: list[float] = []
        self.jumps, self.in_a_jump, self.longest_given = 0, False, statistics.UNKNOWN
        self.since_outlier = control.COOL_DOWN
        self.row, self.loss_bound = 0, 0.0
        self.regime = "recovering"
        self.calm_steps = control.COOL_DOWN
        self.skips_in_a_row = self.skips = 0
        self.outstanding = 0.0
        self.exhausted = False
        self.last_norm = self.last_loss = self.last_step = 0.0
        self.rest_from, self.rest_steps, self.rest_reported = self.log_scale, 0, 0.0
        self.rejected: list[str | None] = []
        self.rejected_share, self.rejecting = 0.0, False
        self.loss_unit = 0.0
        self.tolerance = 0.0
        self.ceiling, self.ceiling_steps = 0.0, 0
        self.autocorrelation = 0.0
        self.rolled_back(grace=0)

    def rolled_back(
        self,
        grace: int,
        ceiling: float = 0.0,
        ceiling_steps: int = 0,
        left: tuple[float, float] = (0.0, 0.0),
        left_times: int = 0,
    ) -> None:
        """What the law forgets and holds after a return to an earlier state.

        `left` is the lowest and the last loss of the run that was left for its loss.
        """
        self.left_times = left_times
        if grace:  # the first gradients ask once
            self.gradient_norms = [1.0] * (divergence.FIRST_STEPS + divergence.NEXT_STEPS)
        self.left, self.steps_since, self.rising_steps = left, 0, 0
        self.level = RunningReference(statistics.LOSS)
        self.innovation = RunningReference(statistics.LOSS)
        self.lowest, self.quiet_std, self.recent = math.inf, statistics.LOSS.floor, 0.0
        self.last_innovation = 0.0
        self.rollback_asked = "none"
        self.inner_steps = 0
        self.loss_excess, self.grace = 0.0, grace
        self.ceiling, self.ceiling_steps = ceiling, ceiling_steps

    def step(self, seen: Signals) -> Outcome:
        unit = self.loss_unit
        start = self.loss_start.entered
        self.loss_before_start = self.loss_start.mean if start else None
        self._remember(seen)
        rejected = self._reject(seen)
        spike = self._loss_spikes(seen)
        jumped, startled, limited = self._arrives(seen, spike)
        thresholds = {"gradient_norm": self.gradient_threshold(), "loss": self.loss_threshold()}
        self._absorb(seen, bool(rejected) or limited)
        overshoot = self.overshoot.in_stds
        ceiling = control.CEILING * math.sqrt(self.age + 1) * self._room()
        trouble = bool(rejected) or startled
        self.calm_steps = 0 if trouble else self.calm_steps + 1
        too_long = seen.relative_step is not None and seen.relative_step > ceiling
        signal = "relative_step" if too_long else "overshoot"
        signal = "loss" if spike else signal
        signal = rejected or ("gradient_norm" if jumped and limited else signal)
        applied = self._move(seen, overshoot, ceiling, bool(rejected))
        turned = self._turn(trouble)
        action = "skip" if rejected else "clip" if limited else turned
        self._account(bool(rejected), action)
        action = self._held(action)
        action, shared = self._rejecting(signal if limited else rejected, action)
        self._assess(seen, rejected)
        values = vars(seen) | {
            "gradient_norm": self.last_norm,
            "loss": self.last_loss,
            "relative_step": self.last_step,
            "overshoot": overshoot,
        }
        limits = {
            "gradient_norm": math.exp(thresholds["gradient_norm"]),
            "loss": thresholds["loss"] * unit,
            "overshoot": control.SET_POINT,
            "relative_step": ceiling,
        }
        return Outcome(
            bool(rejected),
            self.log_scale,
            applied,
            self.regime,
            action,
            shared or signal,
            self.rejected_share if shared else values[signal],
            control.REJECTED_BOUND if shared else limits.get(signal, 0.0),
            self.outstanding,
            self.exhausted,
            self.calm_steps,
            self.skips_in_a_row,
            self.skips,
            self.rollback_asked,
            self.loss_excess,
            self.grace,
            self.rejected_share,
            self.age,
        )

    def _first_was_broken(self, seen: Signals) -> bool:
        """The first two gradients against the eight after them: a hundred times as long."""
        first, after = divergence.FIRST_STEPS, divergence.NEXT_STEPS
        if not seen.gradient_norm or len(self.gradient_norms) >= first + after:
            return False
        self.gradient_norms.append(seen.gradient_norm)
        if len(self.gradient_norms) < first + after:
            return False
        longest = max(self.gradient_norms[:first])
        return longest > statistics.SPIKE_FACTOR**2 * max(self.gradient_norms[first:])

    def _assess(self, seen: Signals, rejected: str | None) -> None:
        """Whether to ask for a rollback; the first reason stays, but for a more certain one."""
        grace = self.grace > 0
        broken = self._first_was_broken(seen)
        if rejected is None:
            self.inner_steps = 0
            self.grace = max(self.grace - 1, 0)
        elif rejected in ("nonfinite_updates", "relative_step"):
            self.inner_steps += 1
        self._watch_loss(seen, grace)
        signs = {
            "parameters": seen.parameters_broken,
            "inner_state": self.inner_steps >= divergence.INNER_STEPS or broken,
            "skips": not grace and self.skips_in_a_row >= divergence.SKIP_STEPS,
            "loss": self.loss_excess >= divergence.ENOUGH_EVIDENCE,
        }
        found = next((name for name, sign in signs.items() if sign), "none")
        ranks = [*signs, "none"]
        self.rollback_asked = min(self.rollback_asked, found, key=ranks.index)

    def _watch_loss(self, seen: Signals, grace: bool) -> None:
        """Page's test against the lowest mean since the start or the last rollback."""
        if self._has_level(seen):
            self._watch(self._relative(seen.loss), grace)

    def _watch(self, y: float, grace: bool) -> None:
        share = divergence.AUTOCORRELATION_SHARE
        entered = len(self.level.entered)
        tolerated = self.tolerance / (self.loss_unit or 1.0)
        margin = divergence.MARGIN_STDS * self.quiet_std + tolerated
        known = not grace and math.isfinite(self.lowest)
        level_before, innovation_before = self.level.mean, self.innovation.mean
        std_before = self.innovation.variance
        if entered:
            self.innovation.add(y - self.level.mean)
        self.level.add(y)
        self.recent += (divergence.RECENT_SHARE if entered else 1) * (y - self.recent)
        if known:
            evidence = min(max((y - self.lowest) / margin - 1, -1), divergence.MOST_EVIDENCE)
            self.loss_excess = min(max(self.loss_excess + evidence, 0), divergence.ENOUGH_EVIDENCE)
            if self.loss_excess >= divergence.ENOUGH_EVIDENCE and self._comes_again():
                self._tolerate_rise((y - self.lowest) * self.loss_unit)
                self.loss_excess = 0.0
            self.lowest += divergence.FORGOTTEN * margin
        if entered >= statistics.START_STEPS:
            missed = (y - level_before - innovation_before) / self._noise(std_before)
            missed = min(max(missed, -divergence.FARTHEST), divergence.FARTHEST)
            self.autocorrelation = (
                1 - share
            ) * self.autocorrelation + share * missed * self.last_innovation
            self.last_innovation = missed
        if entered + 1 == divergence.RETURN_STEPS:
            self._tolerate(self.level.mean * self.loss_unit)
        self.steps_since += 1
        self.rising_steps = self.rising_steps + 1 if self.loss_excess > 0 else 0
        if self.loss_excess == 0 and entered + 1 >= statistics.START_STEPS:
            self.lowest = min(self.lowest, self.level.mean)
            rho = min(
                max(self.autocorrelation - math.sqrt(share / (2 - share)), 0),
                divergence.MOST_AUTOCORRELATION,
            )
            noise = self._noise(self.innovation.variance)
            self.quiet_std = noise * math.sqrt((1 + rho) / (1 - rho))

    def _tolerate(self, here: float) -> None:
        """A rise that is there again right after a rollback is the data's."""
        low, high = self.left
        if low < high and here > (low + high) / 2:
            self._tolerate_rise(here - low)

    def _tolerate_rise(self, rise: float) -> None:
        self.tolerance = max(self.tolerance, divergence.TOLERANCE * rise)

    def _comes_again(self) -> bool:
        """A rise like the one that was left, slowly come about again."""
        of_late = self.steps_since < divergence.RETURN_WITHIN
        slowly = self.rising_steps >= divergence.SUDDEN
        often = self.left_times >= divergence.OFTEN
        return self.left[0] < self.left[1] and of_late and (slowly or often)

    def _noise(self, variance: float) -> float:
        """Standard deviation of the loss about its level, at least a share of what it was."""
        start = self.loss_before_start
        fallen = max(start - self.level.mean, 0) if start is not None else 0.0
        floor = divergence.LEAST_STD * math.hypot(self.level.mean, fallen)
        return math.sqrt(variance + floor**2)

    def _has_level(self, seen: Signals) -> bool:
        """A batch without a target has loss 0 and gradient 0."""
        return seen.loss is not None and not (seen.loss == 0 and seen.gradient_norm == 0)

    def _relative(self, loss: float) -> float:
        """Over the size of the first loss."""
        ratio = loss / self.loss_unit if self.loss_unit else 0.0
        return min(max(ratio, -statistics.LARGEST), statistics.LARGEST)

    def _remember(self, seen: Signals) -> None:
        """What an event reports of a signal that is missing is its last value."""
        if seen.gradient_norm is not None:
            self.last_norm = seen.gradient_norm
        if seen.loss is not None:
            self.last_loss = seen.loss
            self.loss_unit = self.loss_unit or abs(seen.loss)
        if seen.relative_step is not None:
            self.last_step = seen.relative_step

    def gradient_threshold(self) -> float:
        """Of log |g|."""
        width = statistics.SPIKE_STDS * self.gradient.std
        return self.gradient.mean + max(width, math.log(statistics.SPIKE_FACTOR))

    def loss_threshold(self) -> float:
        """Of the loss over the size of the first one; in a first row of jumps as it was before."""
        now = self.loss.mean + statistics.SPIKE_STDS * self.loss.std
        again = self.jumps > self.in_a_jump
        in_row = self.in_a_jump and self.row < statistics.LONGEST_ROW and not again
        return min(self.loss_bound, now) if in_row else now

    def _arrives(self, seen: Signals, spike: bool) -> tuple[bool, bool, bool]:
        """Whether a sound gradient jumps, whether the loss does and had not done so before.

        And whether anything is taken from the gradient.
        """
        bad = seen.nonfinite_gradients or seen.nonfinite_loss or seen.gradient_norm is None
        norm = _log(seen.gradient_norm) if seen.gradient_norm else -math.inf
        jumped = bool(not bad and self.gradient.entered and norm > self.gradient_threshold())
        again, given = self.jumps > self.in_a_jump, norm
        if jumped:
            usual = self.gradient.mean
            grown = 0.0 if self.in_a_jump else math.log(statistics.AGAIN)
            given = min(max(usual, self.longest_given + grown) if again else usual, given)
        startled = spike and not bad and not again
        if startled:
            given = min(given, norm - math.log(statistics.SPIKE_FACTOR))
        either = jumped or (spike and not bad)
        self.was_since_outlier = self.since_outlier
        self.since_outlier = 0 if either else self.since_outlier + 1
        if seen.gradient_norm:
            self.longest_given = max(self.longest_given, given)
            if either and not self.in_a_jump:
                self.loss_bound = self.loss_threshold()
                self.jumps += 1
                self.row = 0
            self.row += 1
            self.in_a_jump = either
        return jumped, startled, given < norm

    def _reject(self, seen: Signals) -> str | None:
        if seen.nonfinite_gradients or seen.gradient_norm is None:
            return "nonfinite_gradients"
        for name in ("nonfinite_loss", "nonfinite_updates"):
            if getattr(seen, name):
                return name
        return "relative_step" if seen.updates_broken else None

    def _loss_spikes(self, seen: Signals) -> bool:
        if not (self._has_level(seen) and self.loss.entered):
            return False
        return self._relative(seen.loss) > self.loss_threshold()

    def _absorb(self, seen: Signals, left_out: bool) -> None:
        if seen.gradient_norm is not None:
            self.gradient.add(_log(seen.gradient_norm))
        if not left_out:
            self.overshoot.add(seen.overshoot, self.age + 1)
        if self._has_level(seen):
            relative = self._relative(seen.loss)
            self.loss.add(relative)
            self.loss_slow.add(relative)
            if len(self.loss_start.entered) < statistics.START_STEPS:
                self.loss_start.add(relative)

    def _alarm(self, seen: Signals, overshoot: float) -> float:
        """How much too large the scale is; 0 where nothing was measured."""
        if seen.overshoot is None:
            return 0.0
        excess = overshoot - control.SET_POINT
        if self._is_full() and excess > 0:
            excess = max(excess - control.TRUST, 0)
        return min(max(excess, -1), 1)

    def _is_full(self) -> bool:
        return self.log_scale >= math.log(control.FULL)

    def _room(self) -> float:
        """By which the ceiling is higher where steps fall far short of what the run could take."""
        if self.age + 1 <= statistics.LEAST_SPAN:
            return 1.0
        short = max(control.SHORT - self.overshoot.mean, 0.0)
        return min(math.exp(control.ROOM * short), control.MOST_ROOM)

    def _move(self, seen: Signals, overshoot: float, ceiling: float, skip: bool) -> float:
        """The scale of this step; that which lasts is `log_scale`."""
        before, t, self.was_settled = self.log_scale, self.age + 1, self.settled
        self.was_full = self._is_full()
        if skip:
            applied = self._under_the_hosts(before)
            self.log_scale = max(applied, self._least(before))
            self.ceiling_steps = max(self.ceiling_steps - 1, 0)
            return applied
        alarm = self._alarm(seen, overshoot)
        most = min((control.GROWTH if alarm < 0 else control.CUT) / t, control.MOST)
        if alarm < 0 and not self.settled:
            most = control.MOST
        if alarm < 0 and self.calm_steps < control.COOL_DOWN:
            most = 0.0
        self.settled = self.settled or (t >= control.SETTLED_FROM and alarm > control.FIRST_ALARM)
        wanted = self._bounded(before - most * alarm)
        begins = seen.relative_step is not None and not self.started
        if seen.relative_step is None:
            applied = by_ceiling = wanted
            self.age = t
        else:
            # Of a step at full scale.
            length = math.log(max(seen.relative_step, 1e-30)) - before
            if begins:
                self.started = True
                wanted = self._bounded(math.log(control.FIRST_STEP) - length)
            by_ceiling = min(wanted, math.log(ceiling) - length)
            applied = self._jump(by_ceiling, length, t)
            self._fall(before, length, t)
        applied = self._under_the_hosts(applied)
        if seen.relative_step is not None:
            self._took(applied + length, t)
        in_wake = self.since_outlier < control.COOL_DOWN
        may_last = self._under_the_hosts(by_ceiling) if in_wake else applied
        lasting = may_last if begins else max(may_last, self._least(before))
        self.log_scale = min(wanted, lasting)
        by_host = self.ceiling_steps > 0 and self.log_scale >= self._under_the_hosts(0.0)
        self.ceiling_steps = max(self.ceiling_steps - 1, 0)
        if begins or by_host:
            self.turning_point = self.log_scale
        return applied

    def _jump(self, applied: float, length: float, t: int) -> float:
        """No step of more than twice the longest of late."""
        self.jumping = False
        if self.longest is None or t < control.JUMPS_FROM:
            return applied
        most = self.longest + math.log(control.JUMP)
        self.jumping = applied + length > most
        return min(applied, most - length)

    def _fall(self, before: float, length: float, t: int) -> None:
        """Far shorter than the shortest of late, at full scale; where the scale is not full."""
        known = self.longest is not None and t >= control.JUMPS_FROM
        low = before < math.log(control.FULL)
        self.falling = known and low and length < self.shortest - math.log(control.FALL)
        risen = math.inf if self.shortest is None else self.shortest + control.FORGOTTEN / t
        self.shortest = risen if self.falling else min(risen, length)

    def _took(self, log_step: float, t: int) -> None:
        """The longest step of late is forgotten slowly; after three others all begins anew."""
        if self.longest is None:
            self.longest = log_step
        else:
            faded = self.longest - control.FORGOTTEN / t
            started = self.was_settled or self.was_full
            most = min(control.GROWTH / t, control.MOST) if started else control.MOST
            slowly = log_step if t < control.JUMPS_FROM else min(log_step, self.longest + most)
            grown = self.longest + math.log(statistics.AGAIN)
            with_gradient = self.since_outlier == 0 and self.was_since_outlier > 0
            alone = self.since_jump >= control.APART or with_gradient
            jumped = grown if alone else faded
            self.longest = jumped if self.jumping else max(faded, slowly)
        self.since_jump = 0 if self.jumping else self.since_jump + 1
        self.others_in_a_row = self.others_in_a_row + 1 if self.jumping or self.falling else 0
        self.age = t
        more = control.COOL_DOWN if self.since_outlier < control.COOL_DOWN else 0
        if self.others_in_a_row >= control.OTHER_STEPS + more:
            self.age, self.longest, self.shortest, self.others_in_a_row = 0, None, None, 0

    def _least(self, before: float) -> float:
        """How far the scale that lasts falls in one step: what the host sets it does at once."""
        return min(before - control.MOST, self._under_the_hosts(0.0))

    def _under_the_hosts(self, log_scale: float) -> float:
        """For a while after a rollback the host sets a ceiling."""
        host = self.ceiling if self.ceiling_steps > 0 else 0.0
        return self._bounded(min(log_scale, host))

    def _bounded(self, log_scale: float) -> float:
        return min(max(log_scale, math.log(self.min_scale)), 0.0)

    def _turn(self, trouble: bool) -> str:
        """The new regime; the turning point follows the peak, under stress the trough."""
        was, turn = self.regime, -math.log(control.TURN)
        fell = self.log_scale < self.turning_point - turn
        rose = self.log_scale > self.turning_point + turn
        if trouble or (was == "unstable" and self.calm_steps < control.COOL_DOWN):
            self.regime = "unstable"
        elif was == "unstable" or (was == "stressed" and rose):
            self.regime = "recovering"
        elif was != "stressed" and fell:
            self.regime = "stressed"
        elif was == "recovering" and self.log_scale >= -turn:
            self.regime = "nominal"
        changed = self.regime != was
        if self.regime == "unstable" or (changed and self.regime != "nominal"):
            self.turning_point = self.log_scale
        elif self.regime == "stressed":
            self.turning_point = min(self.turning_point, self.log_scale)
        else:
            self.turning_point = max(self.turning_point, self.log_scale)
        reported = {"stressed": "cut", "recovering": "recover"}
        return reported.get(self.regime, "none") if changed else "none"

    def _held(self, action: str) -> str:
        """Whether a low scale has come to rest, and that is news."""
        if abs(self.log_scale - self.rest_from) > -math.log(control.TURN):
            self.rest_from, self.rest_steps = self.log_scale, 0
        elif self.calm_steps >= control.COOL_DOWN:
            self.rest_steps += 1
        news = abs(self.log_scale - self.rest_reported) > -math.log(control.LOW)
        if self._is_full():
            self.rest_reported = 0.0
        low = self.log_scale < math.log(control.LOW)
        if low and self.rest_steps >= control.REST_STEPS and news and action == "none":
            self.rest_reported = self.log_scale
            return "held"
        return action

    def _rejecting(self, rejected: str | None, action: str) -> tuple[str, str | None]:
        """Whether too many steps are rejected, and that is news; and why the newest was."""
        self.rejected.append(rejected)
        steps = min(len(self.rejected), control.LONG_RUN)
        self.rejected_share += (bool(rejected) - self.rejected_share) / steps
        many = self.rejected_share > control.REJECTED_BOUND and steps >= control.REJECTED_FROM
        if many and not self.rejecting and action == "none":
            self.rejecting = True
            return "rejecting", next(why for why in reversed(self.rejected) if why)
        self.rejecting = self.rejecting and self.rejected_share > control.REJECTED_BOUND / 2
        return action, None

    def _account(self, skip: bool, action: str) -> None:
        spends = skip or action == "cut"
        self.outstanding += 1 if spends else -control.EARNED
        self.skips_in_a_row = self.skips_in_a_row + 1 if skip else 0
        self.skips += skip
        is_over = self.outstanding > self.max_interventions
        if self.skips_in_a_row >= self.max_skips or (skip and is_over):
            self.exhausted = True
        self.outstanding = min(max(self.outstanding, 0.0), float(self.max_interventions))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
