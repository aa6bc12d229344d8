"""Faults put into training runs on purpose: who survives them, how soon, and at what price.

    python -m benchmarks.faults --data-dir wikitext-2        # everything: five hours, in pieces
    python -m benchmarks.faults --quick                      # minutes
    python -m benchmarks.faults.tables                       # tables and figure of what is there

Three parts (`--parts`). `grid`: each fault alone, for each method and seed. `calm`: long runs
without a fault, to count false interventions. `mix`: episodes with a random mix of faults.
Faults, methods and what the mix is are in `benchmarks.faults.methods`, the run itself is in
`benchmarks.faults.run`. AdamW's learning rate is tuned by the valid split first.

Every cell is appended to the result file as it finishes, and a cell that is there is not run again:
a run may be killed and started again, or split by `--parts`, `--faults`, `--methods`, `--seeds`. A
cell of the guard is run again when the law has another version (`lbw_optax.law.control.LAW`).
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import runner
from benchmarks.command import check_names, refuse
from benchmarks.faults import measures, run
from benchmarks.faults.measures import Trace
from benchmarks.faults.methods import (
    DRAWN,
    DRAWN_METHODS,
    METHODS,
    MIX_STEPS,
    SCENARIOS,
    STRUCK,
    mix,
)
from benchmarks.faults.run import State, Text
from benchmarks.records import FOLDER, Cell, Record, law, out_help, quick
from benchmarks.runner import Book
from lbw_optax.testing import Fault
from train.data import DataError
from train.provenance import provenance

RESULTS = FOLDER / "faults.jsonl"
STEPS, CALM_STEPS = 300, run.LONGEST
PARTS = ("grid", "calm", "mix")
# With the episodes of earlier seeds the law and the rollback were chosen.
SEEDS = {"grid": range(20), "calm": range(1), "mix": range(350, 550)}
QUICK_SEEDS = {"grid": range(2), "calm": range(0), "mix": range(350, 354)}
QUICK_FAULTS = ("nan-gradient", "nan-10", "gradient-1e3", "flip-mu", "lr-10")
MIX_METHODS = ("adamw", "guard", "guard-rollback")
SHARED = ("part", "method", "rate", "law")
"""Facts of a cell that stand with the setting in the result file."""
LADDER, TUNING_SEEDS = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2), (1000, 1001)


class Clean(NamedTuple):
    """A run without a fault, and its state when most faults strike."""

    trace: Trace
    final: dict[str, float]
    struck: State


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    provenance()  # now, before anything is edited
    try:
        text = run.load(options.data_dir)
    except DataError as error:
        refuse(str(error))
    about = run.about(options.data_dir)

    def measured(cell: Cell) -> Record:
        return kept(cell, measure(text, cell))

    book = Book(options.out, run.facts(text), measured, about, SHARED)
    rate = tune(book)
    cells = [cell for part in options.parts for cell in plan(part, rate, options)]
    runner.run(book, cells, _line)


def plan(part: str, rate: float, options: argparse.Namespace) -> list[Cell]:
    """The cells of one part; those of one method and seed stand together, they share a start."""
    scenarios = {"grid": options.faults, "calm": ["none"], "mix": ["mix"]}[part]
    return [
        cell_of(part, scenario, method, seed, rate)
        for method in options.methods
        if part != "mix" or method in MIX_METHODS
        for seed in options.seeds or (QUICK_SEEDS if options.quick else SEEDS)[part]
        for scenario in scenarios
    ]


def cell_of(part: str, scenario: str, method: str, seed: int, rate: float) -> Cell:
    """One run; the scenario of a calm run is "none", that of an episode "mix"."""
    steps = {"grid": STEPS, "calm": CALM_STEPS, "mix": MIX_STEPS}[part]
    if part == "grid":
        steps += SCENARIOS[scenario].extra
    cell = {"part": part, "scenario": scenario, "method": method, "seed": seed, "rate": rate}
    cell |= {"steps": steps, "law": law(METHODS[method].guarded)}
    return cell | {"kinds": [fault.kind for fault in mix(seed)]} if part == "mix" else cell


def measure(text: Text, cell: Cell) -> Record:
    """The numbers of one cell: see `benchmarks.faults.measures`."""
    of_part = {"tuning": _tuning, "calm": _calm, "grid": _struck, "mix": _struck}
    return of_part[cell["part"]](text, cell)


def kept(cell: Cell, found: Record) -> Record:
    """Of the measures those that a table or the figure needs; what is usual is not stated."""
    names = ["valid"] if cell["part"] == "tuning" else ["interventions"]
    if cell["part"] in ("grid", "mix"):
        names = ["ratio", "survived", "recovery", "lost"]
        names += [name for name in ("nonfinite", "rollbacks", "exhausted") if found[name]]
    if cell["part"] == "mix":
        names.append("steps_done")
    elif cell.get("scenario") in DRAWN and cell["method"] in DRAWN_METHODS:
        names.append("curve")
    return {name: found[name] for name in names}


def _tuning(text: Text, cell: Cell) -> Record:
    return {
        "valid": [
            _clean(text, cell["rate"], METHODS["adamw"].build, seed, STEPS).final["valid"]
            for seed in TUNING_SEEDS
        ]
    }


def _calm(text: Text, cell: Cell) -> Record:
    _, trace, reasons = _run(text, cell, [], cell["steps"])
    return {"interventions": measures.interventions(trace), "reasons": reasons}


def _struck(text: Text, cell: Cell) -> Record:
    seed, steps, extra = cell["seed"], cell["steps"], 0
    if cell["part"] == "mix":
        faults = mix(seed)
    else:
        scenario = SCENARIOS[cell["scenario"]]
        faults, extra = [replace(scenario.fault, seed=seed)], scenario.extra
    build = METHODS[cell["method"]].build
    clean = _clean(text, cell["rate"], build, seed, steps - extra)
    state, trace, reasons = _run(text, cell, faults, steps, clean)
    final = run.final_loss(text, state.params)["test"]
    strikes = [fault.at for fault in faults]
    found = measures.judge(trace, clean.trace.loss, final, clean.final["test"], strikes, extra)
    if reasons[-1:] == ["exhausted"]:
        found |= {"survived": False, "exhausted": True}
    return found | {"reasons": reasons}


def _run(
    text: Text, cell: Cell, faults: Sequence[Fault], steps: int, clean: Clean | None = None
) -> tuple[State, Trace, list[str]]:
    """A run with faults, and the reasons of its rollbacks.

    In the graph it takes over from the clean run where that had the same steps.
    """
    rates, seed = run.learning_rates(cell["rate"], faults), cell["seed"]
    method = METHODS[cell["method"]]
    build = method.build
    if method.rollback:
        from benchmarks.faults import rollback  # needs the extra `rollback`

        return rollback.run(text, build, seed, rates, faults, steps)
    shared = clean is not None and all(fault.at >= STRUCK for fault in faults)
    if clean is None or not shared:
        state = run.start(build, seed)
        return *run.run(text, build, seed, rates, faults, state, 0, steps), []
    state, after = run.run(text, build, seed, rates, faults, clean.struck, STRUCK, steps)
    before = jax.tree.map(lambda x: x[:STRUCK], clean.trace)
    return state, run.join([before, after]), []


@functools.lru_cache(maxsize=2)
def _clean(text: Any, rate: float, build: Any, seed: int, steps: int) -> Clean:
    rates = run.learning_rates(rate, [])
    start = run.start(build, seed)
    struck, before = run.run(text, build, seed, rates, [], start, 0, STRUCK)
    state, after = run.run(text, build, seed, rates, [], struck, STRUCK, steps)
    return Clean(run.join([before, after]), run.final_loss(text, state.params), struck)


def tune(book: Book) -> float:
    """The rate of the ladder that is best for AdamW on valid, in the mean of its seeds."""

    def loss(rate: float) -> float:
        found = book.record({"part": "tuning", "rate": rate, "steps": STEPS, "law": None})
        print(f"tuning: rate {rate:g}, valid loss {np.mean(found['valid']):.4f}", file=sys.stderr)
        return float(np.mean(found["valid"]))

    return min(LADDER, key=loss)


def _line(record: Record) -> str:
    name = f"{record['part']} {record['scenario']} {record['method']} seed {record['seed']}"
    if record["part"] == "calm":
        return f"{name}: {record['interventions']} interventions"
    ratio = "not a number" if record["ratio"] is None else f"{record['ratio']:.3f}"
    fate = "survived" if record["survived"] else "lost"
    return f"{name}: {fate}, final loss over that without: {ratio}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data-dir", help="holds train.txt, valid.txt, test.txt; default: the embedded corpus")
    add("--parts", nargs="+", default=list(PARTS), metavar="NAME", help=" ".join(PARTS))
    add("--faults", nargs="+", metavar="NAME", help=" ".join(SCENARIOS))
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=" ".join(METHODS))
    add("--seeds", nargs="+", type=int, metavar="N", help="default: as many as a part needs")
    add("--quick", action="store_true", help="few faults and seeds, no calm runs")
    add("--out", type=Path, help=out_help(RESULTS))
    options = parser.parse_args(arguments)
    options.out = options.out or (quick(RESULTS) if options.quick else RESULTS)
    options.faults = options.faults or list(QUICK_FAULTS if options.quick else SCENARIOS)
    check_names(options.parts, PARTS, "part")
    check_names(options.faults, SCENARIOS, "fault")
    check_names(options.methods, METHODS, "method")
    return options


if __name__ == "__main__":
    main()
