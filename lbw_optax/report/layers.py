"""The layers over time: a row for each, the darker the farther its activations stand out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lbw_optax.report import heat, sampling, words
from lbw_optax.report.columns import PEAKS
from lbw_optax.report.reading import Run, kept, steps

TITLE = "Peaks of the layers' activations, max over RMS; the stronger the colour, the higher"
# At the pale end what numbers of a normal distribution have, and at the dark end what drowns them.
PALE, DARK = 4.0, 256.0
# All rows together are no higher than this, and so many of them are labelled.
HIGHEST, LABELS = 240, 6


class Map(NamedTuple):
    """The largest peak of each layer over time.

    Attributes:
      name: path of the guard, "" for the only one.
      edges: steps at which the columns begin, and the end of the last one.
      peak: [columns, layers]; infinite where one was not finite, NaN where nothing was logged.
    """

    name: str
    edges: np.ndarray
    peak: np.ndarray


def pictures(runs: Sequence[Run], x: tuple[float, float], detail: float = 1.0) -> list[str]:
    """All of them, as SVG; none where no run was watched. `detail` is as for the histogram."""
    columns = int(detail * heat.COLUMNS)
    return [_drawn(run, x, found, len(runs)) for run in runs for found in maps(run, x, columns)]


def maps(run: Run, x: tuple[float, float], columns: int = heat.COLUMNS) -> list[Map]:
    """One of each log of peaks; what a rollback undid is left out."""
    first = f"{PEAKS}/0"
    paths = [name.removesuffix(first) for name in run.columns if name.endswith(first)]
    return [found for path in paths if (found := _map(run, path, x, columns)) is not None]


def _map(run: Run, path: str, x: tuple[float, float], columns: int) -> Map | None:
    peaks: list[np.ndarray] = []
    while (name := f"{path}{PEAKS}/{len(peaks)}") in run.columns:
        peaks.append(run.columns[name])
    peak = np.stack(peaks, axis=1)
    good = ~np.isnan(peak).any(1)
    step = steps(run.columns)[good]
    stays = kept(step)
    step, peak = step[stays], peak[good][stays]
    if not len(step):
        return None
    columns = min(columns, len(step))
    largest = np.full((columns, len(peaks)), np.nan)
    np.fmax.at(largest, sampling.bucket_of(step, *x, columns), peak)
    return Map(path.strip("/"), np.linspace(*x, columns + 1), largest)


def level(peak: np.ndarray) -> np.ndarray:
    """Shade of each peak, 0 to 8: an octave more is darker; 0 where there is none.

    >>> level(np.array([np.nan, 1.0, 5.0, 32.0, 256.0, np.inf])).tolist()
    [0, 1, 1, 4, 8, 8]
    """
    share = np.log(np.maximum(np.nan_to_num(peak, nan=PALE), PALE) / PALE) / math.log(DARK / PALE)
    shade = np.ceil(np.clip(share, 0, 1) * heat.LEVELS - 1e-9).astype(int)
    return np.where(np.isnan(peak), 0, np.maximum(shade, 1))


def labels(count: int) -> list[int]:
    """The layers whose numbers are written.

    >>> labels(4), labels(32)
    ([0, 1, 2, 3], [0, 6, 12, 18, 24, 30])
    """
    return list(range(0, count, -(-count // LABELS)))


def title_of(run: Run, found: Map, runs: int) -> str:
    """With the names of run and guard where there are several."""
    return heat.titled(TITLE, run, found.name, runs)


def _drawn(run: Run, x: tuple[float, float], found: Map, runs: int) -> str:
    count = found.peak.shape[1]
    title = title_of(run, found, runs)
    written = {i + 0.5: str(i) for i in labels(count)}
    row = min(heat.ROW, max(HIGHEST // count, 1))
    spoken = _spoken(title, found.peak)
    return heat.figure(title, spoken, found.edges, level(found.peak), written, x, row)


def _spoken(title: str, peak: np.ndarray) -> str:
    """Which layer was farthest out, first and last."""
    known = peak[~np.isnan(peak).any(1)]
    said = [f"layer {row.argmax()} with {words.number(float(row.max()))}" for row in known[[0, -1]]]
    return (
        f"{title}. The highest of {peak.shape[1]} is {said[0]} at the start, {said[1]} at the end"
    )
