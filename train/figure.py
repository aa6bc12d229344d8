"""Figures of finished runs: loss, scale and interventions over steps. Needs matplotlib."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lbw_optax.law.events import Event


class Curve(NamedTuple):
    """One run in a figure.

    Attributes:
      name: in the legend, together with `group`.
      loss: per step.
      scale: per step; None for a run without a guard, which is drawn dashed.
      events: the run's interventions, as `lbw_optax.events` gives them.
      group: curves of one group share a colour, in the order of first appearance.
    """

    name: str
    loss: np.ndarray
    scale: np.ndarray | None = None
    events: Sequence[Event] = ()
    group: str = ""


def figure(panels: Mapping[str, Sequence[Curve]], path: str | os.PathLike[str]) -> None:
    """Draw one column per panel, loss above and scale below it, and save it to `path`.

    The loss is the mean of the last `SMOOTHED` steps. Interventions are marked on the scale, a
    return to growth ("recover") is not.

    Args:
      panels: title to curves.
      path: its suffix decides the format (png, svg, pdf).

    Raises:
      ImportError: without matplotlib, with the command that installs it.

    Example:
      >>> import tempfile, numpy as np
      >>> runs = [Curve("AdamW", np.ones(9)), Curve("guard", np.ones(9), np.ones(9))]
      >>> figure({"LoRA": runs}, tempfile.mkdtemp() + "/runs.png")
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        size = (1.5 + 5.25 * len(panels), 6.2)
        canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = canvas.subplots(2, len(panels), sharex="col", squeeze=False, height_ratios=(2, 1))
        for (above, below), (title, curves) in zip(axes.T, panels.items(), strict=True):
            above.set_title(title)
            _draw_losses(above, curves)
            _draw_scales(below, curves)
        axes[0, 0].set_ylabel(f"training loss (mean of {SMOOTHED} steps)")
        axes[1, 0].set_ylabel("scale of the updates")
        canvas.savefig(path, dpi=150)


SMOOTHED = 10
MARKS = {
    "skip": ("X", "skipped step"),
    "hold": ("s", "hold"),
    "cut": ("v", "cut"),
    "rollback": ("<", "rollback"),
}
# Okabe and Ito's palette, the colours that are also legible as lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}


def _matplotlib() -> Any:
    """The package without pyplot, which would choose a backend for the whole program."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'lbw_optax[train]'") from error
    return matplotlib


def _draw_losses(axes: Any, curves: Sequence[Curve]) -> None:
    for curve, colour in zip(curves, _colours(curves), strict=True):
        guarded = curve.scale is not None
        axes.plot(
            smooth(curve.loss),
            color=colour,
            linestyle="-" if guarded else (0, (4, 1.5)),
            linewidth=1.8 if guarded else 1.3,
            label=" ".join(filter(None, (curve.name, curve.group))),
        )
    if _spread(curves) > 4:
        _logarithmic(axes, labelled=(1, 2, 5))
    axes.legend(ncols=2)


def _draw_scales(axes: Any, curves: Sequence[Curve]) -> None:
    used = set()
    for curve, colour in zip(curves, _colours(curves), strict=True):
        if curve.scale is None:
            continue
        axes.plot(curve.scale, color=colour, linewidth=1.8)
        for action, (mark, _) in MARKS.items():
            at = [
                (event.step, event.scale_after) for event in curve.events if event.action == action
            ]
            if at:
                axes.plot(*zip(*at, strict=True), mark, color=colour, markeredgecolor="white", ms=6)
                used.add(action)
    _logarithmic(axes, labelled=(1, 3))
    axes.set_ylim(top=1.3)
    axes.set_xlabel("step")
    for action, (mark, meaning) in MARKS.items():
        if action in used:
            axes.plot([], [], mark, color="0.4", label=meaning)
    if used:
        axes.legend(ncols=len(used))


def _logarithmic(axes: Any, labelled: Sequence[int]) -> None:
    """A log axis with plain numbers (0.03, not 3 × 10⁻²) at these digits of each decade."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=labelled))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def smooth(loss: np.ndarray) -> np.ndarray:
    """Mean of the last `SMOOTHED` finite values at each step; NaN where there is none."""
    finite = np.isfinite(loss)
    totals = np.convolve(np.where(finite, loss, 0.0), np.ones(SMOOTHED))[: len(loss)]
    counts = np.convolve(finite, np.ones(SMOOTHED))[: len(loss)]
    return np.divide(totals, counts, out=np.full(len(loss), np.nan), where=counts > 0.5)


def _colours(curves: Sequence[Curve]) -> list[str]:
    groups = list(dict.fromkeys(curve.group or curve.name for curve in curves))
    return [COLOURS[groups.index(c.group or c.name) % len(COLOURS)] for c in curves]


def _spread(curves: Iterable[Curve]) -> float:
    """Largest over smallest smoothed loss; 1 when that has no meaning on a log axis."""
    values = np.concatenate([smooth(curve.loss) for curve in curves])
    values = values[np.isfinite(values)]
    return float(values.max() / values.min()) if values.size and values.min() > 0 else 1.0
