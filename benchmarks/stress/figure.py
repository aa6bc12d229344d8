"""The figure: final perplexity over learning rate, one line a method, one panel a regime.

The guard, AdamW and the three peers that are best over all cells stand out; the others, and the
guard's own variants, are there in grey.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from benchmarks.colours import ADAMW, GREY_LINE, GUARD, OTHERS
from benchmarks.stress.grid import Grid, perplexity, ratio
from benchmarks.stress.methods import METHODS
from benchmarks.stress.regimes import REGIMES
from benchmarks.stress.targets import peers

GREY = {"color": GREY_LINE, "linewidth": 0.9, "zorder": 1}
STYLES = (("--", "^"), ("-.", "D"), (":", "v"))
"""Lines and markers of the best peers."""
REST = "other methods, variants of the guard"


def draw(grid: Grid, path: Path) -> None:
    """Write the figure as PNG. A run that diverged leaves a gap."""
    regimes, looks = grid.regimes(), _looks(grid)
    figure = Figure(figsize=(3.6 * len(regimes), 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(regimes), squeeze=False)[0]
    for panel, regime in zip(panels, regimes, strict=True):
        _panel(panel, grid, regime, looks)
    panels[0].set_ylabel(f"final {grid.split} perplexity")
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    order = [METHODS[method].title for method in looks]
    figure.legend(
        [handles[name] for name in [*order, REST] if name in handles],
        [name for name in [*order, REST] if name in handles],
        loc="outside lower center",
        ncols=len(order) + 1,
        frameon=False,
        handlelength=3.5,
    )
    figure.savefig(path)


def best_peers(grid: Grid, count: int = 3) -> list[str]:
    """By the mean of log(perplexity over that of AdamW at its tuned rate) over all cells.

    A run that diverged counts as a hundredfold; a peer that is not in every regime is left out.
    """
    known = {peer: _standing(grid, peer) for peer in METHODS if peer != "adamw"}
    means = {peer: mean for peer, mean in known.items() if mean is not None}
    return sorted(means, key=means.__getitem__)[:count]


def _standing(grid: Grid, peer: str) -> float | None:
    cells = [(regime, k) for regime in grid.regimes() for k in grid.multiples(regime)]
    shares = [
        share
        for regime, multiple in cells
        if peer in peers(grid, regime)
        and (share := ratio(grid, regime, peer, multiple)) is not None
    ]
    if not shares or len(shares) < len(cells):
        return None
    return statistics.mean(math.log(min(share, 100)) for share in shares)


def _looks(grid: Grid) -> dict[str, dict[str, Any]]:
    """Of the methods that stand out, as the legend has them; each has a shape of its own too."""
    looks: dict[str, dict[str, Any]] = {
        "guard": {"color": GUARD, "linewidth": 2.8, "zorder": 4, "marker": "o"},
        "adamw": {"color": ADAMW, "linewidth": 2, "zorder": 3, "marker": "s", "markersize": 5},
    }
    for peer, colour, (line, marker) in zip(best_peers(grid), OTHERS, STYLES, strict=False):
        looks[peer] = {"color": colour, "linestyle": line, "marker": marker}
        looks[peer] |= {"linewidth": 1.6, "zorder": 2, "markersize": 5}
    return looks


def _panel(panel: Axes, grid: Grid, regime: str, looks: dict[str, dict[str, Any]]) -> None:
    multiples = grid.multiples(regime)
    for method in grid.methods(regime):
        values = [perplexity(grid, regime, method, multiple) for multiple in multiples]
        heights = [math.nan if v is None or math.isinf(v) else v for v in values]
        name = METHODS[method].title if method in looks else REST
        panel.plot(multiples, heights, label=name, **looks.get(method, GREY))
    panel.set(xscale="log", yscale="log", title=REGIMES[regime].title)
    panel.set_xlabel("learning rate ÷ AdamW's tuned one")
    panel.set_xticks(multiples, [f"×{k}" for k in multiples])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
