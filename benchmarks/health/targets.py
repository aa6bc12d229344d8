"""The targets of the health benchmark: what must hold, and what was measured for one method."""

import math
from typing import NamedTuple

from benchmarks.health.methods import WARMED_UP
from benchmarks.health.results import Change, Results, change, ended, skipped_share
from benchmarks.health.tasks import tasks
from benchmarks.records import Record

SKIPPED = 0.001
"""The share of sound steps that may be skipped."""


class Target(NamedTuple):
    """A row of the table of targets. A bound that holds is reached once every task was run."""

    title: str
    must: str
    measured: str
    holds: bool | None  # None while nothing was measured
    complete: bool

    @property
    def verdict(self) -> str:
        if self.holds is None or (self.holds and not self.complete):
            return "not measured" if self.holds is None else "holds so far"
        return "reached" if self.holds else "missed"


def targets(results: Results, method: str) -> list[Target]:
    of_task = {name: results.of(method, name) for name in tasks()}
    complete = all(of_task.values())
    runs = [record for records in of_task.values() for record in records]
    gave_up, share = len(ended(runs)), skipped_share(runs)
    shares = {name: skipped_share(records) for name, records in of_task.items() if records}
    worst = max(shares, key=lambda name: shares[name], default=None)
    rows: list[tuple[str, str, str, bool]] = []
    if runs and worst:
        bound = f"at most {100 * SKIPPED:g} %"
        said = _share(shares[worst]) + (f" ({worst})" if shares[worst] else "")
        rows += [
            ("runs ended by the guard", "none", f"{gave_up} of {len(runs)}", not gave_up),
            ("sound steps skipped, of all", bound, _share(share), share <= SKIPPED),
            ("sound steps skipped, worst task", bound, said, shares[worst] <= SKIPPED),
        ]
    rows += [row for allowed in _bounds() if (row := _metric(results, method, allowed))]
    return [Target(*row, complete) for row in rows]


def _bounds() -> list[float]:
    return sorted({task.allowed for task in tasks().values()})


def _metric(results: Results, method: str, allowed: float) -> tuple[str, str, str, bool] | None:
    """The worst of those tasks that may be worse by so much."""
    names = [name for name, task in tasks().items() if task.allowed == allowed]
    found = {n: c for n in names if (c := change(tasks()[n], results.pairs(n, method)))}
    if not found:
        return None
    worst = max(found, key=lambda name: found[name].mean)
    title = "final metric, worst task" if len(names) > 1 else f"final metric, {names[0]}"
    measured = said(found[worst]) + (f" ({worst})" if len(names) > 1 else "")
    bound = f"at most {100 * allowed:g} % worse than bare"
    return title, bound, measured, found[worst].mean <= allowed


def missed(results: Results, method: str) -> list[str]:
    """Every task in which this method misses a target, with what it misses.

    And what a warm-up alone does to that task, where it was run.
    """
    lines = []
    for name, task in tasks().items():
        parts = [f"{task.unit} {said(c)}"] if (c := _too_bad(results, name, method)) else []
        if parts and (alone := change(task, results.pairs(name, WARMED_UP))):
            parts[0] += f" (warm-up without a guard: {said(alone)})"
        parts += _too_often(results.of(method, name))
        if parts:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _too_bad(results: Results, name: str, method: str) -> Change | None:
    found = change(tasks()[name], results.pairs(name, method))
    return found if found and found.mean > tasks()[name].allowed else None


def _too_often(runs: list[Record]) -> list[str]:
    gave_up, share = len(ended(runs)), skipped_share(runs)
    parts = [f"{gave_up} of {len(runs)} runs ended"] if gave_up else []
    return parts + ([f"{_share(share)} of the steps skipped"] if share > SKIPPED else [])


def said(found: Change) -> str:
    """How much worse, with the standard error over seeds.

    >>> said(Change(0.0213, 0.004)), said(Change(-0.001, math.nan)), said(Change(math.inf, 1.0))
    ('+2.1 ± 0.4 %', '−0.1 %', 'not finite')
    """
    if math.isinf(found.mean):
        return "not finite"
    error = "" if math.isnan(found.error) else f" ± {100 * found.error:.1f}"
    return f"{100 * found.mean:+.1f}{error} %".replace("-", "−")


def _share(share: float) -> str:
    return f"{100 * share:.2f} %"
