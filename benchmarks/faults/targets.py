"""The targets of the fault benchmark: the article's figures, and what was measured."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import chi2  # type: ignore[import-untyped]

from benchmarks.faults.results import (
    OURS,
    RESTART,
    Results,
    paired,
    recoveries,
    survival,
    waste,
)
from benchmarks.records import Record


class Target(NamedTuple):
    """A row of the table of targets."""

    title: str
    article: str
    must: str
    aim: str
    measured: str


def targets(results: Results) -> list[Target]:
    """Each row as measured for the guard with rollback."""
    return [
        Target("crashes in the mix, against AdamW", "−93 %", "−93 %", "none", _crashes(results)),
        Target("median steps to recover", "12", "≤ 12", "≤ 5", _recovery(results)),
        Target("compute wasted per crash", "−91 %", "−91 %", "−97 %", _waste(results)),
        Target(
            "false interventions per 1000 steps", "0.3", "≤ 0.3", "≤ 0.1", _false_alarms(results)
        ),
        Target("rollback distance", "≤ 50", "≤ 50", "median ≤ 25", _distance(results)),
        Target("NaN in parameters or optimizer state", "–", "never", "never", _nonfinite(results)),
        Target(
            "state lost after SIGKILL at a random moment",
            "–",
            "≤ cadence, 0 corrupt restores in 200 kills",
            "same",
            "see the tests of processes",
        ),
    ]


def _crashes(results: Results) -> str:
    pairs = paired(results)
    bare, ours = (sum(not pair[i]["survived"] for pair in pairs) for i in (0, 1))
    if not bare:
        return "–"
    steps = sum(pair[1]["steps_done"] for pair in pairs)
    return f"{_percent(ours / bare)} ({ours} for {bare}, in {steps / 1000:.0f} k steps)"


def _recovery(results: Results) -> str:
    """Over those faults of the grid that AdamW does not survive."""
    steps = [
        steps
        for name in results.scenarios()
        if survival(results, name, "adamw") < 0.5
        for r in results.grid.get((name, OURS), [])
        for steps in recoveries(r)
    ]
    if not steps:
        return "–"
    return f"{steps_text(statistics.median(steps))} (faults that AdamW does not survive)"


def _waste(results: Results) -> str:
    wasted = waste(results, OURS)
    if wasted is None:
        return "–"
    return f"{_percent(wasted / RESTART)} ({wasted:.1f} steps for {RESTART}, which are assumed)"


def _false_alarms(results: Results) -> str:
    found = results.calm.get(OURS, [])
    if not found:
        return "–"
    events, steps = interventions(found)
    low, high = (f"{1000 * bound / steps:.2f}" for bound in poisson_interval(events))
    runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
    return (
        f"{1000 * events / steps:.2f} ({events} in {runs} of {found[0]['steps']} steps: "
        f"{low} to {high} with 95 % confidence)"
    )


def interventions(records: Sequence[Record]) -> tuple[int, int]:
    """How many, and in how many steps."""
    return sum(r["interventions"] for r in records), sum(r["steps"] for r in records)


def poisson_interval(events: int) -> tuple[float, float]:
    """What mean is compatible with so many events, at 95 % (Garwood's exact interval).

    >>> [round(bound, 2) for bound in poisson_interval(1)]
    [0.03, 5.57]
    """
    low = chi2.ppf(0.025, 2 * events) / 2 if events else 0.0
    return float(low), float(chi2.ppf(0.975, 2 * events + 2) / 2)


def _distance(results: Results) -> str:
    steps = [distance for r in results.of(OURS) for distance in r.get("rollbacks", ())]
    if not steps:
        return "–"
    return f"median {statistics.median(steps):g}, at most {max(steps)} ({len(steps)} rollbacks)"


def _nonfinite(results: Results) -> str:
    found = results.of(OURS)
    return f"in {sum(r.get('nonfinite', False) for r in found)} of {len(found)} runs"


def steps_text(steps: float) -> str:
    """A dash for never."""
    return "–" if steps == float("inf") else f"{steps:g}"


def _percent(share: float) -> str:
    return f"{100 * (share - 1):+.1f} %".replace("-", "−")
