"""Figures of finished runs: what is logged, and the interventions, over steps. Needs matplotlib."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
      valid: loss on the valid split per step, NaN where it was not measured.
      learning_rate: per step.
      gradient_norm: per step.
      bad: first and last step whose batch was bad; shaded.
    """

    name: str
    loss: np.ndarray
    scale: np.ndarray | None = None
    events: Sequence[Event] = ()
    group: str = ""
    valid: np.ndarray | None = None
    learning_rate: np.ndarray | None = None
    gradient_norm: np.ndarray | None = None
    bad: tuple[int, int] | None = None


def figure(panels: Mapping[str, Sequence[Curve]], path: str | os.PathLike[str]) -> None:
    """Draw one column per panel, a row per kind of curve, and save it to `path`.

    Loss and scale are always there; gradient norm and learning rate, where a curve has them. The
    loss is the mean of the last `SMOOTHED` steps; where it is not finite to the end of the run, a
    cross marks its last finite value. Interventions are marked on the scale, a return to growth
    ("recover") is not.

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
    every = [curve for curves in panels.values() for curve in curves]
    rows, colours = _rows(every), _colours(every)
    with matplotlib.rc_context(_STYLE):
        size = (1.5 + 5.25 * len(panels), 1.0 + 1.75 * (len(rows) + 1))
        canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        heights = [2] + [1] * (len(rows) - 1)
        axes = canvas.subplots(
            len(rows), len(panels), sharex="col", squeeze=False, height_ratios=heights
        )
        for column, (title, curves) in zip(axes.T, panels.items(), strict=True):
            column[0].set_title(title)
            column[-1].set_xlabel("step")
            for axis, draw in zip(column, rows.values(), strict=True):
                draw(axis, curves, colours)
        for axis, label in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(label)
        canvas.savefig(path, dpi=150)


SMOOTHED = 10
MARKS = {
    "skip": ("X", "skipped step"),
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
        raise ImportError("a figure needs matplotlib: pip install --group train") from error
    return matplotlib


Colours = Mapping[str, str]
"""By group, or by name for a curve without one."""


Draw = Callable[[Any, Sequence[Curve], Colours], None]


def _rows(curves: Sequence[Curve]) -> dict[str, Draw]:
    """What is drawn, by the label of its axis, from the top."""
    rows: dict[str, Draw] = {
        f"training loss (mean of {SMOOTHED} steps)": _draw_losses,
        "scale of the updates": _draw_scales,
    }
    if any(curve.gradient_norm is not None for curve in curves):
        rows["gradient norm"] = _draw_gradient_norms
    if any(curve.learning_rate is not None for curve in curves):
        rows["learning rate"] = _draw_learning_rates
    return rows


def _draw_losses(axes: Any, curves: Sequence[Curve], colours: Colours) -> None:
    from matplotlib.patheffects import withStroke

    widths = _widths(curves)
    for curve, width in zip(curves, widths, strict=True):
        colour, guarded = colours[curve.group or curve.name], curve.scale is not None
        end = _end(curve.loss)
        smoothed = smooth(curve.loss)[: end + 1]
        axes.plot(
            smoothed,
            color=colour,
            linestyle="-" if guarded else (0, (3, 3)),
            linewidth=width,
            zorder=2 if guarded else 2.5,
            # Dashes with a white edge can be seen on a line of their colour.
            path_effects=None if guarded else [withStroke(linewidth=2.6, foreground="white")],
            label=" ".join(filter(None, (curve.name, curve.group))),
        )
        if 0 <= end < len(curve.loss) - 1:
            axes.plot(
                end,
                smoothed[-1],
                "X",
                color=colour,
                ms=9,
                zorder=3,
                label="not finite from here on",
            )
        if curve.valid is not None:
            at = np.flatnonzero(np.isfinite(curve.valid))
            axes.plot(at, curve.valid[at], "o", color="black", ms=4, label="valid split")
    _shade(axes, curves, label="bad batches")
    if _spread(curves) > 4:
        _logarithmic(axes, labelled=(1, 2, 5))
    axes.legend(ncols=2)


def _widths(curves: Sequence[Curve]) -> list[float]:
    """Of lines: where guarded runs coincide, the edges of the first ones can still be seen."""
    above = np.cumsum([curve.scale is not None for curve in reversed(curves)])[::-1]
    return [
        1.3 if curve.scale is None else 1.8 + 1.2 * float(number - 1)
        for curve, number in zip(curves, above, strict=True)
    ]


def _draw_scales(axes: Any, curves: Sequence[Curve], colours: Colours) -> None:
    used = set()
    for curve in curves:
        if curve.scale is None:
            continue
        colour = colours[curve.group or curve.name]
        axes.plot(curve.scale, color=colour, linewidth=1.8)
        for action, (mark, _) in MARKS.items():
            at = [
                (event.step, event.scale_after) for event in curve.events if event.action == action
            ]
            if at:
                edge = {"markeredgecolor": "white", "markeredgewidth": 0.4}  # of many side by side
                axes.plot(*zip(*at, strict=True), mark, color=colour, ms=6, **edge)
                used.add(action)
    _shade(axes, curves)
    _logarithmic(axes, labelled=(1, 3))
    axes.set_ylim(top=1.3)
    for action, (mark, meaning) in MARKS.items():
        if action in used:
            axes.plot([], [], mark, color="0.4", label=meaning)
    if used:
        axes.legend(ncols=len(used))


def _draw_gradient_norms(axes: Any, curves: Sequence[Curve], colours: Colours) -> None:
    for curve in curves:
        if curve.gradient_norm is not None:
            positive = np.where(curve.gradient_norm > 0, curve.gradient_norm, np.nan)
            axes.plot(positive, color=colours[curve.group or curve.name], linewidth=0.9)
    _logarithmic(axes, labelled=(1, 2, 5))


def _draw_learning_rates(axes: Any, curves: Sequence[Curve], colours: Colours) -> None:
    for curve in curves:
        if curve.learning_rate is not None:
            axes.plot(curve.learning_rate, color=colours[curve.group or curve.name], linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _shade(axes: Any, curves: Sequence[Curve], label: str | None = None) -> None:
    for first, last in dict.fromkeys(curve.bad for curve in curves if curve.bad is not None):
        axes.axvspan(first, last, color="0.85", zorder=0, label=label)


def _end(loss: np.ndarray) -> int:
    """Index of the last finite loss; -1 if there is none."""
    finite = np.flatnonzero(np.isfinite(loss))
    return int(finite[-1]) if finite.size else -1


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


def _colours(curves: Iterable[Curve]) -> Colours:
    groups = list(dict.fromkeys(curve.group or curve.name for curve in curves))
    return {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}


def _spread(curves: Iterable[Curve]) -> float:
    """Largest over smallest smoothed loss; 1 when that has no meaning on a log axis."""
    values = np.concatenate([smooth(curve.loss) for curve in curves])
    values = values[np.isfinite(values)]
    return float(values.max() / values.min()) if values.size and values.min() > 0 else 1.0
