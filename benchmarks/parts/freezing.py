"""What docs/freezing.md shows: faults of one layer, and runs in which nothing should freeze."""

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.freezing import FAULTS, METHODS, RATE, RESULTS, STEPS
from benchmarks.health.tasks import tasks
from benchmarks.markdown import numbers
from benchmarks.records import Record, law_named, made_with, one_law, read
from train.provenance import commits

EVERY = 10
"""Steps from one recorded level of the held-out loss to the next."""


def faults() -> str:
    """Final loss over that without the fault, and the steps that it cost."""
    records = [r for r in one_law(read(RESULTS)) if r.get("rate") == RATE]
    runs = {(r["method"], r["fault"], r["seed"]): r for r in records}
    seeds = sorted({seed for _, _, seed in runs})
    rows = [
        [fault.title, *(_cell(runs, method, name, seeds) for method in METHODS)]
        for name, fault in FAULTS.items()
        if name != "none"
    ]
    head = ["", *(method.title for method in METHODS.values())]
    done = [
        [fault.title, *(_done(runs, method, name, seeds) for method in METHODS)]
        for name, fault in FAULTS.items()
    ]
    return (
        f"{numbers(head, rows)}\n\nFinal test loss over that of the same method and seed without "
        f"the fault, mean of {len(seeds)} seeds, and in brackets the steps that the fault cost, "
        f"mean of the same. What was done:\n\n{numbers(head, done)}\n\nFreezes, skipped steps, "
        f"rollbacks and clips of a layer's heads, summed over the seeds. {_where(records)}"
    )


def sound() -> str:
    """How often a group was frozen where nothing was broken."""
    records = one_law(read(RESULTS))
    kinds: dict[str, list[Record]] = {}
    for record in records:
        title = _sound_title(record)
        if title:
            kinds.setdefault(title, []).append(record)
    rows = [
        [title, f"{sum(r['steps'] for r in own):,}", str(_sum(own, "freezes")), _share(own)]
        for title, own in kinds.items()
    ]
    every = [record for own in kinds.values() for record in own]
    rows.append(
        [
            "all",
            f"{sum(r['steps'] for r in every):,}",
            str(_sum(every, "freezes")),
            _share(every),
        ]
    )
    return f"{numbers(['', 'steps', 'freezes', 'frozen group-steps'], rows)}\n\n{_where(every)}"


def lost_steps(record: Record, clean: Record) -> float | None:
    """Steps by which a run is behind the one without the fault, and those done twice; None: NaN.

    >>> falling = {"level": [4.0, 3.0, 2.0], "steps_done": 300}
    >>> lost_steps({"level": [4.0, 3.5, 2.5], "steps_done": 303}, falling)
    8.0
    """
    level, final = np.minimum.accumulate(clean["level"]), record["level"][-1]
    if final is None:
        return None
    steps = STEPS - EVERY * np.arange(len(level))[::-1]
    reached = float(np.interp(-final, -level, steps))
    return STEPS - reached + record["steps_done"] - STEPS


def _cell(runs: dict[Any, Record], method: str, fault: str, seeds: Iterable[int]) -> str:
    pairs = [
        (runs[method, fault, seed], runs[method, "none", seed])
        for seed in seeds
        if (method, fault, seed) in runs and (method, "none", seed) in runs
    ]
    if not pairs:
        return "–"
    losses = [run["loss"] / clean["loss"] for run, clean in pairs if run["loss"] is not None]
    lost = [x for run, clean in pairs if (x := lost_steps(run, clean)) is not None]
    if len(losses) < len(pairs) or len(lost) < len(pairs):
        return "not a number"
    return f"{statistics.mean(losses):.3f} ({statistics.mean(lost):.0f})"


def _done(runs: dict[Any, Record], method: str, fault: str, seeds: Iterable[int]) -> str:
    own = [runs[method, fault, seed] for seed in seeds if (method, fault, seed) in runs]
    found = Counter(
        {
            "freezes": _sum(own, "freezes"),
            "skips": _sum(own, "skips"),
            "rollbacks": sum(len(r["rollbacks"]) for r in own),
            "clips": sum(r.get("clips", 0) for r in own),
        }
    )
    told = [f"{n} {name if n > 1 else name[:-1]}" for name, n in found.items() if n]
    return ", ".join(told) or "–"


def _sound_title(record: Record) -> str | None:
    if "task" in record:
        return tasks()[record["task"]].title
    if (record["fault"], record["method"]) != ("none", "freeze"):
        return None
    return f"the decoder at {record['rate'] / RATE:.0f} × its tuned rate"


def _sum(records: Iterable[Record], name: str) -> int:
    return sum(r[name] for r in records)


def _share(records: list[Record]) -> str:
    """Of all groups in all steps."""
    whole = sum(r["steps"] * r.get("groups", 8) for r in records)
    return f"{100 * _sum(records, 'frozen') / whole:.3f} %"


def _where(records: list[Record]) -> str:
    return (
        f"(`python -m benchmarks.freezing`, at {commits(records)}, "
        f"{made_with(records, records[-1])}{law_named(records)}.)"
    )
