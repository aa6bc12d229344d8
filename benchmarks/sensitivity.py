"""What each public knob of the guard does: one knob at a time, over decades around its default.

Run ``python -m benchmarks.sensitivity --data-dir DIR``; it writes
``benchmarks/results/sensitivity.jsonl``, a line a cell, and goes on where it stopped. Each line
holds the perplexity on the valid split at the tuned learning rate and far above it, and whether
the guard called itself exhausted. The learning rates are those that the stress benchmark starts
its search from.
"""

import argparse
import functools
from pathlib import Path

from benchmarks import runner
from benchmarks.records import FOLDER, Cell, Record, law
from benchmarks.runner import Book
from benchmarks.stress import methods
from benchmarks.stress.bench import Bench, prepare
from benchmarks.stress.regimes import REGIMES, SIZES, Factory, run_cell
from lbw_optax import lbw_guard
from train.provenance import provenance

RESULTS = FOLDER / "sensitivity.jsonl"

KNOBS: dict[str, tuple[float, ...]] = {
    "min_scale": (1e-4, 1e-3, 1e-2, 1e-1),
    "max_skips": (3, 30, 300),
    "max_interventions": (5, 50, 500),
}
MULTIPLES = {"lora": (1, 100), "recipe": (1, 30)}


def main() -> None:
    """Run the cells that the result file lacks."""
    parser = argparse.ArgumentParser(description="Sensitivity of the guard's knobs.")
    parser.add_argument("--data-dir", type=Path, help="as for benchmarks.stress")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    provenance()  # now, before anything is edited
    bench = prepare(options.data_dir, SIZES[options.size])
    book = Book(options.out, bench.facts, functools.partial(measure, bench), bench.about)
    runner.run(book, plan(bench), _line)


def plan(bench: Bench) -> list[Cell]:
    """All cells, those of one knob and value together."""
    return [
        {
            "knob": knob,
            "value": value,
            "regime": regime,
            "multiple": multiple,
            "steps": bench.size.steps[regime],
            "law": law(guarded=True),
        }
        for knob, values in KNOBS.items()
        for value in values
        for regime, multiples in MULTIPLES.items()
        for multiple in multiples
    ]


def measure(bench: Bench, cell: Cell) -> Record:
    """Run one cell."""
    regime, build = REGIMES[cell["regime"]], _guarded(cell["knob"], cell["value"])
    rate = cell["multiple"] * regime.guess
    result = run_cell(bench, regime, build, rate, seed=0, keep=("exhausted",))
    return {
        "learning_rate": rate,
        "perplexity": result["perplexity"]["valid"],
        "exhausted": bool(result["metrics"]["exhausted"][-1]),
        "interventions": int(result["metrics"]["events"][-1]),
        "smallest_scale": float(min(result["metrics"]["scale"])),
    }


@functools.cache  # one factory a knob and value, for a factory is compiled once
def _guarded(knob: str, value: float) -> Factory:
    return lambda recipe: lbw_guard(methods.adamw(recipe), **{knob: value})  # type: ignore[arg-type]


def _line(record: Record) -> str:
    cell = f"{record['knob']}={record['value']:g}, {record['regime']} ×{record['multiple']}"
    return f"{cell}: perplexity {record['perplexity']:.2f}"


if __name__ == "__main__":
    main()
