"""48 small training tasks: does a guarded run end where the tuned one ends?

    python -m benchmarks.atlas --data-dir wikitext-2                  # the half that chooses a law
    python -m benchmarks.atlas --data-dir wikitext-2 --half held-out  # once, when the law is fixed
    python -m benchmarks.atlas --quick                                # minutes
    python -m benchmarks.atlas.tables                                 # the page of what is there

The tasks are in `benchmarks.atlas.draw`, the methods in `benchmarks.atlas.methods`. In each task
the rate of its own optimizer is tuned by the validation loss with seed 0; then every method runs at
1, 3, 10 and 30 times that rate, and fine-tuned tasks at 100 times. Every cell is appended to the
result file as it finishes, and a cell that is there is not run again: a run may be killed and
started again, split by `--tasks`, `--methods`, `--lrs` and `--seeds`, or into two processes that
write to one file. A cell of the guard is run again when the law has another version.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runner
from benchmarks.atlas import data
from benchmarks.atlas.cell import finite, guess, run_cell
from benchmarks.atlas.draw import HALVES, TEXT, Task, tasks
from benchmarks.atlas.grid import facts_of
from benchmarks.atlas.methods import METHODS, OWN, QUICK
from benchmarks.command import check_names, refuse
from benchmarks.ladder import ladder
from benchmarks.records import FOLDER, Cell, Record, law, out_help, quick
from benchmarks.runner import Book
from benchmarks.stress.run import interventions
from train import jsonl
from train.data import DataError
from train.provenance import provenance

RESULTS = FOLDER / "atlas.jsonl"
TUNING_SEED = 0  # whatever the seeds of this run, so that runs in pieces share one tuned rate
MULTIPLES = (1, 3, 10, 30, 100)
QUICK_TASKS, QUICK_LRS = 3, ("1", "10")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    provenance()  # now, before anything is edited
    tuned: dict[str, float] = {}
    for task in options.tasks:
        try:
            book = _book(task, options, tuned)
        except DataError as error:
            refuse(str(error))
        tuned[task.name] = rate = tune(book, task)
        print(f"{task.name}: the tuned learning rate is {rate:g}", file=sys.stderr)
        runner.run(book, plan(task, rate, options), _line)


def tune(book: Book, task: Task) -> float:
    """The rate of the task's own optimizer, by its `ladder`."""

    def loss(lr: float) -> float:
        found = book.record(cell_of(task, OWN, lr, TUNING_SEED))["loss"]
        return finite(math.inf if found is None else found, lr)

    return ladder(functools.cache(loss), guess(task))


def plan(task: Task, tuned: float, options: argparse.Namespace) -> list[Cell]:
    """The cells of one task, those of one method together."""
    rates = [round(tuned * k, 12) for k in task.multiples if k in options.lrs]
    return [
        cell_of(task, method, lr, seed)
        for method in options.methods
        if METHODS[method].applies(task)
        for lr, seed in itertools.product(
            rates if METHODS[method].takes_lr else [None], options.seeds
        )
    ]


def cell_of(task: Task, method: str, lr: float | None, seed: int) -> Cell:
    """One run; `lr` is None for a method that takes none."""
    cell = {"task": task.name, "method": method, "lr": lr, "seed": seed, "steps": task.steps}
    return {**cell, "law": law(METHODS[method].guarded)}


def _book(task: Task, options: argparse.Namespace, tuned: dict[str, float]) -> Book:
    """A record holds all facts of its task, so that a task of another draw is another one."""
    facts: Record = {"facts_of_task": facts_of(task)}
    about = {}
    if task.family in TEXT:
        facts["tokens"] = data.text(options.data_dir, task.vocabulary).digest
        about["data"] = "standard library" if options.data_dir is None else options.data_dir.name

    def measured(cell: Cell) -> Record:
        run = measure(task, cell, options.data_dir, options.cache)
        return {"tuned": tuned.get(task.name), **run}  # None while it is looked for

    return Book(options.out, facts, measured, about)


def measure(task: Task, cell: Cell, directory: Path | None, cache: Path | None) -> Record:
    """Run one cell."""
    build, lr, seed = METHODS[cell["method"]].build, cell["lr"] or 1.0, cell["seed"]
    run = run_cell(task, build, lr, seed, directory=directory, cache=cache)
    return {
        "before": run["before"],
        "loss": jsonl.finite(run["loss"]),
        "valid_curve": jsonl.finite([round(loss, 4) for loss in run["valid_curve"]]),
        "guard": interventions(**run["metrics"]) if run["metrics"] else None,
        "seconds": round(run["seconds"], 2),
    }


def _line(record: Record) -> str:
    rate = "its own rate" if record["lr"] is None else f"lr {record['lr']:g}"
    shown = "diverged" if record["loss"] is None else f"loss {record['loss']:.4f}"
    run = f"{record['task']} {record['method']} {rate} seed {record['seed']}"
    return f"{run}: {shown} ({record['seconds']:.0f} s)"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atlas", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data-dir", type=Path, help="holds train.txt, valid.txt, test.txt; default: the embedded")
    add(
        "--half",
        choices=(*HALVES, "all"),
        default=HALVES[0],
        help="the tasks that choose the law, or those that are looked at once, when it is fixed: "
        "who looks at the guard on them and then changes the law has none left",
    )
    add("--tasks", nargs="+", metavar="NAME", help="default: all of the half")
    add("--methods", nargs="+", metavar="NAME", help=" ".join(METHODS))
    add("--lrs", nargs="+", metavar="K", help="multiples of the tuned rate: 1 3 10 30 100")
    add(
        "--seeds", nargs="+", type=int, default=[1], metavar="N", help="default: 1; 0 is for tuning"
    )
    add("--quick", action="store_true", help="few tasks, methods and rates")
    add("--cache", type=Path, help="a folder that keeps the bases of fine-tuned tasks")
    add("--out", type=Path, help=out_help(RESULTS))
    options = parser.parse_args(arguments)
    options.out = options.out or (quick(RESULTS) if options.quick else RESULTS)
    known = tasks(None if options.half == "all" else options.half)
    lrs = options.lrs or (QUICK_LRS if options.quick else [str(k) for k in MULTIPLES])
    quickest = sorted(known, key=lambda name: known[name].steps)[:QUICK_TASKS]
    options.tasks = options.tasks or (quickest if options.quick else list(known))
    options.methods = options.methods or list(QUICK if options.quick else METHODS)
    check_names(options.tasks, known, f"task of {options.half}")
    check_names(options.methods, METHODS, "method")
    check_names(lrs, [str(k) for k in MULTIPLES], "multiple of the tuned rate")
    options.tasks = [known[name] for name in options.tasks]
    options.lrs = [int(k) for k in lrs]
    return options


if __name__ == "__main__":
    main()
