"""The targets of the stress benchmark: what must be reached, and what was measured."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.stress.grid import Grid, false_interventions, pace, perplexity, ratio, sensitivity
from benchmarks.stress.methods import METHODS
from benchmarks.stress.regimes import REGIMES

RATE_FREE = ("prodigy", "dadapt-adamw", "schedule-free")


class Target(NamedTuple):
    """One row; `measured` is None while a cell that it needs is missing."""

    title: str
    must: float
    aim: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.measured > self.must:
            return "missed"
        return "aim reached" if self.measured <= self.aim else "must reached"


def targets(grid: Grid) -> list[Target]:
    fine, scratch, recipe = ("lora", "full"), ("scratch",), ("recipe",)
    return [
        Target("tuned rate, each regime: guard ÷ AdamW", 1.01, 0.99, _at_tuned(grid)),
        Target("fine-tuning, ×3 … ×300: guard ÷ tuned AdamW", 1.05, 1.01, _above(grid, fine)),
        Target("from scratch, ×3 … ×30: guard ÷ tuned AdamW", 1.10, 1.00, _above(grid, scratch)),
        Target("warm-up + cosine, ×3 … ×30: guard ÷ tuned AdamW", 1.05, 0.97, _above(grid, recipe)),
        Target("warm-up + cosine, ×3 … ×30: guard ÷ best peer", 1.00, 1.00, _to_peers(grid)),
        Target("worst cell of all: guard ÷ best rate-free peer", 1.00, 0.90, _worst_cell(grid)),
        Target("S, each regime: guard ÷ best peer", 0.50, 0.10, _steadiness(grid)),
        Target("steps to AdamW's final loss, tuned rate, each regime", 1.00, 0.90, _pace(grid)),
        Target("false interventions per 1000 steps, tuned rate", 0.30, 0.10, _false(grid)),
        Target("every rate: chained guard ÷ AdamW", 1.01, 1.00, to_bare(grid, "guard-chained")),
    ]


def peers(grid: Grid, regime: str) -> list[str]:
    rivals = {name for name, method in METHODS.items() if not (method.guarded or method.control)}
    return [method for method in grid.methods(regime) if method in rivals]


def _at_tuned(grid: Grid) -> float | None:
    return _worst(ratio(grid, regime, "guard", 1) for regime in REGIMES)


def _above(grid: Grid, regimes: Iterable[str]) -> float | None:
    return _worst(
        ratio(grid, regime, "guard", multiple)
        for regime in regimes
        for multiple in REGIMES[regime].multiples[1:]
    )


def to_bare(grid: Grid, method: str) -> float | None:
    """The worst cell against AdamW at the same rate, with the same seed."""
    return _worst(
        ratio(grid, regime, method, multiple, of=multiple)
        for regime in REGIMES
        for multiple in REGIMES[regime].multiples
    )


def _to_peers(grid: Grid) -> float | None:
    def against(multiple: int) -> float | None:
        rivals = [perplexity(grid, "recipe", peer, multiple) for peer in peers(grid, "recipe")]
        return _over(
            perplexity(grid, "recipe", "guard", multiple),
            min((rival for rival in rivals if rival is not None), default=None),
        )

    return _worst(against(multiple) for multiple in REGIMES["recipe"].multiples[1:])


def _worst_cell(grid: Grid) -> float | None:
    """Regimes compare by the ratio to AdamW at its tuned rate."""

    def worst(method: str) -> float | None:
        return _worst(
            ratio(grid, regime, method, multiple)
            for regime in REGIMES
            for multiple in REGIMES[regime].multiples
        )

    rivals = [value for peer in RATE_FREE if (value := worst(peer)) is not None]
    return _over(worst("guard"), min(rivals, default=None))


def _steadiness(grid: Grid) -> float | None:
    def against(regime: str) -> float | None:
        if grid.multiples(regime) != list(REGIMES[regime].multiples):
            return None
        rated = [peer for peer in peers(grid, regime) if METHODS[peer].takes_lr]
        known = [s for peer in rated if (s := sensitivity(grid, regime, peer)) is not None]
        return _over(sensitivity(grid, regime, "guard"), min(known, default=None))

    return _worst(against(regime) for regime in REGIMES)


def _pace(grid: Grid) -> float | None:
    return _worst(pace(grid, regime, "guard", 1) for regime in REGIMES)


def _false(grid: Grid) -> float | None:
    complete = all(grid.records(regime, "guard", 1) for regime in REGIMES)
    return false_interventions(grid, "guard", REGIMES) if complete else None


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest; None when one is missing, for a target is about all of them."""
    known = list(values)
    return None if None in known else max(known)  # type: ignore[type-var]


def _over(value: float | None, other: float | None) -> float | None:
    if value is None or other is None:
        return None
    return value / other if other else math.inf
