"""Charts as static SVG: curves over steps, and a time line of regimes and interventions.

A chart is 1000 units wide. Runs differ by colour, by dashes and by the shape of their markers;
interventions by shape and lane; regimes by hatching and name.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from lbw_optax.law.divergence import Reason
from lbw_optax.report import sampling, words
from lbw_optax.report.reading import Run, kept, steps, watches
from lbw_optax.sentences import ASKS, CAUSES, logged

WIDTH, LEFT, RIGHT = 1000, 62, 960
TOP, HEIGHT, BELOW = 14, 150, 22
# Buckets along a chart, two points each at most; and points of a smooth curve.
BUCKETS, SMOOTH_POINTS = 450, 150
# So many marks a run are drawn at most: beyond it neighbours become one.
MARKS = 240
# Up to so many points of a curve are drawn as dots as well.
FEW = 40
STYLES = 6  # of runs; the page's style sheet has them


class Chart(NamedTuple):
    """What a chart shows.

    Attributes:
      column: the name of the metric; also of one that ends in it after a slash.
      title: what the chart is called.
      is_log: whether the axis is logarithmic: True, False, or None for where the range asks for it.
      is_noisy: whether a smooth curve is drawn above the numbers themselves.
    """

    column: str
    title: str
    is_log: bool | None = None
    is_noisy: bool = False


CHARTS = (
    Chart("loss", "Loss", None, True),
    Chart("scale", "Scale: what the updates are multiplied by", True),
    Chart("learning_rate", "Learning rate, before the scale"),
    Chart("gradient_norm", "Gradient norm", True, True),
    Chart("relative_step", "Relative step: length of a step over that of the parameters", True),
    Chart("overshoot", "Overshoot: above 0 the run went too far from its mean", False, True),
    Chart("update_norm", "Update norm", True),
    Chart("parameter_norm", "Parameter norm"),
    Chart("activation_peak", "Peak of the activations: max over RMS of the farthest layer", None),
    Chart("attention_logit", "Largest attention logit"),
    Chart("risk_10", "Probability that the run diverges within 10 steps", False),
    Chart("rejected_share", "Share of rejected steps, of the last 1000", False),
    Chart("outstanding", "Interventions that are not yet earned back", False),
    Chart("valid_perplexity", "Perplexity on the valid split", None),
    Chart("eval_loss", "Loss of evaluations", None),
    Chart("tokens_per_second", "Tokens a second"),
)


# What a guard was never told of is 0 at every step.
_TOLD = ("activation_peak", "attention_logit")


class Line(NamedTuple):
    """One curve."""

    name: str
    style: int  # of the run
    step: np.ndarray
    value: np.ndarray  # infinite where it was not finite
    undone: list[tuple[np.ndarray, np.ndarray]]  # what was made again: steps and values
    threshold: tuple[np.ndarray, np.ndarray]  # where one was recorded
    is_sparse: bool = False  # known at interventions only: what is between the dots is not


class Frame(NamedTuple):
    """From numbers to places in a chart."""

    x0: float
    x1: float
    y0: float
    y1: float
    is_log: bool

    def x(self, step: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (step - self.x0) / (self.x1 - self.x0)

    def y(self, value: Any) -> Any:
        value = np.log10(np.maximum(value, 10.0**self.y0)) if self.is_log else value
        share = (np.clip(value, self.y0, self.y1) - self.y0) / (self.y1 - self.y0)
        return TOP + HEIGHT * (1 - share)


def extent(runs: Sequence[Run]) -> tuple[float, float]:
    """The first and the last step of all runs."""
    found = [steps(run.columns) for run in runs]
    found += [np.array([line["step"] for line in run.audit if "step" in line]) for run in runs]
    every = np.concatenate([x for x in found if len(x)] or [np.zeros(1)])
    every = every[np.isfinite(every)]
    low, high = float(every.min()), float(every.max())
    # One step apart at least, also where steps are so large that float64 has no next one.
    return low, max(high, low + max(1.0, 1e-12 * abs(low)))


def title_of(chart: Chart, runs: Sequence[Run]) -> str:
    """What a chart is called, of these runs."""
    if chart.column == "scale" and all(watches(run) for run in runs):
        return "Scale: what the updates would have been multiplied by"
    return chart.title


def curves(chart: Chart, runs: Sequence[Run], x: tuple[float, float], detail: float = 1.0) -> str:
    """The chart as SVG; "" where no run has anything for it. `detail` is a share of `BUCKETS`."""
    lines = [line for i, run in enumerate(runs) for line in lines_of(chart, run, i, len(runs))]
    finite = [line.value[np.isfinite(line.value)] for line in lines]
    finite += [y[np.isfinite(y)] for line in lines for _, y in line.undone]
    finite += [line.threshold[1] for line in lines]
    every = np.concatenate(finite) if finite else np.zeros(0)
    if not lines or (not len(every) and not any(len(line.value) for line in lines)):
        return ""
    low, high, is_log = value_range(every, chart.is_log)
    frame = Frame(*x, low, high, is_log)
    buckets = max(int(detail * BUCKETS) // max(len(lines) - 1, 1), 60)
    title = title_of(chart, runs)
    parts = [_axes(frame)]
    parts += [_curve(line, frame, chart, buckets, len(lines)) for line in lines]
    if chart.column == "loss":
        parts += [_jumps(run, i, frame) for i, run in enumerate(runs)]
    data = f'data-x0="{frame.x0:.10g}" data-x1="{frame.x1:.10g}" data-y0="{frame.y0:.6g}"'
    data += f' data-y1="{frame.y1:.6g}" data-log="{int(frame.is_log)}"'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" role="img" '
        f'aria-label="{escape(_spoken(title, lines))}" '
        f'viewBox="0 0 {WIDTH} {TOP + HEIGHT + BELOW}" {data}>{"".join(parts)}</svg></figure>'
    )


def lines_of(chart: Chart, run: Run, style: int, runs: int) -> list[Line]:
    """The columns of a run that belong to a chart: one, or one of each of its guards."""
    found = []
    step = steps(run.columns)
    for name, column in run.columns.items():
        prefix, slash, last = name.rpartition("/")
        if chart.column not in (name, last) or (slash and last in run.columns):
            continue
        given = ~np.isnan(column)
        if not given.any() or (chart.column in _TOLD and not column[given].any()):
            continue
        at, value = step[given], column[given]
        stays = kept(at)
        title = run.name if runs > 1 or not prefix else ""
        label = " · ".join(x for x in (title, prefix) if x)
        found.append(
            Line(
                label,
                style,
                at[stays],
                value[stays],
                _undone(at, value, stays),
                _thresholds(chart, run, name),
            )
        )
    if not found and chart.column in ("scale", "loss"):
        found = _told(chart, run, style)
    return found


def _told(chart: Chart, run: Run, style: int) -> list[Line]:
    """Where there are no metrics: what the interventions tell of scale and loss."""
    told = "scale_after" if chart.column == "scale" else "loss"
    pairs = [
        (line["step"], float(line[told]))
        for line in run.audit
        if "step" in line and isinstance(line.get(told), int | float)
    ]
    if not pairs:
        return []
    step, value = (np.array(x, np.float64) for x in zip(*pairs, strict=True))
    stays = kept(step)
    nothing = np.zeros(0), np.zeros(0)
    name = f"{run.name}, at interventions"
    return [Line(name, style, step[stays], value[stays], [], nothing, True)]


def _undone(
    step: np.ndarray, value: np.ndarray, stays: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What was left behind, in stretches."""
    left = np.flatnonzero(~stays)
    breaks = np.flatnonzero((np.diff(left) > 1) | (np.diff(step[left]) <= 0)) + 1
    return [(step[part], value[part]) for part in np.split(left, breaks) if len(part)]


def _thresholds(chart: Chart, run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Recorded with every step, as NAME_threshold, or else at the interventions for this signal."""
    column = run.columns.get(f"{name}_threshold")
    if column is not None:
        good = np.isfinite(column)
        return steps(run.columns)[good], column[good]
    # Overshoot is judged in standard errors, which are in no column.
    of_signal = [
        (line["step"], float(line["threshold"]))
        for line in run.audit
        if line.get("signal") == chart.column != "overshoot"
        and line["action"] != "rejecting"  # there it is of the share of rejected steps
        and isinstance(line.get("threshold"), int | float)
        and line["threshold"] != 0
    ]
    found = np.array(sorted(of_signal), np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def value_range(y: np.ndarray, is_log: bool | None) -> tuple[float, float, bool]:
    """Ends of the axis, as logarithms where it is logarithmic."""
    positive = y[y > 0]
    if is_log is None:
        is_log = bool(len(y)) and bool((y > 0).all()) and y.max() / y.min() > 30
    if is_log and len(positive):
        low, high = np.log10([positive.min(), positive.max()])
        room = max(0.04 * (high - low), 0.02)
        return float(low - room), float(high + room), True
    low, high = (float(y.min()), float(y.max())) if len(y) else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room, False


def _axes(frame: Frame) -> str:
    parts = [f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{HEIGHT}"/>']
    for value in ticks(frame.y0, frame.y1, frame.is_log):
        y = float(frame.y(value))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{value:.4g}</text>')
    return "".join(parts) + step_axis(frame.x0, frame.x1, TOP + HEIGHT)


def step_axis(x0: float, x1: float, bottom: float) -> str:
    """Ticks and numbers along the steps."""
    parts = []
    for step in ticks(x0, x1, False, 8):
        x = LEFT + (RIGHT - LEFT) * (step - x0) / (x1 - x0)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 16}">{step:,.6g}</text>')
    parts.append(f'<text class="tick end axis" x="{LEFT - 6}" y="{bottom + 16}">step</text>')
    return "".join(parts)


def ticks(low: float, high: float, is_log: bool, most: int = 5) -> list[float]:
    """Round numbers between the ends; of a logarithmic axis the ends are logarithms.

    >>> ticks(0, 10, False), ticks(-2.1, 1.2, True)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.01, 0.1, 1.0, 10.0])
    """
    if is_log and high - low > 1.2:
        every = max(1, math.ceil((high - low) / most))
        decades = range(math.ceil(low), math.floor(high) + 1)
        return [10.0**k for k in decades if k % every == 0]
    if is_log:
        return [x for x in ticks(10**low, 10**high, False, most) if x > 0]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    return [round(k * size, 12) for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _curve(line: Line, frame: Frame, chart: Chart, buckets: int, lines: int) -> str:
    """What was left behind, the numbers, a smooth curve above them, marks of what is not finite."""
    style = f"r{line.style % STYLES}"
    parts = [
        f'<path class="undone {style}" d="{_path(step, value, frame, 80)}"/>'
        for step, value in line.undone[-12:]
    ]
    parts += [_threshold(line, frame, style)]
    finite, is_smooth = np.isfinite(line.value), has_mean(chart, line)
    raw = "raw" if is_smooth else "undone" if line.is_sparse else "line"
    path = _path(line.step, line.value, frame, buckets)
    name = escape(line.name)
    parts.append(f'<path class="{raw} read {style}" data-n="{name}" d="{path}"/>')
    if is_smooth:
        step, value = line.step[finite], line.value[finite]
        value = np.log(np.maximum(value, 1e-300)) if frame.is_log else value
        value = sampling.smooth(value, max(len(value) // 60, 3))
        pick = np.unique(np.linspace(0, len(step) - 1, SMOOTH_POINTS).astype(int))
        value = np.exp(value) if frame.is_log else value
        step, value = step[pick], value[pick]
        parts.append(f'<path class="line {style}" d="{_joined(step, value, frame)}"/>')
    else:
        step, value = line.step[finite], line.value[finite]
    if 0 < len(step) <= FEW:
        dots = "".join(
            f"M{x:.1f} {y:.1f}h.1" for x, y in zip(frame.x(step), frame.y(value), strict=True)
        )
        parts.append(f'<path class="dots {style}" d="{dots}"/>')
    elif lines > 1 and len(step):
        parts.append(_shapes(step, value, frame, line.style))
    parts += _not_finite(line, frame, style)
    return "".join(parts)


def has_mean(chart: Chart, line: Line) -> bool:
    """Whether a moving mean is drawn above the numbers."""
    return chart.is_noisy and bool(np.isfinite(line.value).sum() > 60)


def _path(step: np.ndarray, value: np.ndarray, frame: Frame, buckets: int) -> str:
    """With a gap wherever the value is not finite."""
    finite = np.isfinite(value)
    cuts = np.flatnonzero(np.diff(finite.astype(int))) + 1
    pieces = [x for x in np.split(np.arange(len(step)), cuts) if len(x) and finite[x[0]]]
    if len(pieces) > buckets // 2:  # gaps finer than the picture
        pieces = [np.flatnonzero(finite)]
    drawn = []
    for piece in pieces:
        x, y = step[piece], value[piece]
        share = (x[-1] - x[0]) / (frame.x1 - frame.x0)
        pick = sampling.extremes(x, y, x[0], x[-1], max(int(buckets * share), 1))
        drawn.append(_joined(x[pick], y[pick], frame))
    return "".join(drawn)


def _joined(step: np.ndarray, value: np.ndarray, frame: Frame) -> str:
    points = [
        f"{x:.1f} {y:.1f}".replace(".0 ", " ")
        for x, y in zip(frame.x(step), frame.y(value), strict=True)
    ]
    if len(points) == 1:
        return f"M{points[0]}h.1"  # a dot, with round ends
    return "M" + " ".join(points)


def _threshold(line: Line, frame: Frame, style: str) -> str:
    step, value = line.threshold
    if not len(step):
        return ""
    if len(step) > 1 and len(np.unique(value)) == 1:
        y = float(frame.y(value[0]))
        said = f"threshold {value[0]:.3g}"
        return (
            f'<path class="threshold" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
            f'<text class="name end" x="{RIGHT - 4}" y="{y - 4:.1f}">{said}</text>'
        )
    if len(step) > 200:
        return f'<path class="threshold {style}" d="{_path(step, value, frame, 150)}"/>'
    dashes = (f"M{x - 4:.1f} {y:.1f}h8" for x, y in zip(frame.x(step), frame.y(value), strict=True))
    return f'<path class="threshold-at {style}" d="{"".join(dashes)}"/>'


def _shapes(step: np.ndarray, value: np.ndarray, frame: Frame, style: int) -> str:
    """Some markers along a curve, at other places for each run, and its number at the end."""
    wanted = np.linspace(step[0], step[-1], 7)[:-1] + (step[-1] - step[0]) / 42 * (style % 6)
    at = np.unique(np.clip(np.searchsorted(step, wanted), 0, len(step) - 1))
    shape = "".join(
        MARKERS[style % STYLES].format(x, y)
        for x, y in zip(frame.x(step[at]), frame.y(value[at]), strict=True)
    )
    x, y = float(frame.x(step[-1])), float(frame.y(value[-1]))
    number = (
        f'<text class="label r{style % STYLES}" x="{x + 5:.1f}" y="{y + 4:.1f}">{style + 1}</text>'
    )
    return f'<path class="shape r{style % STYLES}" d="{shape}"/>{number}'


MARKERS = (
    "M{:.1f} {:.1f}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",  # circle
    "M{:.1f} {:.1f}m-3-3h6v6h-6z",  # square
    "M{:.1f} {:.1f}m0-4l4 7h-8z",  # triangle
    "M{:.1f} {:.1f}m0-4l4 4l-4 4l-4-4z",  # diamond
    "M{:.1f} {:.1f}m-4-3h8l-4 7z",  # triangle, on its head
    "M{:.1f} {:.1f}m-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",  # cross
)


def _not_finite(line: Line, frame: Frame, style: str) -> list[str]:
    """A cross at the upper edge wherever the value was not finite, neighbours as one."""
    broken = line.step[~np.isfinite(line.value)]
    if not len(broken):
        return []
    bucket = sampling.bucket_of(broken, frame.x0, frame.x1, 60)
    marks = []
    for part in np.split(broken, np.flatnonzero(np.diff(bucket)) + 1):
        where = f"step {part[0]:,.0f}"
        where += f" to {part[-1]:,.0f}, {len(part)} times" if len(part) > 1 else ""
        x = float(frame.x(part[0]))
        marks.append(
            f'<path class="mark nonfinite {style}" tabindex="-1" role="listitem" '
            f'aria-label="{escape(line.name)}: not finite, {where}" d="M{x - 4:.1f} {TOP - 4}l8 '
            f'8m0-8l-8 8"/>'
        )
    label = "Where it is not finite"
    return [f'<g class="lane" role="list" aria-label="{label}">', *marks, "</g>"]


def _jumps(run: Run, style: int, frame: Frame) -> str:
    """Rollbacks, as arrows at the upper edge from the step that was left to that gone back to.

    Where there are very many, their heads alone.
    """
    lines = [line for line in run.audit if line["action"] == "rollback" and _has_ends(line)]
    head = "l5-4m-5 4l5 4"
    if len(lines) > FEW:
        at = np.unique([round(float(frame.x(line["to_step"]))) for line in lines])
        drawn = [f"M{x} {TOP + 6}{head}" for x in at]
    else:
        bottom = TOP + HEIGHT
        ends = [[float(frame.x(line[k])) for k in ("from_step", "to_step")] for line in lines]
        drawn = [
            f"M{left:.1f} {bottom}V{TOP + 6}H{back:.1f}{head}m-5-4V{bottom}" for left, back in ends
        ]
    return f'<path class="jump r{style % STYLES}" d="{"".join(drawn)}"/>' if drawn else ""


def _has_ends(line: dict[str, Any]) -> bool:
    return all(type(line.get(x)) is int for x in ("from_step", "to_step"))


def _spoken(title: str, lines: Sequence[Line]) -> str:
    """The chart in words, for whoever cannot see it."""
    said = []
    for line in lines:
        finite = line.value[np.isfinite(line.value)]
        if len(finite):
            said.append(
                f"{line.name} from {words.number(finite[0])} to {words.number(finite[-1])}, "
                f"least {words.number(finite.min())}, largest {words.number(finite.max())}"
            )
    return f"{title}. {'; '.join(said)}"


# --- The time line -------------------------------------------------------------------------------

LANES = {
    "rollback": ("went back", "M{0:.1f} {1}m5-5l-9 5l9 5z"),
    "skip": ("skipped", "M{0:.1f} {1}m-4-4l8 8m0-8l-8 8"),
    "clip": ("gradient scaled back", "M{0:.1f} {1}m-4 0h8m-4-4v8"),
    "cut": ("updates cut", "M{0:.1f} {1}m-5-4h10l-5 9z"),
    "held": ("scale rests, low", "M{0:.1f} {1}m0-5l5 5l-5 5l-5-5z"),
    "rejecting": ("many rejected", "M{0:.1f} {1}m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0m2 0h6"),
    "alarm": ("divergence looks likely", "M{0:.1f} {1}m0-5l5 9h-10z"),
    "freeze": ("layer frozen", "M{0:.1f} {1}m-4-5h8l-8 10h8z"),
    "thaw": ("layer thaws", "M{0:.1f} {1}m-5 0h10m-8-3v6m6-6v6"),
    "asked": ("would have gone back", "M{0:.1f} {1}m5-5l-9 5l9 5z"),
    "seen": ("stands out", "M{0:.1f} {1}m-4-4l8 8m0-8l-8 8"),
    "recover": ("grows again", "M{0:.1f} {1}m-5 4h10l-5-9z"),
    "order": ("ordered", "M{0:.1f} {1}m-3-5h2v10h-2zm4 0h2v10h-2z"),
}
_LANE, _STRIP = 18, 16
# The worst first, where several share a place in the picture.
WORST_FIRST = ("unstable", "stressed", "recovering", "nominal")


def time_line(
    run: Run,
    marks: Sequence[dict[str, Any]],
    style: int,
    x: tuple[float, float],
    detail: float = 1.0,
) -> str:
    """Regimes as a strip, and a lane for each kind of mark; "" without any.

    Args:
      run: for its regimes.
      marks: lines of its audit log, or of what a guard would have seen.
      style: of the run.
      x: first and last step.
      detail: a share of `MARKS`.
    """
    stretches = regimes(run, x)
    lanes = {
        action: [line for line in marks if line["action"] == action and "step" in line]
        for action in LANES
    }
    lanes = {action: lines for action, lines in lanes.items() if lines}
    if not stretches and not lanes:
        return ""
    frame = Frame(*x, 0, 1, False)
    y, parts = 4.0, []
    if stretches:
        parts += [f'<text class="tick end" x="{LEFT - 6}" y="{y + 12}">regime</text>']
        for start, end, regime in stretches:
            at, width = float(frame.x(start)), float(frame.x(end) - frame.x(start))
            parts.append(
                f'<rect class="regime {regime}" x="{at:.1f}" y="{y}" width="{max(width, 1):.1f}" '
                f'height="{_STRIP}"/>'
            )
            if width > 70:
                parts.append(f'<text class="name" x="{at + 4:.1f}" y="{y + 12}">{regime}</text>')
        y += _STRIP + 6
    buckets = _bucket_count(lanes, x, int(detail * MARKS))
    for action, lines in lanes.items():
        parts.append(_lane(run, action, lines, frame, y + _LANE / 2, buckets))
        y += _LANE
    height = y + BELOW + 4
    title = "Regimes and interventions"
    if not run.guarded:
        title = "What a guard would have seen"
    return (
        f"<figure><figcaption>{title}: {escape(run.name)}</figcaption>"
        f'<svg class="times r{style % STYLES}" role="group" aria-label="{title}: '
        f'{escape(run.name)}" viewBox="0 0 {WIDTH} {height:.0f}">{"".join(parts)}'
        f"{step_axis(*x, y + 2)}</svg></figure>"
    )


def regimes(run: Run, x: tuple[float, float]) -> list[tuple[float, float, str]]:
    """Stretches of one regime: first step, last step, name."""
    names = run.columns.get("regime")
    if names is None or names.dtype.kind != "U":
        return []
    step = steps(run.columns)
    good = kept(step) & (names != "")
    step, names = step[good], names[good]
    rank = np.array([len(WORST_FIRST) - WORST_FIRST.index(name) for name in names.tolist()])
    pick = sampling.worst(step, rank, *x, BUCKETS // 2)
    return sampling.runs_of(step[pick], names[pick])


def _bucket_count(lanes: dict[str, list[dict[str, Any]]], x: tuple[float, float], most: int) -> int:
    """As many places along the picture as leave at most so many marks in all lanes."""
    places = [np.array([line["step"] for line in lines], np.float64) for lines in lanes.values()]
    buckets = 150
    while buckets > 10:
        used = sum(len(np.unique(sampling.bucket_of(at, *x, buckets))) for at in places)
        if used <= most:
            break
        buckets = buckets * 3 // 4
    return buckets


def _lane(
    run: Run, action: str, lines: list[dict[str, Any]], frame: Frame, y: float, buckets: int
) -> str:
    title, shape = LANES[action]
    at = np.array([line["step"] for line in lines], np.float64)
    order = np.argsort(at, kind="stable")
    groups = np.split(
        order, np.flatnonzero(np.diff(sampling.bucket_of(at[order], *frame[:2], buckets))) + 1
    )
    acts = not watches(run)
    grouped = [[lines[i] for i in group] for group in groups]
    marks = [_mark(group, shape, frame, y, acts) for group in grouped]
    marks += _counts(grouped, frame, y)
    return (
        f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5}">{_SHORT.get(action, action)}</text>'
        f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>'
        f'<g class="lane" role="list" aria-label="{escape(f"{run.name}: {title}")}">'
        f"{''.join(marks)}</g>"
    )


_SHORT = {"rollback": "back", "asked": "back?", "seen": "jump", "rejecting": "rejects"}


def _counts(groups: list[list[dict[str, Any]]], frame: Frame, y: float) -> list[str]:
    """Beside a mark that stands for several, how many, where there is room for it."""
    starts = [float(frame.x(group[0]["step"])) for group in groups]
    found = []
    for group, x, following in zip(groups, starts, [*starts[1:], math.inf], strict=True):
        total = sum(words.multiplicity(line) for line in group)
        if total > 1 and following - x > 50:
            end = float(frame.x(group[-1].get("last_step", group[-1]["step"])))
            at = min(max(x, end), following - 34, RIGHT - 34) + 8
            found.append(f'<text class="name" x="{at:.1f}" y="{y + 3.5}">×{total:,}</text>')
    return found


def _mark(lines: list[dict[str, Any]], shape: str, frame: Frame, y: float, acts: bool) -> str:
    """One mark; what it shows on hover is the first line as the audit log has it."""
    first, last = lines[0], lines[-1]
    total = sum(words.multiplicity(line) for line in lines)
    said = said_of(first, acts=acts)
    if len(lines) > 1:
        end = last.get("last_step", last["step"])
        said = f"{total} times, step {first['step']} to {end}. The first: {said}"
    x = float(frame.x(first["step"]))
    raw = json.dumps(first, separators=(", ", ": "), ensure_ascii=False)
    raw = raw.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")
    row = ""
    if "last_step" in first or len(lines) > 1:
        width = float(frame.x(last.get("last_step", last["step"]))) - x
        row = f'<path class="row" d="M{x:.1f} {y}h{width:.1f}"/>' if width > 4 else ""
    return (
        f'{row}<path class="mark {first["action"]}" tabindex="-1" role="listitem" '
        f'aria-label="{escape(said)}" data-line=\'{raw}\' d="{shape.format(x, y)}"/>'
    )


def said_of(line: dict[str, Any], *, acts: bool = True) -> str:
    """An intervention in a sentence; of a line that lacks something, what it has.

    `acts` says whether the guard's decisions were applied.
    """
    try:
        if line["action"] == "asked":
            why = ASKS[Reason[line["signal"].upper()]]
            return f"Step {line['step']}: the guard would have asked to go back: {why}."
        if line["action"] == "seen":
            row = f", {line['count']} times to step {line['last_step']}" if "count" in line else ""
            return f"Step {line['step']}: {CAUSES[line['signal']]}{row}."
        return logged(line, acts=acts)[1]
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"Step {line.get('step', '?')}: {line['action']}."
