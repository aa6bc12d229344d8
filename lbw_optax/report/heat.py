"""The histogram of the gradient over time: a column for each place along the steps.

Eight levels of one colour, each a single path, so that the picture stays small.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from lbw_optax.law.telemetry import HISTOGRAM_EDGES
from lbw_optax.report import sampling, words
from lbw_optax.report.charts import LEFT, RIGHT, TOP, WIDTH, step_axis
from lbw_optax.report.columns import HISTOGRAM
from lbw_optax.report.reading import Run, kept, steps

TITLE = "Sizes of the gradient's coordinates; the stronger the colour, the more of them"
# Columns of the picture at most, shades, and the height of a row.
COLUMNS, LEVELS, ROW = 120, 8, 9
# A share of this and above has the darkest shade.
DARKEST = 0.4
# Of the rows that are labelled: the least number in each. The outermost rows take the rest.
NAMED = {-24: "2^-24", -16: "2^-16", -8: "2^-8", 0: "1", 6: "2^6"}


class Map(NamedTuple):
    """Shares of a histogram over time.

    Attributes:
      name: path of the guard, "" for the only one.
      edges: steps at which the columns begin, and the end of the last one.
      share: [columns, buckets], each row's sum 1; NaN where nothing was logged.
    """

    name: str
    edges: np.ndarray
    share: np.ndarray


def pictures(runs: Sequence[Run], x: tuple[float, float], detail: float = 1.0) -> list[str]:
    """All of them, as SVG. `detail` is a share of `COLUMNS`."""
    columns = int(detail * COLUMNS)
    return [_drawn(run, x, found, len(runs)) for run in runs for found in maps(run, x, columns)]


def maps(run: Run, x: tuple[float, float], columns: int = COLUMNS) -> list[Map]:
    """One of each guard whose histogram was logged; what a rollback undid is left out."""
    ends = f"{HISTOGRAM}/{HISTOGRAM_EDGES[0]}"
    paths = [name.removesuffix(ends) for name in run.columns if name.endswith(ends)]
    return [found for path in paths if (found := _map(run, path, x, columns)) is not None]


def _map(run: Run, path: str, x: tuple[float, float], columns: int) -> Map | None:
    names = [f"{path}{HISTOGRAM}/{k}" for k in HISTOGRAM_EDGES]
    if not all(name in run.columns for name in names):
        return None
    counts = np.stack([run.columns[name] for name in names], axis=1)
    total = counts.sum(1)
    good = np.isfinite(total) & (total > 0) & (counts >= 0).all(1)
    step = steps(run.columns)[good]
    stays = kept(step)
    step, share = step[stays], (counts[good] / total[good, None])[stays]
    if not len(step):
        return None
    columns = min(columns, len(step))
    at = sampling.bucket_of(step, *x, columns)
    summed = np.zeros((columns, len(HISTOGRAM_EDGES)))
    np.add.at(summed, at, share)
    lines = np.bincount(at, minlength=columns)[:, None]
    mean = summed / np.where(lines, lines, np.nan)
    return Map(path.strip("/"), np.linspace(*x, columns + 1), mean)


def level(share: np.ndarray) -> np.ndarray:
    """Shade of each share, 0 to `LEVELS`: by the root, which shows small shares; 0 for none.

    >>> level(np.array([0.0, 1e-4, 0.02, 0.1, 0.4, 1.0])).tolist()
    [0, 1, 2, 4, 8, 8]
    """
    root = np.sqrt(np.clip(np.nan_to_num(share) / DARKEST, 0, 1))
    return np.ceil(root * LEVELS - 1e-9).astype(int)


def _drawn(run: Run, x: tuple[float, float], found: Map, runs: int) -> str:
    title = title_of(run, found, runs)
    labels = {HISTOGRAM_EDGES.index(k): said for k, said in NAMED.items()}
    return figure(title, _spoken(title, found), found.edges, level(found.share), labels, x, ROW)


def figure(
    title: str,
    spoken: str,
    edges: np.ndarray,
    shade: np.ndarray,
    labels: Mapping[int, str] | Mapping[float, str],
    x: tuple[float, float],
    row: float,
) -> str:
    """A picture in shades, as SVG.

    Args:
      title: what is above it.
      spoken: what is said of it to those who do not see it.
      edges: steps at which its columns begin, and the end of the last one.
      shade: int[columns, rows], 0 to `LEVELS`; the first row is the lowest.
      labels: of some lower edges of rows; of a row's middle at its number and a half.
      x: the first and the last step of the page.
      row: height of a row.
    """
    rows = shade.shape[1]
    bottom = TOP + rows * row
    place = LEFT + (RIGHT - LEFT) * (edges - x[0]) / (x[1] - x[0])
    parts = [
        f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{rows * row:g}"/>'
    ]
    width = "" if row == ROW else f' style="stroke-width:{row:g}"'
    for at in range(1, LEVELS + 1):
        cells = [
            f"M{place[start]:.1f} {bottom - (i + 0.5) * row:g}H{place[end]:.1f}"
            for i in range(rows)
            for start, end in _stretches(shade[:, i] == at)
        ]
        if cells:
            opacity = f'opacity="{at / LEVELS:g}"'
            parts.append(f'<path class="heat"{width} {opacity} d="{"".join(cells)}"/>')
    for i, said in labels.items():
        y = bottom - i * row
        parts.append(f'<path class="grid" d="M{LEFT - 4} {y:g}h4"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:g}">{said}</text>')
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" '
        f'aria-label="{escape(spoken)}" viewBox="0 0 {WIDTH} {bottom + 22:g}">'
        f"{''.join(parts)}{step_axis(*x, bottom)}</svg></figure>"
    )


def title_of(run: Run, found: Map, runs: int) -> str:
    """With the names of run and guard where there are several."""
    return titled(TITLE, run, found.name, runs)


def titled(title: str, run: Run, guard: str, runs: int) -> str:
    """A title with the names of run and guard where there are several."""
    of = " · ".join(part for part in (run.name if runs > 1 else "", guard) if part)
    return f"{title}{': ' * bool(of)}{of}"


def _stretches(is_on: np.ndarray) -> list[tuple[int, int]]:
    """First and last-plus-one of each row of True."""
    change = np.flatnonzero(np.diff(np.concatenate([[0], is_on.astype(int), [0]])))
    return list(zip(change[::2].tolist(), change[1::2].tolist(), strict=True))


def _spoken(title: str, found: Map) -> str:
    """Where the middle of the gradient is, first and last."""
    known = found.share[np.isfinite(found.share).all(1)]
    middle = [HISTOGRAM_EDGES[int(np.searchsorted(np.cumsum(x), 0.5))] for x in known[[0, -1]]]
    lowest = words.number(100 * float(known[-1, 0]))
    return (
        f"{title}. Half of the coordinates are below 2 to the {middle[0] + 2} at the start and "
        f"below 2 to the {middle[1] + 2} at the end, {lowest} per cent in the lowest row then"
    )
