"""The result file of the atlas as a grid, and the ratio that every table is about.

The ratio of a run is its validation loss against that of the task's own optimizer at its tuned rate
with the same seed: exp of the difference where the loss is a cross-entropy, which is a ratio of
perplexities, and the quotient of the losses where it is a squared error. A run that diverged has
ratio infinity. Over seeds the median counts.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.atlas.cell import is_perplexity
from benchmarks.atlas.draw import Task, tasks
from benchmarks.atlas.methods import METHODS, OWN
from benchmarks.records import Record, one_law

Key = tuple[str, str, int | None, int]


class Grid(NamedTuple):
    """Cells by task, method, multiple (None for a method without a rate) and seed."""

    cells: dict[Key, Record]
    tuned: dict[str, float]

    def tasks(self, half: str) -> list[Task]:
        """Those whose rate is tuned."""
        return [task for task in tasks(half).values() if task.name in self.tuned]

    def losses(self, task: Task, method: str, multiple: int) -> dict[int, float]:
        """Final losses by seed; infinite where the run diverged.

        A method that is the task's own optimizer (clip 1.0 where it has it) is not run again.
        """
        if method == "clip-1.0" and task.clip == 1.0:
            method = OWN
        key = (task.name, method, multiple if METHODS[method].takes_lr else None)
        return {cell[3]: _loss(record) for cell, record in self.cells.items() if cell[:3] == key}


class Spread(NamedTuple):
    """Of the ratios of many cells."""

    median: float
    high: float  # 95th percentile
    worst: float
    cells: int
    tasks: int


def load(records: Iterable[Record]) -> Grid:
    """The newest record of every cell, of today's draw, of one law, and of the newest text."""
    known = tasks()
    records = [r for r in one_law(records) if r["method"] in METHODS and _is_of(known, r)]
    text = [r["data"] for r in records if "data" in r][-1:]
    records = [r for r in records if "data" not in r or [r["data"]] == text]
    tuned = {r["task"]: r["tuned"] for r in records if r["tuned"] is not None}
    cells: dict[Key, Record] = {}
    for record in records:
        multiple = _multiple(record, tuned, known)
        if multiple is not None or record["lr"] is None:
            cells[record["task"], record["method"], multiple, record["seed"]] = record
    compared = {seed for _, method, _, seed in cells if method != OWN}
    if compared:  # the seed that rates were tuned with is none of the table's
        cells = {key: record for key, record in cells.items() if key[3] in compared}
    return Grid(cells, tuned)


def _is_of(known: dict[str, Task], record: Record) -> bool:
    task = known.get(record["task"])
    return task is not None and record["facts_of_task"] == facts_of(task)


def facts_of(task: Task) -> Record:
    """What a record says of its task, beside the name."""
    return {fact: value for fact, value in task._asdict().items() if fact != "name"}


def _multiple(record: Record, tuned: dict[str, float], known: dict[str, Task]) -> int | None:
    """None for a rate that was only tried in tuning, and for a method without one."""
    if record["lr"] is None or record["task"] not in tuned:
        return None
    share = record["lr"] / tuned[record["task"]]
    near = (k for k in known[record["task"]].multiples if math.isclose(share, k, rel_tol=1e-6))
    return next(near, None)


def _loss(record: Record) -> float:
    return math.inf if record["loss"] is None else record["loss"]


def ratio(grid: Grid, task: Task, method: str, multiple: int) -> float | None:
    """Against the own optimizer at its tuned rate; None where no seed has both."""
    reference, losses = grid.losses(task, OWN, 1), grid.losses(task, method, multiple)
    pairs = [_ratio(task, losses[seed], reference[seed]) for seed in losses if seed in reference]
    return statistics.median(pairs) if pairs else None


def _ratio(task: Task, loss: float, reference: float) -> float:
    if math.isinf(loss):
        return math.inf
    if is_perplexity(task):
        return math.exp(min(loss - reference, 700.0))
    return loss / reference


def spread(
    grid: Grid, chosen: Sequence[Task], method: str, multiples: Iterable[int]
) -> Spread | None:
    """Over all tasks that the method runs on, at those multiples that the task has.

    None where one of these cells is missing: a median over what happens to be there says nothing.
    """
    multiples = set(multiples)
    on = [task for task in chosen if runs_on(method, task)]
    found = [ratio(grid, task, method, k) for task in on for k in task.multiples if k in multiples]
    values = sorted(value for value in found if value is not None)
    if not values or len(values) < len(found):
        return None
    return Spread(statistics.median(values), percentile(values), values[-1], len(values), len(on))


def runs_on(method: str, task: Task) -> bool:
    return METHODS[method].applies(task) or method == "clip-1.0"


def percentile(ordered: Sequence[float], share: float = 0.95) -> float:
    """The smallest value that this share of all values does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile(list(range(1, 25)))
    (2.0, 23)
    """
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
