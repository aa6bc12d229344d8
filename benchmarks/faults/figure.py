"""The figure: who survives which fault, and what four of the faults do to the loss."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.colours import ADAMW, GUARD, KEPT, LOST, OTHERS
from benchmarks.faults.methods import DRAWN, METHODS, SCENARIOS, STRUCK
from benchmarks.faults.results import Results, survival

LINES: dict[str, dict[str, Any]] = {
    "adamw": {"color": ADAMW, "linestyle": "--", "marker": "s", "markevery": (0, 9)},
    "guard": {"color": OTHERS[0], "linestyle": ":", "lw": 2.2, "marker": "^", "markevery": (3, 9)},
    "guard-rollback": {"color": GUARD, "linestyle": "-", "marker": "o", "markevery": (6, 9)},
}
"""Lines that lie on each other still show their own dots and marks."""
EVERY = 5
"""Steps between two points of a stored curve."""
HIGHEST = 1.6
"""Of the curves' panels; what is above it is marked at the edge."""
SHARES = LinearSegmentedColormap.from_list("survival", [LOST, "#FFFFFF", KEPT])


def draw(results: Results, path: Path) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    table, curves = halves
    _survival(table.subplots(), results)
    panels = curves.subplots(len(DRAWN), 1, sharex=True)
    for panel, scenario in zip(panels, DRAWN, strict=True):
        _curves(panel, results, scenario)
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    titles = [METHODS[method].title for method in LINES if METHODS[method].title in handles]
    curves.legend(
        [handles[title] for title in titles],
        titles,
        loc="outside upper center",
        ncols=len(LINES),
        frameon=False,
        handlelength=3.5,
        fontsize=9,
    )
    panels[-1].set_xlabel("steps done since the fault (×: beyond the panel, or not a number)")
    figure.savefig(path)


def _survival(panel: Axes, results: Results) -> None:
    """Rows are faults, columns are methods; hatched is what no seed survives."""
    methods, scenarios = results.methods(), results.scenarios()
    shares = np.array([[survival(results, name, m) for m in methods] for name in scenarios])
    panel.imshow(shares, cmap=SHARES, vmin=-0.15, vmax=1.15, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            panel.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, bbox=_PLAIN
            )
        if share == 0:
            corner = column - 0.5, row - 0.5
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", ec="#A66F00", lw=0))
    panel.set_yticks(range(len(scenarios)), [SCENARIOS[name].title for name in scenarios])
    panel.set_xticks(
        range(len(methods)), [METHODS[name].title for name in methods], rotation=40, ha="left"
    )
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelsize=8)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("seeds that survive, % (hatched: none)")


_PLAIN = {"boxstyle": "round,pad=0.15", "fc": "#FFFFFF", "ec": "none", "alpha": 0.75}


def _curves(panel: Axes, results: Results, scenario: str) -> None:
    """Median over seeds of the loss over that without the fault."""
    for place, (method, look) in enumerate(LINES.items()):
        found = results.grid.get((scenario, method))
        if found:
            steps, heights = since_the_fault([record["curve"] for record in found])
            title, order = METHODS[method].title, 4 - place
            panel.plot(steps, heights, label=title, markersize=5, zorder=order, **look)
            beyond = steps[np.isnan(heights) | (heights > HIGHEST)]
            if len(beyond):  # the first step that is not in the panel
                panel.plot(beyond[:1], [HIGHEST], "x", color=look["color"], ms=9, clip_on=False)
    panel.axvline(0, color="#999999", lw=0.8)
    panel.set(ylim=(0.93, HIGHEST), xlim=(-20, 200))
    panel.set_title(SCENARIOS[scenario].title, fontsize=9)
    panel.set_ylabel("loss ÷ clean", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def since_the_fault(curves: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps done since the fault struck, and the median over curves; NaN where most have none.

    The first step that it strikes in is step 1: at 0 the run is still what it was before.

    >>> since_the_fault([[1.0] * (STRUCK // EVERY) + [None, 2.0]])[0][-3:]
    array([0, 1, 6])
    >>> since_the_fault([[1.0] * (STRUCK // EVERY) + [None, 2.0]])[1][-3:]
    array([ 1., nan,  2.])
    """
    length = min(map(len, curves))
    table = np.array([curve[:length] for curve in curves], float)
    heights = np.median(np.where(np.isnan(table), np.inf, table), axis=0)
    heights[np.isinf(heights)] = np.nan
    steps = EVERY * np.arange(length) + 1 - STRUCK
    struck = int(np.searchsorted(steps, 1))
    return np.insert(steps, struck, 0), np.insert(heights, struck, heights[struck - 1])
