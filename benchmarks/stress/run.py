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
guard is run again when the guard's code has changed.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import lbw_optax
from benchmarks.command import check_names, digest, refuse
from benchmarks.stress.bench import Bench, prepare
from benchmarks.stress.methods import METHODS, QUICK
from benchmarks.stress.regimes import LONGER, REGIMES, SIZES, TO_300, perplexity_before, run_cell
from train import jsonl
from train.data import DataError
from train.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "stress.jsonl"
SEEDS = (0, 1, 2)
TUNING_SEED = 0  # whatever the seeds of this run, so that runs in pieces share one tuned rate
QUICK_LRS = ("1", "10", "100")
APART = (
    *("__init__.py", "audit.py", "report.py", "testing.py"),
    *("rollback.py", "targets.py", "snapshots.py", "checkpoints.py", "folder.py", "journal.py"),
    *("agreement.py", "distress.py", "state.py"),
)
"""Modules of the guard that decide no number of a run that nothing rolls back."""


class Cell(NamedTuple):
    """One run. `tuned` is AdamW's learning rate in this regime; while it is looked for, None."""

    regime: str
    method: str
    lr: float | None  # None: the method takes none
    seed: int
    tuned: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    provenance()  # now, before anything is edited
    try:
        bench = prepare(options.data_dir, SIZES[options.size])
    except DataError as error:
        refuse(str(error))
    result, is_done = _memory(bench, options.out)
    cells = []
    for regime in options.regimes:
        loss = functools.partial(_tuning_loss, result, regime)
        tuned = tune(functools.cache(loss), regime)
        print(f"{regime}: AdamW's tuned learning rate is {tuned:g}", file=sys.stderr, flush=True)
        cells += plan(regime, tuned, options.methods, options.lrs, options.seeds)
    pending = [cell for cell in cells if not is_done(cell)]
    print(f"{len(cells) - len(pending)} cells are there, {len(pending)} to run", file=sys.stderr)
    report = _progress(sum(bench.size.steps[cell.regime] for cell in pending), options.split)
    for cell in pending:
        report(cell, result(cell))


def long_results(results: Path) -> Path:
    """The file of the long runs beside that of the others."""
    return results.with_stem(f"{results.stem}_long")


def tune(loss: Callable[[float], float], regime: str) -> float:
    """AdamW's rate in this regime, by its `ladder`."""
    return ladder(loss, REGIMES[regime].guess)


def ladder(loss: Callable[[float], float], guess: float) -> float:
    """The rate on the ladder 1, 2, 5, 10, … whose neighbours are both worse, from a guess.

    >>> ladder(lambda lr: abs(lr - 0.04), guess=0.002)
    0.05
    """
    rungs = [round(digit * 10.0**power, 12) for power in range(-7, 3) for digit in (1, 2, 5)]
    best = rungs.index(guess)
    while True:
        lowest = min((best, best - 1, best + 1), key=lambda i: loss(rungs[i]))
        if lowest == best:
            return rungs[best]
        best = lowest


def plan(
    regime: str, tuned: float, methods: Iterable[str], lrs: Iterable[int], seeds: Iterable[int]
) -> list[Cell]:
    """The cells of one regime, those of one method together."""
    rates = [round(tuned * k, 12) for k in REGIMES[regime].multiples if k in lrs]
    return [
        Cell(regime, method, lr, seed, tuned)
        for method in methods
        if regime in METHODS[method].regimes
        for lr in (rates if METHODS[method].takes_lr else [None])
        for seed in seeds
    ]


def _tuning_loss(result: Callable[[Cell], dict[str, Any]], regime: str, lr: float) -> float:
    found = result(Cell(regime, "adamw", lr, TUNING_SEED))["perplexity"]["valid"]
    perplexity = math.inf if found is None else found
    print(f"tuning {regime}: lr {lr:g}, valid perplexity {perplexity:.2f}", file=sys.stderr)
    return perplexity


def _memory(
    bench: Bench, path: Path
) -> tuple[Callable[[Cell], dict[str, Any]], Callable[[Cell], bool]]:
    """A function that gives a cell's record, run or remembered, and one that says which."""
    done = {record.get("key"): record for record in jsonl.read(path)}
    before = functools.cache(functools.partial(perplexity_before, bench))

    def result(cell: Cell) -> dict[str, Any]:
        key = _key(bench, cell)
        if key not in done:
            start = {"key": key, "before": before(REGIMES[cell.regime], cell.seed)}
            done[key] = jsonl.append(path, start | _record(bench, cell))
        return done[key]

    return result, lambda cell: _key(bench, cell) in done


def _key(bench: Bench, cell: Cell) -> str:
    """A digest of all that determines a cell's numbers, but for the code of trainer and peers."""
    regime = REGIMES[cell.regime]._replace(title="", multiples=(), guess=0.0)
    facts = [bench.facts, bench.size.steps[cell.regime], regime, cell[:4], _law(cell.method)]
    return digest(facts)


def _law(method: str) -> str | None:
    return GUARD_CODE if METHODS[method].guarded else None


def code_digest(package: Path, without: Collection[str] = APART) -> str:
    """A digest of the guard's modules but for these, without comments, docstrings and layout."""
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.name not in without:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    _drop_docstring(node)
            code.update(f"{path.name} {ast.dump(tree)}".encode())
    return code.hexdigest()[:16]


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> None:
    if ast.get_docstring(node) is not None:
        del node.body[0]


# Read when the guard is imported, for a long run must not name code that was edited meanwhile.
GUARD_CODE = code_digest(Path(lbw_optax.__file__).parent)


def _record(bench: Bench, cell: Cell) -> dict[str, Any]:
    regime, method = REGIMES[cell.regime], METHODS[cell.method]
    run = run_cell(bench, regime, method.build, cell.lr or 1.0, cell.seed)
    return {
        **cell._asdict(),
        "multiple": round(cell.lr / cell.tuned) if cell.lr and cell.tuned else None,
        "law": _law(cell.method),
        "steps": bench.size.steps[cell.regime],
        "perplexity": run["perplexity"],
        "train_curve": [round(loss, 4) for loss in run["train_curve"]],
        "valid_curve": [round(loss, 4) for loss in run["valid_curve"]],
        "guard": interventions(**run["metrics"]) if run["metrics"] else None,
        "seconds": round(run["seconds"], 2),
        **bench.facts,
        **provenance(),
    }


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


def _progress(total: int, split: str) -> Callable[[Cell, dict[str, Any]], None]:
    """A function that reports a finished cell; `total` counts the training steps of them all."""
    bar = tqdm(total=total, unit="step", disable=not sys.stderr.isatty())
    began, done = time.perf_counter(), 0

    def report(cell: Cell, record: dict[str, Any]) -> None:
        nonlocal done
        done += record["steps"]
        left = (time.perf_counter() - began) * (total / done - 1)
        line = _line(cell, record, split)
        if bar.disable:
            print(f"{done / total:4.0%}, {left / 60:.0f} min left: {line}", file=sys.stderr)
        else:
            bar.write(line, file=sys.stderr)
            bar.update(record["steps"])

    return report


def _line(cell: Cell, record: dict[str, Any], split: str) -> str:
    rate = "its own rate" if cell.lr is None else f"lr {cell.lr:g}"
    value = record["perplexity"][split]
    shown = "diverged" if value is None else f"{split} perplexity {value:.2f}"
    return (
        f"{cell.regime} {cell.method} {rate} seed {cell.seed}: {shown} ({record['seconds']:.0f} s)"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data-dir", help="holds train.txt, valid.txt, test.txt; default: the embedded corpus")
    add("--regimes", nargs="+", default=list(REGIMES), metavar="NAME", help=" ".join(REGIMES))
    add("--methods", nargs="+", metavar="NAME", help=" ".join(METHODS))
    add("--lrs", nargs="+", metavar="K", help="multiples of the tuned rate: 1 3 10 30 100 300")
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a small model, few methods and rates, one seed"
    )
    size.add_argument(
        "--long", action="store_true", help=f"train {LONGER} times as long, results in a file apart"
    )
    add("--split", choices=("valid", "test"), default="test", help="what the progress shows")
    add("--out", type=Path, help="result file, JSON Lines")
    options = parser.parse_args(arguments)
    options.size = "quick" if options.quick else "long" if options.long else "default"
    options.out = options.out or (long_results(RESULTS) if options.long else RESULTS)
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
