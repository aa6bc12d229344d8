"""Sound training runs that look ill to a watcher: what does the guard cost them?

    python -m benchmarks.health                                      # all: an hour or less
    python -m benchmarks.health --tasks gan rare-1 --seeds 0 1       # some
    python -m benchmarks.pages                                       # HEALTH.md

The tasks are in `benchmarks.health.tasks`: rare classes, heavy tails, moving targets, curricula,
losses in other units. Each is trained by its own optimizer at its own rate, bare, bare with ten
steps of warm-up, under the guard, and under the guard with a rollback manager at its defaults, with
the same data. Every cell is appended to the result file as it finishes, and a cell that is there is
not run again: a run may be killed and started again, split by `--tasks`, `--methods` and `--seeds`,
or into two processes that write to one file. A cell of the guard is run again when the law has
another version.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runner
from benchmarks.command import check_names
from benchmarks.health.methods import METHODS
from benchmarks.health.tasks import tasks
from benchmarks.health.training import train
from benchmarks.records import FOLDER, Cell, Record, law
from benchmarks.runner import Book
from train import jsonl
from train.provenance import provenance

RESULTS = FOLDER / "health.jsonl"
SEEDS = (0, 1, 2, 3, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that the result file lacks."""
    options = _options(arguments)
    provenance()  # now, before anything is edited
    # Those of one task and method together, so that few programs are compiled.
    cells = [
        cell_of(name, method, seed)
        for name in options.tasks
        for method in options.methods
        for seed in options.seeds
    ]
    runner.run(Book(options.out, {}, measure, {}), cells, _line)


def cell_of(name: str, method: str, seed: int) -> Cell:
    """One run."""
    cell = {"task": name, "method": method, "seed": seed, "steps": tasks()[name].steps}
    return {**cell, "law": law(METHODS[method].guarded)}


def measure(cell: Cell) -> Record:
    """Run one cell. Without the guard a run states its metric only."""
    method, began = METHODS[cell["method"]], time.perf_counter()
    task = tasks()[cell["task"]]
    found = train(task, cell["seed"], method)
    record: Record = {"metric": jsonl.finite(float(f"{found.metric:.6g}"))}
    if method.guarded:
        record |= {"calls": found.calls, "skipped": found.skipped, "ended": found.ended}
        record |= {"scale": float(f"{found.scale:.3g}")}
    if method.rollback:
        record["rollbacks"] = found.reasons
    return {**record, "seconds": round(time.perf_counter() - began, 2)}


def _line(record: Record) -> str:
    run = f"{record['task']}, {record['method']}, seed {record['seed']}"
    shown = "not finite" if record["metric"] is None else f"{record['metric']:.4g}"
    unit = tasks()[record["task"]].unit
    skipped = f", {record['skipped']:g} skipped" if record.get("skipped") else ""
    back = f", {len(record['rollbacks'])} rollbacks" if record.get("rollbacks") else ""
    ended = f", ended at step {record['ended']}" if record.get("ended") else ""
    return f"{run}: {unit} {shown}{skipped}{back}{ended} ({record['seconds']:.0f} s)"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="NAME", help=" ".join(tasks()))
    add("--methods", nargs="+", metavar="NAME", help=" ".join(METHODS))
    add("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 0 to 4")
    add("--out", type=Path, default=RESULTS, help="result file, JSON Lines")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(tasks())
    options.methods = options.methods or list(METHODS)
    check_names(options.tasks, tasks(), "task")
    check_names(options.methods, METHODS, "method")
    return options


if __name__ == "__main__":
    main()
