"""Faults put into training runs on purpose: who survives them, how soon, and at what price.

    python -m benchmarks.faults --data-dir wikitext-2        # everything: an hour, in pieces
    python -m benchmarks.faults --quick                      # minutes
    python -m benchmarks.faults.tables                       # tables and figure of what is there

Three parts (`--parts`). `grid`: each fault alone, for each method and seed. `calm`: long runs
without a fault, to count false interventions. `mix`: episodes with a random mix of faults.
Faults, methods and what the mix is are in `benchmarks.faults.methods`, the run itself is in
`benchmarks.faults.run`. AdamW's learning rate is tuned by the valid split first.

Every cell is appended to the result file as it finishes, and a cell that is there is not run again:
a run may be killed and started again, or split by `--parts`, `--faults`, `--methods`, `--seeds`. A
cell of the guard is run again when the guard's code has changed.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lbw_optax
from benchmarks.command import check_names, digest, refuse
from benchmarks.faults import measures, run
from benchmarks.faults.measures import Trace
from benchmarks.faults.methods import METHODS, MIX_STEPS, SCENARIOS, STRUCK, mix
from benchmarks.faults.run import State, Text
from benchmarks.stress.run import GUARD_CODE, code_digest
from lbw_optax.testing import Fault
from train import jsonl
from train.data import DataError
from train.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "faults.jsonl"
STEPS, CALM_STEPS = 300, run.LONGEST
PARTS = ("grid", "calm", "mix")
SEEDS = {"grid": range(20), "calm": range(2), "mix": range(200)}
QUICK_SEEDS = {"grid": range(2), "calm": range(0), "mix": range(4)}
QUICK_FAULTS = ("nan-gradient", "nan-10", "gradient-1e3", "flip-mu", "lr-10")
MIX_METHODS = ("adamw", "guard", "guard-rollback")
LADDER, TUNING_SEEDS = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2), (1000, 1001)


class Cell(NamedTuple):
    """One run; the scenario of a calm run is "none", that of an episode "mix"."""

    part: str
    scenario: str
    method: str
    seed: int


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
    facts = run.facts(text, options.data_dir)
    done = {record.get("key"): record for record in jsonl.read(options.out)}
    rate = tune(text, facts, done, options.out)
    cells = [cell for part in options.parts for cell in plan(part, options)]
    pending = [cell for cell in cells if _key(facts, rate, cell) not in done]
    print(f"{len(cells) - len(pending)} cells are there, {len(pending)} to run", file=sys.stderr)
    report = _progress(len(pending))
    for cell in pending:
        began = time.perf_counter()
        record = {"key": _key(facts, rate, cell), **cell._asdict(), **measure(text, rate, cell)}
        record |= {"rate": rate, "law": _law(cell.method), **facts, **provenance()}
        record["seconds"] = round(time.perf_counter() - began, 2)
        report(jsonl.append(options.out, record))


def plan(part: str, options: argparse.Namespace) -> list[Cell]:
    """The cells of one part; those of one method and seed stand together, they share a start."""
    scenarios = {"grid": options.faults, "calm": ["none"], "mix": ["mix"]}[part]
    return [
        Cell(part, scenario, method, seed)
        for method in options.methods
        if part != "mix" or method in MIX_METHODS
        for seed in options.seeds or (QUICK_SEEDS if options.quick else SEEDS)[part]
        for scenario in scenarios
    ]


def measure(text: Text, rate: float, cell: Cell) -> dict[str, Any]:
    """The numbers of one cell: see `benchmarks.faults.measures`."""
    if cell.part == "calm":
        _, trace, reasons = _run(text, rate, cell.method, cell.seed, [], CALM_STEPS)
        done = {"interventions": measures.interventions(trace), "reasons": reasons}
        return done | {"steps": CALM_STEPS}
    if cell.part == "mix":
        faults, steps, extra = mix(cell.seed), MIX_STEPS, 0
    else:
        scenario = SCENARIOS[cell.scenario]
        faults, extra = [replace(scenario.fault, seed=cell.seed)], scenario.extra
        steps = STEPS + extra
    clean = _clean(text, rate, METHODS[cell.method].build, cell.seed, steps - extra)
    state, trace, reasons = _run(text, rate, cell.method, cell.seed, faults, steps, clean)
    final = run.final_loss(text, state.params)["test"]
    strikes = [fault.at for fault in faults]
    found = measures.judge(trace, clean.trace.loss, final, clean.final["test"], strikes, extra)
    if reasons[-1:] == ["exhausted"]:
        found |= {"survived": False, "exhausted": True}
    return found | {"kinds": [fault.kind for fault in faults], "reasons": reasons}


def _run(
    text: Text,
    rate: float,
    method: str,
    seed: int,
    faults: Sequence[Fault],
    steps: int,
    clean: Clean | None = None,
) -> tuple[State, Trace, list[str]]:
    """A run with faults, and the reasons of its rollbacks.

    In the graph it takes over from the clean run where that had the same steps.
    """
    rates = run.learning_rates(rate, faults)
    build = METHODS[method].build
    if METHODS[method].rollback:
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


def tune(text: Text, facts: dict[str, Any], done: dict[str | None, Any], path: Path) -> float:
    """The rate of the ladder that is best for AdamW on valid, in the mean of its seeds."""

    def loss(rate: float) -> float:
        key = digest([facts, "tuning", STEPS, rate])
        if key not in done:
            finals = [
                _clean(text, rate, METHODS["adamw"].build, seed, STEPS).final["valid"]
                for seed in TUNING_SEEDS
            ]
            record = {"key": key, "part": "tuning", "rate": rate, "valid": finals}
            done[key] = jsonl.append(path, record | facts | provenance())
            print(f"tuning: rate {rate:g}, valid loss {np.mean(finals):.4f}", file=sys.stderr)
        return float(np.mean(done[key]["valid"]))

    return min(LADDER, key=loss)


def _key(facts: dict[str, Any], rate: float, cell: Cell) -> str:
    """A digest of all that determines a cell's numbers, but for the code of trainer and peers."""
    faults = mix(cell.seed) if cell.part == "mix" else [SCENARIOS[cell.scenario].fault]
    lengths = [STEPS, CALM_STEPS, MIX_STEPS, SCENARIOS.get(cell.scenario, SCENARIOS["none"]).extra]
    return digest([facts, rate, cell, [vars(f) for f in faults], lengths, _law(cell.method)])


def _law(method: str) -> str | None:
    """The guard's code; with rollback also that of the manager."""
    if METHODS[method].rollback:
        return ROLLBACK_CODE
    return GUARD_CODE if METHODS[method].guarded else None


# Read when the guard is imported, as `GUARD_CODE` is.
ROLLBACK_CODE = code_digest(
    Path(lbw_optax.__file__).parent, without=("__init__.py", "audit.py", "report.py", "testing.py")
)


def _progress(total: int) -> Callable[[dict[str, Any]], None]:
    """A function that reports a finished cell and the time that is left."""
    began, done = time.perf_counter(), 0

    def report(record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - began) * (total / done - 1)
        print(f"{done / total:4.0%}, {left / 60:.0f} min left: {_line(record)}", file=sys.stderr)

    return report


def _line(record: dict[str, Any]) -> str:
    name = f"{record['part']} {record['scenario']} {record['method']} seed {record['seed']}"
    if record["part"] == "calm":
        return f"{name}: {record['interventions']} interventions"
    final = "not a number" if record["final"] is None else f"{record['final']:.3f}"
    fate = "survived" if record["survived"] else "lost"
    return (
        f"{name}: {fate}, loss {final} ({record['clean']:.3f} without), {record['seconds']:.1f} s"
    )


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
    add("--out", type=Path, default=RESULTS, help="result file, JSON Lines")
    options = parser.parse_args(arguments)
    options.faults = options.faults or list(QUICK_FAULTS if options.quick else SCENARIOS)
    check_names(options.parts, PARTS, "part")
    check_names(options.faults, SCENARIOS, "fault")
    check_names(options.methods, METHODS, "method")
    return options


if __name__ == "__main__":
    main()
