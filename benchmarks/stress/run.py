"""AdamW, its rivals and the guard under too high learning rates, in four regimes.

    python -m benchmarks.stress --data-dir wikitext-2        # the full grid: hours, in pieces
    python -m benchmarks.stress --quick                      # minutes
    python -m benchmarks.stress --long --methods adamw guard --lrs 1  # five times as long
    python -m benchmarks.stress.tables                       # tables and figure of what is there

Regimes: LoRA (`lora`) and full-parameter fine-tuning (`full`) of a base that is trained first
(see `benchmarks.stress.bench`), from scratch at a constant rate (`scratch`), and from scratch with
warm-up + cosine, b2 0.95, weight decay 0.1, clip 1.0 (`recipe`). In each, AdamW's learning rate is
tuned by the valid split, with seed 0; then every method runs at multiples of it.
Every cell is appended to the result file as it finishes, and a cell that is there is not run again:
a run may be killed and started again, split by `--regimes`, `--methods`, `--lrs` and `--seeds`. A
run takes one core: for two, start two with different `--methods` on the same file. A cell of the
guard is run again when the law has another version (`lbw_optax.law.control.LAW`).
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.command import check_names, refuse
from benchmarks.ladder import ladder
from benchmarks.records import FOLDER, Cell, Record, law, out_help, quick
from benchmarks.runner import Book
from benchmarks.stress.bench import Bench, prepare
from benchmarks.stress.methods import METHODS, QUICK
from benchmarks.stress.pace import share_of_steps
from benchmarks.stress.regimes import (
    LONGER,
    REGIMES,
    SIZES,
    TO_300,
    Regime,
    perplexity_before,
    run_cell,
)
from train import jsonl
from train.data import DataError
from train.provenance import provenance

RESULTS = FOLDER / "stress.jsonl"
SEEDS = (3, 4, 5)  # with 0 to 2 the law was chosen
TUNING_SEED = 0  # whatever the seeds of this run, so that runs in pieces share one tuned rate
QUICK_LRS = ("1", "10", "100")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    provenance()  # now, before anything is edited
    try:
        bench = prepare(options.data_dir, SIZES[options.size])
    except DataError as error:
        refuse(str(error))
    tuned: dict[str, float] = {}
    before = functools.cache(functools.partial(perplexity_before, bench))

    def measured(cell: Cell) -> Record:
        run = measure(bench, before, cell)
        rate = tuned.get(cell["regime"])  # None while it is looked for
        return {"tuned": rate, **_compared(book, cell, rate, run)}

    book = Book(options.out, bench.facts, measured, bench.about)
    for regime in options.regimes:
        loss = functools.cache(functools.partial(_tuning_loss, book, bench, regime))
        tuned[regime] = tune(loss, regime)
        print(f"{regime}: AdamW's tuned learning rate is {tuned[regime]:g}", file=sys.stderr)
    cells = [
        cell
        for regime, rate in tuned.items()
        for cell in plan(regime, rate, bench.size.steps[regime], options)
    ]
    runner.run(book, cells, functools.partial(_line, options.split))


def long_results(results: Path) -> Path:
    """The file of the long runs beside that of the others."""
    return results.with_stem(f"{results.stem}_long")


def tune(loss: Callable[[float], float], regime: str) -> float:
    """AdamW's rate in this regime, by its `ladder`."""
    return ladder(loss, REGIMES[regime].guess)


def plan(regime: str, tuned: float, steps: int, options: argparse.Namespace) -> list[Cell]:
    """The cells of one regime, those of one method together."""
    rates = [round(tuned * k, 12) for k in REGIMES[regime].multiples if k in options.lrs]
    return [
        cell_of(regime, method, lr, seed, steps)
        for method in options.methods
        if regime in METHODS[method].regimes
        for lr in (rates if METHODS[method].takes_lr else [None])
        for seed in options.seeds
    ]


def cell_of(regime: str, method: str, lr: float | None, seed: int, steps: int) -> Cell:
    """One run; `lr` is None for a method that takes none."""
    cell = {"regime": regime, "method": method, "lr": lr, "seed": seed, "steps": steps}
    return {**cell, "law": law(METHODS[method].guarded)}


def _tuning_loss(book: Book, bench: Bench, regime: str, lr: float) -> float:
    cell = cell_of(regime, "adamw", lr, TUNING_SEED, bench.size.steps[regime])
    found = book.record(cell)["perplexity"]["valid"]
    perplexity = math.inf if found is None else found
    print(f"tuning {regime}: lr {lr:g}, valid perplexity {perplexity:.2f}", file=sys.stderr)
    return perplexity


def measure(bench: Bench, before: Callable[[Regime, int], dict[str, float]], cell: Cell) -> Record:
    """Run one cell; `before` gives the perplexities of a regime and seed before training."""
    regime, method = REGIMES[cell["regime"]], METHODS[cell["method"]]
    run = run_cell(bench, regime, method.build, cell["lr"] or 1.0, cell["seed"])
    return {
        "before": before(regime, cell["seed"]),
        "perplexity": run["perplexity"],
        "valid_curve": jsonl.finite([round(loss, 4) for loss in run["valid_curve"]]),
        "guard": interventions(**run["metrics"]) if run["metrics"] else None,
        "seconds": round(run["seconds"], 2),
    }


def _compared(book: Book, cell: Cell, rate: float | None, run: Record) -> Record:
    """The same with its pace instead of its curve; AdamW's, which others are compared with, stays.

    Its run at the tuned rate with the same seed comes first, where it is not there.
    """
    if cell["method"] == "adamw" or rate is None:
        return run
    reference = book.record(cell_of(cell["regime"], "adamw", rate, cell["seed"], cell["steps"]))
    pace = share_of_steps(run.pop("valid_curve"), reference["valid_curve"])
    return run | {"pace": pace}


def interventions(scale: list[float], events: list[int], skips: list[int]) -> dict[str, Any]:
    """What the guard did, from its metrics of every step.

    The soft start ends when the scale first reaches 0.9, at the latest half way through the run.
    `cuts` counts how often the scale falls below 0.9 from there on, `share_below` tells for what
    share of the run it stays there.

    >>> done = interventions([0.5, 0.95, 1.0, 0.8, 0.8, 1.0, 1.0, 0.7], [1, 3], [0, 1])
    >>> [done[key] for key in ("soft_start", "cuts", "share_below", "events", "skips")]
    [1, 2, 0.375, 3, 1]
    """
    low = [value < 0.9 for value in scale]
    soft_start = min([*(i for i, is_low in enumerate(low) if not is_low), len(low) // 2])
    after = low[soft_start:]
    return {
        "events": events[-1],
        "skips": skips[-1],
        "soft_start": soft_start,
        "cuts": sum(now and not before for before, now in itertools.pairwise([False, *after])),
        "share_below": round(sum(after) / len(scale), 4),
        "smallest": round(min(scale), 4),
        "last": round(scale[-1], 4),
    }


def _line(split: str, record: Record) -> str:
    rate = "its own rate" if record["lr"] is None else f"lr {record['lr']:g}"
    value = record["perplexity"][split]
    shown = "diverged" if value is None else f"{split} perplexity {value:.2f}"
    run = f"{record['regime']} {record['method']} {rate} seed {record['seed']}"
    return f"{run}: {shown} ({record['seconds']:.0f} s)"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data-dir", help="holds train.txt, valid.txt, test.txt; default: the embedded corpus")
    add("--regimes", nargs="+", default=list(REGIMES), metavar="NAME", help=" ".join(REGIMES))
    add("--methods", nargs="+", metavar="NAME", help=" ".join(METHODS))
    add("--lrs", nargs="+", metavar="K", help="multiples of the tuned rate: 1 3 10 30 100 300")
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 3 4 5")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a small model, few methods and rates, one seed"
    )
    size.add_argument(
        "--long", action="store_true", help=f"train {LONGER} times as long, results in a file apart"
    )
    add("--split", choices=("valid", "test"), default="test", help="what the progress shows")
    add("--out", type=Path, help=out_help(RESULTS))
    options = parser.parse_args(arguments)
    options.size = "quick" if options.quick else "long" if options.long else "default"
    usual = long_results(RESULTS) if options.long else RESULTS
    options.out = options.out or (quick(RESULTS) if options.quick else usual)
    multiples = [str(k) for k in TO_300]
    lrs = options.lrs or (QUICK_LRS if options.quick else multiples)
    options.seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    options.methods = options.methods or (QUICK if options.quick else list(METHODS))
    check_names(options.regimes, REGIMES, "regime")
    check_names(options.methods, METHODS, "method")
    check_names(lrs, multiples, "multiple of the tuned rate")
    options.lrs = [int(k) for k in lrs]
    return options


if __name__ == "__main__":
    main()
