"""The figure: final perplexity over learning rate, one line a method, one panel a regime."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from benchmarks.colours import ADAMW, GUARD
from benchmarks.stress.grid import Grid, perplexity
from benchmarks.stress.methods import METHODS
from benchmarks.stress.regimes import REGIMES

# Okabe and Ito's palette, safe for colour-blind readers; black and vermilion are given away.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")
STYLES = ("-", "--", ":", "-.")


def draw(grid: Grid, path: Path) -> None:
    """Write the figure as PNG. A run that diverged leaves a gap."""
    regimes = grid.regimes()
    figure = Figure(figsize=(4.0 * len(regimes), 5.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(regimes), squeeze=False)[0]
    present = {key[1] for key in grid.cells}
    looks = _looks([method for method in METHODS if method in present])
    for panel, regime in zip(panels, regimes, strict=True):
        _panel(panel, grid, regime, looks)
    panels[0].set_ylabel(f"final {grid.split} perplexity")
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    order = [method.title for method in METHODS.values() if method.title in handles]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path)


def _panel(panel: Axes, grid: Grid, regime: str, looks: dict[str, dict[str, Any]]) -> None:
    multiples = grid.multiples(regime)
    for method in grid.methods(regime):
        values = [perplexity(grid, regime, method, multiple) for multiple in multiples]
        heights = [math.nan if v is None or math.isinf(v) else v for v in values]
        panel.plot(multiples, heights, label=METHODS[method].title, **looks[method])
    panel.set(xscale="log", yscale="log", title=REGIMES[regime].title)
    panel.set_xlabel("learning rate ÷ AdamW's tuned one")
    panel.set_xticks(multiples, [f"×{k}" for k in multiples])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _looks(methods: list[str]) -> dict[str, dict[str, Any]]:
    """The guard and AdamW stand out; the others take all colours before a second line style."""
    looks = {}
    others = [method for method in methods if method not in ("guard", "adamw")]
    for place, method in enumerate(others):
        style, colour = STYLES[place // len(COLOURS)], COLOURS[place % len(COLOURS)]
        looks[method] = {"color": colour, "linestyle": style, "linewidth": 1, "marker": "."}
    looks["adamw"] = {"color": ADAMW, "linewidth": 2, "zorder": 3, "marker": "s", "markersize": 4}
    looks["guard"] = {"color": GUARD, "linewidth": 3, "zorder": 4, "marker": "o"}
    return looks
