"""The result file of the stress benchmark as a grid, and the statistics its tables show.

A number is the median over seeds. LR sensitivity S is the mean over the grid of
min(loss, loss before training), less the best loss of the same method (Wortsman et al.,
arXiv:2309.14322): 0 is a method that ends equally well at every rate, be it well or badly.
"""

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.records import one_law
from benchmarks.stress.methods import METHODS
from benchmarks.stress.pace import share_of_steps
from benchmarks.stress.regimes import REGIMES

Record = dict[str, Any]


class Grid(NamedTuple):
    """The cells of one data set and model. A method without a learning rate has multiple None."""

    split: str
    cells: dict[tuple[str, str, int | None, int], Record]
    tuned: dict[str, float]

    def regimes(self) -> list[str]:
        return [name for name in REGIMES if name in self.tuned]

    def methods(self, regime: str) -> list[str]:
        return [name for name in METHODS if any(key[:2] == (regime, name) for key in self.cells)]

    def multiples(self, regime: str) -> list[int]:
        return sorted({key[2] for key in self.cells if key[0] == regime and key[2] is not None})

    def steps(self, regime: str) -> int:
        return next(record["steps"] for key, record in self.cells.items() if key[0] == regime)

    def records(self, regime: str, method: str, multiple: int) -> dict[int, Record]:
        """The records of one cell by seed."""
        key = (regime, method, multiple if METHODS[method].takes_lr else None)
        return {cell[3]: record for cell, record in self.cells.items() if cell[:3] == key}

    def losses(self, regime: str, method: str, multiple: int) -> dict[int, float]:
        """Final losses by seed; infinite where the run diverged."""
        records = self.records(regime, method, multiple)
        return {seed: self.loss(record) for seed, record in records.items()}

    def loss(self, record: Record) -> float:
        value = record["perplexity"][self.split]
        return math.inf if value is None else math.log(value)


def load(records: list[Record], split: str) -> Grid:
    """The newest record of every cell, of the data and model of the newest record of all.

    Of one law (`benchmarks.records.one_law`).
    """
    same = ("tokens", "size", "model", "base_steps")
    records = [r for r in records if all(r[k] == records[-1][k] for k in same)]
    records = [r for r in one_law(records) if r["method"] in METHODS]
    tuned = {r["regime"]: r["tuned"] for r in records if r["tuned"] is not None}
    cells = {}
    for record in records:
        if record["regime"] in tuned and _on_grid(record, tuned[record["regime"]]):
            multiple = record["lr"] and round(record["lr"] / tuned[record["regime"]])
            cells[record["regime"], record["method"], multiple, record["seed"]] = record
    compared = {seed for _, method, _, seed in cells if method != "adamw"}
    if compared:  # the seed that AdamW was tuned with is none of the table's
        cells = {key: record for key, record in cells.items() if key[3] in compared}
    return Grid(split, cells, tuned)


def _on_grid(record: Record, tuned: float) -> bool:
    """False for a rate that was only tried in tuning."""
    rates = [k * tuned for k in REGIMES[record["regime"]].multiples]
    return record["lr"] is None or any(math.isclose(record["lr"], r, rel_tol=1e-6) for r in rates)


def perplexity(grid: Grid, regime: str, method: str, multiple: int) -> float | None:
    losses = grid.losses(regime, method, multiple).values()
    return math.exp(statistics.median(losses)) if losses else None


def ratio(grid: Grid, regime: str, method: str, multiple: int, of: int = 1) -> float | None:
    """Perplexity over that of AdamW at `of` times its tuned rate with the same seed."""
    reference = grid.losses(regime, "adamw", of)
    losses = grid.losses(regime, method, multiple)
    pairs = [math.exp(losses[seed] - reference[seed]) for seed in losses if seed in reference]
    return statistics.median(pairs) if pairs else None


def sensitivity(grid: Grid, regime: str, method: str) -> float | None:
    """S over the rates that were run; None for one rate, or where a cell is missing."""
    columns = [grid.records(regime, method, k) for k in grid.multiples(regime)]
    seeds = set.intersection(*map(set, columns)) if len(columns) > 1 else set()
    values = [_sensitivity(grid, [column[seed] for column in columns]) for seed in seeds]
    return statistics.median(values) if values else None


def _sensitivity(grid: Grid, records: list[Record]) -> float:
    capped = [min(grid.loss(r), math.log(r["before"][grid.split])) for r in records]
    return statistics.mean(capped) - min(capped)


def pace(grid: Grid, regime: str, method: str, multiple: int) -> float | None:
    """Steps to AdamW's final loss at its tuned rate, over AdamW's; infinite if it is not reached.

    The loss is that of the valid curve, which every run of a seed measures on the same text.
    """
    reference = grid.records(regime, "adamw", 1)
    shares = [
        _pace(record, reference[seed])
        for seed, record in grid.records(regime, method, multiple).items()
        if seed in reference
    ]
    return statistics.median(shares) if shares else None


def _pace(record: Record, reference: Record) -> float:
    """AdamW's records hold their curves, those of other methods the number alone."""
    if "valid_curve" in record:
        return share_of_steps(record["valid_curve"], reference["valid_curve"])
    return math.inf if record["pace"] is None else record["pace"]


def false_interventions(grid: Grid, method: str, regimes: Iterable[str]) -> float | None:
    """Cuts below 0.9 after the soft start and skips per 1000 steps at the tuned rate."""
    records = [r for name in regimes for r in grid.records(name, method, 1).values()]
    steps = sum(record["steps"] for record in records)
    cuts = sum(record["guard"]["cuts"] + record["guard"]["skips"] for record in records)
    return 1000 * cuts / steps if steps else None
