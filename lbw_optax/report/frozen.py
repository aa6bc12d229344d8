"""The frozen layers over time: a row for each that was ever frozen, filled while it was."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lbw_optax.report import heat, sampling
from lbw_optax.report.reading import Run, freezes

TITLE = "Frozen layers: filled while a layer stays as it is"
# So many rows are drawn at most, and so many characters of a name are written.
ROWS, LETTERS = 24, 9


class Map(NamedTuple):
    """Which layers were frozen, over time.

    Attributes:
      names: of the rows, in the order in which they froze.
      edges: steps at which the columns begin, and the end of the last one.
      shade: int[columns, rows], 0 or `heat.LEVELS`.
    """

    names: list[str]
    edges: np.ndarray
    shade: np.ndarray


def pictures(runs: Sequence[Run], x: tuple[float, float], detail: float = 1.0) -> list[str]:
    """All of them, as SVG; none where nothing was frozen. `detail` is as for the histogram."""
    columns = int(detail * heat.COLUMNS)
    return [
        _drawn(run, x, found, len(runs))
        for run in runs
        if (found := map_of(run, x, columns)) is not None
    ]


def map_of(run: Run, x: tuple[float, float], columns: int = heat.COLUMNS) -> Map | None:
    """None where nothing was frozen. A column is filled if the layer was frozen in any of it."""
    found = freezes(run)
    if not found:
        return None
    names = list(dict.fromkeys(one.group for one in found))[:ROWS]
    shade = np.zeros((columns, len(names)), int)
    for one in found:
        if one.group in names:
            last = x[1] if one.end is None else max(one.end - 1, one.start)
            ends = np.array([one.start, last], np.float64)
            first, end = sampling.bucket_of(ends, *x, columns)
            shade[first : end + 1, names.index(one.group)] = heat.LEVELS
    return Map(names, np.linspace(*x, columns + 1), shade)


def title_of(run: Run, runs: int) -> str:
    """With the name of the run where there are several."""
    return heat.titled(TITLE, run, "", runs)


def label(name: str) -> str:
    """The end of a name, which tells layers apart.

    >>> label("layers/3"), label("decoder/layers[12]")
    ('layers/3', '…ayers[12]')
    """
    return name if len(name) <= LETTERS else "…" + name[-LETTERS:]


def _drawn(run: Run, x: tuple[float, float], found: Map, runs: int) -> str:
    title = title_of(run, runs)
    written = {i + 0.5: label(name) for i, name in enumerate(found.names)}
    spoken = f"{title}. They are {', '.join(found.names)}"
    return heat.figure(title, spoken, found.edges, found.shade, written, x, 1.5 * heat.ROW)
