"""The figure: who survives which fault, and what four of the faults do to the loss."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.colours import ADAMW, GUARD
from benchmarks.faults.methods import DRAWN, METHODS, SCENARIOS, STRUCK
from benchmarks.faults.results import Results

LINES = {"adamw": (ADAMW, "-"), "guard": (GUARD, ":"), "guard-rollback": (GUARD, "-")}
EVERY = 5
"""Steps between two points of a stored curve."""


def draw(results: Results, path: Path) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(13, 9), dpi=130, layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    table, curves = halves
    _survival(table.subplots(), results)
    panels = curves.subplots(len(DRAWN), 1, sharex=True)
    for panel, scenario in zip(panels, DRAWN, strict=True):
        _curves(panel, results, scenario)
    panels[0].legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left"
    )
    panels[-1].set_xlabel("steps done since the fault")
    figure.savefig(path)


def _survival(panel: Axes, results: Results) -> None:
    """Rows are faults, columns are methods; a number is the share of seeds in per cent."""
    methods, scenarios = results.methods(), results.scenarios()
    shares = np.full((len(scenarios), len(methods)), np.nan)
    for i, scenario in enumerate(scenarios):
        for j, method in enumerate(methods):
            found = results.grid.get((scenario, method))
            if found:
                shares[i, j] = statistics.mean(bool(r["survived"]) for r in found)
                panel.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=8)
    panel.imshow(shares, cmap="RdYlGn", vmin=-0.2, vmax=1.2, aspect="auto")
    panel.set_yticks(range(len(scenarios)), [SCENARIOS[name].title for name in scenarios])
    panel.set_xticks(
        range(len(methods)), [METHODS[name].title for name in methods], rotation=40, ha="left"
    )
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelsize=8)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("seeds that survive, %")


def _curves(panel: Axes, results: Results, scenario: str) -> None:
    """Median over seeds of the loss over that without the fault."""
    for method, (colour, style) in LINES.items():
        found = results.grid.get((scenario, method))
        if found:
            height = _median([record["curve"] for record in found])
            steps = EVERY * np.arange(len(height)) - STRUCK
            panel.plot(steps, height, color=colour, ls=style, label=METHODS[method].title)
    panel.axvline(0, color="#999999", lw=0.6)
    panel.set(ylim=(0.93, 1.6), xlim=(-20, 200))
    panel.set_title(SCENARIOS[scenario].title, fontsize=9)
    panel.set_ylabel("loss ÷ clean", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _median(curves: list[list[Any]]) -> np.ndarray:
    """Not finite in most curves: a gap, and beyond the panel."""
    length = min(map(len, curves))
    table = np.array([curve[:length] for curve in curves], float)
    return np.median(np.where(np.isnan(table), 1e9, table), axis=0)
