"""The same charts as one PNG, for a chat or a slide. Needs matplotlib."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbw_optax.law.telemetry import HISTOGRAM_EDGES
from lbw_optax.report import charts, frozen, heat, layers, sampling
from lbw_optax.report.page import Told
from lbw_optax.report.reading import Run

# Points of a curve at most; the least and the largest of every place are among them.
POINTS = 1500
WIDE, DPI = 11.0, 100  # inches, and dots in each
# As the page has them, in light: of runs by number, and of interventions by lane.
COLOURS = ("#0b5cad", "#b3400a", "#00704f", "#8a2f83", "#7a5c00", "#333333")
DASHES = ("-", (0, (7, 3)), (0, (2, 2)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 2)))
_HATCHES = {"nominal": "", "stressed": "////", "unstable": "xxxx", "recovering": "...."}
_MARKERS = {
    "rollback": "<",
    "skip": "x",
    "clip": "+",
    "cut": "v",
    "held": "D",
    "rejecting": "o",
    "alarm": "*",
    "freeze": "h",
    "thaw": "1",
    "asked": "<",
    "seen": "x",
    "recover": "^",
    "order": "|",
}

Panel = tuple[float, Callable[[Any], None]]  # a height in inches, and what draws on its axes


def picture(told: Sequence[Told], path: Path) -> None:
    """Draw one run or several; the file is replaced as a whole.

    Raises:
      ImportError: without matplotlib, with the command that installs it.
      OSError: if it cannot be written; FileExistsError if there is a file that is no picture of
        ours.
    """
    figure_of = _figure()
    _see_that_it_is_ours(path)
    runs = [one.run for one in told]
    x = charts.extent(runs)
    story = "\n\n".join(_story(one, len(told)) for one in told)
    drawn = [_times(one, x) for one in told] + _panels(runs, x)
    panels = [panel for panel in drawn if panel is not None]
    heights = [height for height, _ in panels]
    top = 0.25 + 0.2 * (story.count("\n") + 1)
    tall = top + sum(heights) + 0.62 * len(panels) + 0.3
    figure = figure_of(figsize=(WIDE, tall), dpi=DPI, facecolor="white")
    figure.text(0.25 / WIDE, 1 - 0.2 / tall, story, va="top", fontsize=10)
    at = tall - top
    for height, draw in panels:
        at -= 0.42 + height
        axes = figure.add_axes((0.9 / WIDE, at / tall, 1 - 1.3 / WIDE, height / tall))
        axes.set_xlim(*x)
        axes.tick_params(labelsize=8)
        draw(axes)
        how = {"ha": "right", "va": "top", "fontsize": 8, "textcoords": "offset points"}
        axes.annotate("step", (0, 0), (-6, -6), xycoords="axes fraction", **how)
        at -= 0.2
    new = path.with_name(f"{path.name}.new")
    figure.savefig(new, format="png", metadata={"Software": _MARK})
    new.replace(path)


# In each picture that is drawn here, among its first bytes.
_MARK = "lbw-report"


def _see_that_it_is_ours(path: Path) -> None:
    """Never over a file that is none of ours, as the log of the run itself."""
    if path.exists():
        with path.open("rb") as file:
            begins = file.read(256)
        if not (begins.startswith(b"\x89PNG") and _MARK.encode() in begins):
            raise FileExistsError(
                17, "is there and no picture of ours; pass another file with --png", str(path)
            )


def _figure() -> Any:
    """Of matplotlib without a window system, nor a word to the rest of the program."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "A PNG needs matplotlib: pip install 'lbw_optax[report]', or leave --png out."
        ) from error

    def figure_of(**how: Any) -> Any:
        figure = Figure(**how)
        FigureCanvasAgg(figure)
        return figure

    return figure_of


def _story(told: Told, runs: int) -> str:
    name = f"{told.run.name}: " if runs > 1 else ""
    return _plain(textwrap.fill(f"{name}{told.story}", 135))


def _plain(text: str) -> str:
    """As it is: what stands between two dollars would be drawn as a formula."""
    return text.replace("$", r"\$")


def _panels(runs: Sequence[Run], x: tuple[float, float]) -> list[Panel | None]:
    panels: list[Panel | None] = []
    for chart in charts.CHARTS:
        panels.append(_curves(chart, runs, x))
        if chart.column == "gradient_norm":
            panels += [_heat(run, found, len(runs)) for run in runs for found in heat.maps(run, x)]
        if chart.column == "attention_logit":
            panels += [_layers(run, y, len(runs)) for run in runs for y in layers.maps(run, x)]
            panels += [
                _frozen(run, y, len(runs))
                for run in runs
                if (y := frozen.map_of(run, x)) is not None
            ]
    return panels


def _curves(chart: charts.Chart, runs: Sequence[Run], x: tuple[float, float]) -> Panel | None:
    lines = [y for i, run in enumerate(runs) for y in charts.lines_of(chart, run, i, len(runs))]
    values = [y.value[np.isfinite(y.value)] for y in lines]
    every = np.concatenate([*values, *(y.threshold[1] for y in lines)]) if lines else np.zeros(0)
    if not len(every):
        return None
    low, high, is_log = charts.value_range(every, chart.is_log)
    ends = (10.0**low, 10.0**high) if is_log else (low, high)

    def draw(axes: Any) -> None:
        title = charts.title_of(chart, runs)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_yscale("log" if is_log else "linear")
        axes.set_yticks(ticks := charts.ticks(low, high, is_log), [f"{y:.4g}" for y in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(*ends)
        axes.grid(axis="y", color="#d9dee4", linewidth=0.6)
        for line in lines:
            _curve(axes, line, charts.has_mean(chart, line), is_log, x)
        if chart.column == "loss":
            for i, run in enumerate(runs):
                _jumps(axes, run, i)
        if len(lines) > 1:
            _legend(axes, ncols=len(lines))

    return 1.5, draw


def _curve(
    axes: Any, line: charts.Line, is_smooth: bool, is_log: bool, x: tuple[float, float]
) -> None:
    colour, dashes = COLOURS[line.style % 6], DASHES[line.style % 6]
    finite = np.isfinite(line.value)
    step, value = line.step[finite], line.value[finite]
    pick = sampling.extremes(step, value, *x, POINTS // 2)
    # Numbers that are not finite leave a gap, and a cross at the upper edge.
    gaps = np.where(finite, line.value, np.nan) if len(line.step) <= POINTS else None
    at, drawn = (line.step, gaps) if gaps is not None else (step[pick], value[pick])
    name = _plain(line.name)
    how = {"linewidth": 0.6, "alpha": 0.5} if is_smooth else {"linewidth": 1.3, "label": name}
    few = "o" if 0 < len(step) <= charts.FEW else None
    axes.plot(at, drawn, color=colour, linestyle="-" if is_smooth else dashes, marker=few, **how)
    if is_smooth:
        smoothed = np.log(np.maximum(value, 1e-300)) if is_log else value
        smoothed = sampling.smooth(smoothed, max(len(smoothed) // 60, 3))
        smoothed = np.exp(smoothed) if is_log else smoothed
        axes.plot(step, smoothed, color=colour, linestyle=dashes, linewidth=1.4, label=name)
    for old, was in line.undone:
        axes.plot(old, np.where(np.isfinite(was), was, np.nan), ":", color=colour, linewidth=1)
    if len(line.threshold[0]):
        together = len(line.threshold[0]) > 200 or len(np.unique(line.threshold[1])) == 1
        axes.plot(*line.threshold, "--" if together else "_", color="black", linewidth=0.8)
    edge = axes.get_xaxis_transform()
    axes.plot(
        line.step[~finite],
        np.ones((~finite).sum()),
        "x",
        color=colour,
        transform=edge,
        clip_on=False,
    )


def _legend(axes: Any, **how: Any) -> None:
    """Beside the title, where no curve is."""
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, **how)


def _jumps(axes: Any, run: Run, style: int) -> None:
    edge = axes.get_xaxis_transform()
    for line in run.audit:
        ends = [line.get("from_step"), line.get("to_step")]
        if line["action"] == "rollback" and None not in ends:
            arrow = {"arrowstyle": "->", "color": COLOURS[style % 6]}
            places = {"xycoords": edge, "textcoords": edge}
            axes.annotate("", (ends[1], 0.93), (ends[0], 0.93), arrowprops=arrow, **places)


def _times(told: Told, x: tuple[float, float]) -> Panel | None:
    """Regimes as a strip, and a lane for each kind of mark."""
    stretches = charts.regimes(told.run, x)
    lanes = [a for a in charts.LANES if any(y["action"] == a and "step" in y for y in told.marks)]
    if not stretches and not lanes:
        return None
    rows = [*(["regime"] if stretches else []), *lanes]

    def draw(axes: Any) -> None:
        what = "Regimes and interventions" if told.run.guarded else "What a guard would have seen"
        title = _plain(f"{what}: {told.run.name}")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for start, end, regime in stretches:
            how = {"hatch": _HATCHES[regime], "facecolor": "none", "edgecolor": "#5c6570"}
            axes.barh(0, max(end - start, 1e-9), 0.8, left=start, linewidth=0.5, **how)
        for action in lanes:
            marked = [y for y in told.marks if y["action"] == action and "step" in y]
            at, ends = ([y.get(k, y["step"]) for y in marked] for k in ("step", "last_step"))
            place = rows.index(action)
            axes.hlines([place] * len(at), at, ends, color=COLOURS[0], linewidth=3, alpha=0.35)
            marks = axes.plot(at, [place] * len(at), _MARKERS[action], color=COLOURS[0])
            marks[0].set(markersize=5, clip_on=False)
        used = dict.fromkeys(regime for _, _, regime in stretches)
        if used:
            patch = [axes.bar(0, 0, hatch=_HATCHES[y], facecolor="none", label=y) for y in used]
            _legend(axes, handles=patch, ncols=4)

    return 0.22 * len(rows) + 0.1, draw


def _heat(run: Run, found: heat.Map, runs: int) -> Panel:
    def draw(axes: Any) -> None:
        title = _plain(heat.title_of(run, found, runs))
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        shade = np.ma.masked_invalid(
            np.where(np.isnan(found.share), np.nan, heat.level(found.share))
        )
        rows = np.arange(len(HISTOGRAM_EDGES) + 1)
        axes.pcolormesh(found.edges, rows, shade.T, cmap="Blues", vmin=0, vmax=heat.LEVELS)
        axes.set_yticks([HISTOGRAM_EDGES.index(k) for k in heat.NAMED], list(heat.NAMED.values()))

    return 1.5, draw


def _layers(run: Run, found: layers.Map, runs: int) -> Panel:
    def draw(axes: Any) -> None:
        title = _plain(layers.title_of(run, found, runs))
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        count = found.peak.shape[1]
        shade = layers.level(found.peak)
        rows = np.arange(count + 1)
        axes.pcolormesh(found.edges, rows, shade.T, cmap="Blues", vmin=0, vmax=heat.LEVELS)
        axes.set_yticks([i + 0.5 for i in layers.labels(count)], layers.labels(count))

    return 1.5, draw


def _frozen(run: Run, found: frozen.Map, runs: int) -> Panel:
    def draw(axes: Any) -> None:
        title = _plain(frozen.title_of(run, runs))
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        count = len(found.names)
        rows = np.arange(count + 1)
        axes.pcolormesh(found.edges, rows, found.shade.T, cmap="Blues", vmin=0, vmax=heat.LEVELS)
        axes.set_yticks([i + 0.5 for i in range(count)], [frozen.label(y) for y in found.names])

    return 0.15 * len(found.names) + 0.2, draw
