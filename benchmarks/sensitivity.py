"""What each public knob of the guard does: one knob at a time, over decades around its default.

Run ``python -m benchmarks.sensitivity --data-dir DIR``; it writes
``benchmarks/results/sensitivity.jsonl``, a line a cell, and goes on where it stopped. Each line
holds the perplexity on the valid split at the tuned learning rate and far above it, and whether
the guard called itself exhausted. The learning rates are those that the stress benchmark starts
its search from.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.stress import methods
from benchmarks.stress.bench import prepare
from benchmarks.stress.regimes import REGIMES, SIZES, run_cell
from lbw_optax import lbw_guard
from train import jsonl
from train.provenance import provenance

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
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/sensitivity.jsonl"), metavar="FILE"
    )
    options = parser.parse_args()
    done = {_key(record) for record in jsonl.read(options.out)}
    bench = prepare(options.data_dir, SIZES[options.size])
    for knob, values in KNOBS.items():
        for value in values:
            build = _guarded(knob, value)
            for regime, multiples in MULTIPLES.items():
                for multiple in multiples:
                    cell = {"knob": knob, "value": value, "regime": regime, "multiple": multiple}
                    if _key(cell) not in done:
                        print(jsonl.append(options.out, _run(bench, cell, build)))


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("knob", "value", "regime", "multiple"))


def _guarded(knob: str, value: Any) -> Any:
    return lambda recipe: lbw_guard(methods.adamw(recipe), **{knob: value})


def _run(bench: Any, cell: dict[str, Any], build: Any) -> dict[str, Any]:
    regime = REGIMES[cell["regime"]]
    result = run_cell(
        bench, regime, build, cell["multiple"] * regime.guess, seed=0, keep=("exhausted",)
    )
    return {
        **cell,
        "learning_rate": cell["multiple"] * regime.guess,
        "perplexity": result["perplexity"]["valid"],
        "exhausted": bool(result["metrics"]["exhausted"][-1]),
        "interventions": int(result["metrics"]["events"][-1]),
        "smallest_scale": float(min(result["metrics"]["scale"])),
        **bench.facts,
        **provenance(),
    }


if __name__ == "__main__":
    main()
