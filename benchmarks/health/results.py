"""The result file of the health benchmark, paired: a guarded run against the bare one.

Both have the same task, seed and data. A record of a task that is no more is left out.
"""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.health.methods import BARE, METHODS
from benchmarks.health.task import Task
from benchmarks.health.tasks import tasks
from benchmarks.records import Record, one_law

Pair = tuple[Record, Record]


class Results(NamedTuple):
    """The newest record of each cell of one law, with the seeds that all methods of a task have."""

    cells: dict[tuple[str, str, int], Record]  # by task, method and seed

    def methods(self) -> list[str]:
        """Those of the guard that are there."""
        return [name for name, method in METHODS.items() if method.guarded and self.has(name)]

    def has(self, method: str) -> bool:
        """Whether any task was run by it."""
        return any(name == method for _, name, _ in self.cells)

    def of(self, method: str, name: str) -> list[Record]:
        """The runs of a task."""
        return [record for key, record in self.cells.items() if key[:2] == (name, method)]

    def pairs(self, name: str, method: str) -> list[Pair]:
        """The bare and the guarded run of each seed."""
        return [(self.cells[name, BARE, own["seed"]], own) for own in self.of(method, name)]


def load(records: Iterable[Record]) -> Results:
    """A task that was not run bare has nothing to be compared with, and is left out."""
    newest = {(r["task"], r["method"], r["seed"]): r for r in one_law(records) if _is_of_today(r)}
    seeds: dict[str, dict[str, set[int]]] = {}
    for name, method, seed in newest:
        seeds.setdefault(name, {}).setdefault(method, set()).add(seed)
    common = {name: set.intersection(*by.values()) for name, by in seeds.items() if BARE in by}
    return Results({key: r for key, r in newest.items() if key[2] in common.get(key[0], ())})


def _is_of_today(record: Record) -> bool:
    name = record["task"]
    known = name in tasks() and record["method"] in METHODS
    return known and record["steps"] == tasks()[name].steps


class Change(NamedTuple):
    """By how much the guarded runs of a task are worse than the bare ones, as a share."""

    mean: float  # over seeds; infinite if a guarded run ends without a finite metric
    error: float  # its standard error; NaN for one seed


def change(task: Task, pairs: list[Pair]) -> Change | None:
    """None without a seed that both have.

    A bare run that is not finite is none to compare with.
    """
    found = [
        worse(task, bare["metric"], guarded["metric"])
        for bare, guarded in pairs
        if bare["metric"] is not None
    ]
    if not found:
        return None
    mean = statistics.fmean(found)
    if len(found) == 1 or math.isinf(mean):
        return Change(mean, math.nan)
    return Change(mean, statistics.stdev(found) / math.sqrt(len(found)))


def worse(task: Task, bare: float, guarded: float | None) -> float:
    """The change of the metric over the bare one; above 0 it is worse.

    >>> from benchmarks.health.tasks import tasks
    >>> round(worse(tasks()["mlp"], 0.50, 0.51), 9), round(worse(tasks()["grpo"], 0.50, 0.51), 9)
    (0.02, -0.02)
    """
    if guarded is None:
        return math.inf
    if guarded == bare:
        return 0.0
    gain = (guarded - bare) / (abs(bare) or math.ulp(0))
    return -gain if task.higher else gain


def skipped_share(records: Iterable[Record]) -> float:
    """Of all steps that were computed."""
    known = list(records)
    return sum(r["skipped"] for r in known) / max(1, sum(r["calls"] for r in known))


def ended(records: Iterable[Record]) -> list[Record]:
    """The runs in which the guard or its manager gave up."""
    return [r for r in records if r["ended"] is not None]
