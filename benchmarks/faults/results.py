"""The result file of the fault benchmark by part, and what its tables and its figure count.

In one table all methods have the same seeds: a seed that one of them lacks is left out of the row.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.faults.methods import METHODS, SCENARIOS
from benchmarks.records import Record, one_law

OURS = "guard-rollback"
RESTART = 250
"""Steps that a crash is taken to cost: on average, with a checkpoint every 500. An assumption."""

BySeed = dict[int, Record]


class Results(NamedTuple):
    """The newest record of each cell, by part."""

    grid: dict[tuple[str, str], list[Record]]  # by scenario and method
    calm: dict[str, list[Record]]  # by method
    mix: dict[str, BySeed]  # by method

    def methods(self) -> list[str]:
        return [name for name in METHODS if any(key[1] == name for key in self.grid)]

    def scenarios(self) -> list[str]:
        present = {key[0] for key in self.grid}
        return [name for name in SCENARIOS if name in present and name != "none"]

    def of(self, method: str) -> list[Record]:
        """All runs of a method with faults in them."""
        struck = [r for (_, name), found in self.grid.items() if name == method for r in found]
        return struck + list(self.mix.get(method, {}).values())


def load(records: Iterable[Record]) -> Results:
    """Of one law, and with the seeds that all methods of a table have."""
    found: dict[tuple[str, str], dict[str, BySeed]] = {}
    for r in cells(records):
        by_method = found.setdefault((r["part"], r["scenario"]), {})
        by_method.setdefault(r["method"], {})[r["seed"]] = r
    results = Results({}, {}, {})
    for (part, scenario), by_method in found.items():
        for method, by_seed in _same_seeds(by_method).items():
            if part == "grid":
                results.grid[scenario, method] = list(by_seed.values())
            elif part == "calm":
                results.calm[method] = list(by_seed.values())
            else:
                results.mix[method] = by_seed
    return results


def cells(records: Iterable[Record]) -> list[Record]:
    """Without the tuning, and of one law."""
    return one_law(r for r in records if "scenario" in r)


def _same_seeds(by_method: Mapping[str, BySeed]) -> dict[str, BySeed]:
    common = sorted(set.intersection(*map(set, by_method.values())))
    return {
        method: {seed: by_seed[seed] for seed in common}
        for method, by_seed in by_method.items()
        if common
    }


def survival(results: Results, scenario: str, method: str) -> float:
    """Share of seeds; NaN where there is none."""
    found = results.grid.get((scenario, method), [])
    return sum(r["survived"] for r in found) / len(found) if found else math.nan


def recoveries(record: Record) -> list[float]:
    """Steps to recover from each fault of a run; a run that is lost has recovered from none."""
    lost = not record["survived"]
    return [math.inf if lost or steps is None else steps for steps in record["recovery"]]


def paired(results: Results, method: str = OURS) -> list[tuple[Record, Record]]:
    """Episodes of AdamW and the same of this method."""
    bare, ours = results.mix.get("adamw", {}), results.mix.get(method, {})
    return [(bare[seed], ours[seed]) for seed in sorted(bare.keys() & ours.keys())]


def waste(results: Results, method: str, restart: int = RESTART) -> float | None:
    """Steps wasted per crash of AdamW."""
    pairs = paired(results, method)
    crashes = sum(not bare["survived"] for bare, _ in pairs)
    lost = sum(r["lost"] + restart * (not r["survived"]) for _, r in pairs)
    return lost / crashes if crashes else None


def spans(seeds: Iterable[int]) -> str:
    """Seeds in short.

    >>> spans([3, 0, 1, 2, 7])
    '0–3, 7'
    """
    found: list[list[int]] = []
    for seed in sorted(seeds):
        if found and seed == found[-1][-1] + 1:
            found[-1].append(seed)
        else:
            found.append([seed])
    return ", ".join(f"{s[0]}–{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in found)
