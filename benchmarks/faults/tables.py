"""Tables and figure from the result file of `python -m benchmarks.faults`.

    python -m benchmarks.faults.tables          # writes benchmarks/FAULTS.md and FAULTS.png

How each number is measured is said in `benchmarks.faults.measures` and above each table.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import records as files
from benchmarks.faults import figure
from benchmarks.faults.cells import RESULTS
from benchmarks.faults.methods import METHODS, MIX_EVERY, MIX_STEPS, SCENARIOS
from benchmarks.faults.results import (
    OURS,
    RESTART,
    Results,
    cells,
    load,
    recoveries,
    spans,
    survival,
    waste,
)
from benchmarks.faults.targets import interventions, steps_text, targets
from benchmarks.markdown import numbers
from benchmarks.records import Record, law_named, made_with
from train.provenance import commits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file, JSON Lines")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "FAULTS.md")
    options = parser.parse_args(arguments)
    records = files.read(options.results)
    if not any(record.get("part") == "grid" for record in records):
        parser.exit(2, f"{options.results} holds no cell: run python -m benchmarks.faults first\n")
    picture = options.out.with_suffix(".png")
    options.out.write_text(page(records, picture.name), encoding="utf-8")
    figure.draw(load(records), picture)
    print(f"wrote {options.out} and {picture}")


def page(records: Sequence[Record], picture: str) -> str:
    """The whole page."""
    results = load(records)
    parts = ["# Fault benchmark", _provenance(records), f"![Who survives what]({picture})"]
    parts += ["## Targets", target_table(results)]
    parts += ["## The mix", _MIX, mix_table(results), restarts(results)]
    parts += ["## Survived", _SURVIVED, survival_table(results), losses(results)]
    parts += [worse_than_adamw(results), won_by_others(results)]
    parts += ["## Steps to recover", _RECOVERED, recovery_table(results)]
    parts += ["## Steps lost", _LOST, lost_table(results)]
    parts += ["## Without a fault", _CALM, calm_table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results) -> str:
    """For the README: what each method survives, and the targets in one sentence each."""
    faults, rows = len(results.scenarios()), []
    for method in results.methods():
        shares = [survival(results, name, method) for name in results.scenarios()]
        known = [share for share in shares if not math.isnan(share)]
        mixed, wasted = results.mix.get(method, {}).values(), waste(results, method)
        crashes = f"{sum(not r['survived'] for r in mixed)} of {len(mixed)}" if mixed else "–"
        spent = "–" if wasted is None else f"{wasted:.0f}"
        title = METHODS[method].title
        rows.append([title, f"{math.fsum(known) * faults / len(known):.1f}", crashes, spent])
    head = ["", f"faults survived, of {faults}", "episodes of the mix lost"]
    table = numbers([*head, "steps wasted per crash of AdamW"], rows)
    said = "; ".join(f"{t.title}: {t.measured}" for t in targets(results)[1:6])
    parts = [table, f"Guard with rollback: {said}.", losses(results), worse_than_adamw(results)]
    return "\n\n".join(part for part in parts if part)


_SURVIVED = (
    "Seeds whose final test loss is at most 5 % above that of the same run without the fault, of "
    "those that all methods have. A run that its rollback manager stops counts as lost."
)
_RECOVERED = (
    "Median over seeds of the steps from the fault to the first from which on the parameters move "
    "in every one of 10 steps and their held-out loss is, in the mean, within 1 % of that without "
    "the fault at the same training step; 0: it was never otherwise; –: never, or lost in the end."
)
_LOST = (
    "Median over seeds of the steps that were done in vain: those in which no parameter moved, and "
    "those that a rollback undid."
)
_CALM = (
    "Interventions per 1000 steps in long runs: skips, cuts, holds and rollbacks of the guard, "
    "left-out steps of the others. Clipping is not counted. The runs are few, so that the rates "
    "are rough: the targets' table gives the interval."
)
_MIX = (
    f"Episodes of {MIX_STEPS} steps with one fault in {MIX_EVERY} steps on average, of every kind "
    "of the table below but those that fill a whole episode. All methods have the same episodes. "
    "A crash: a parameter that is not finite, or a final loss more than 5 % above that without "
    f"faults. Wasted compute: steps lost, and {RESTART} for a crash, per crash of AdamW."
)


def _provenance(records: Sequence[Record]) -> str:
    known = cells(records)
    newest = known[-1]
    shape = newest["model"]
    return (
        f"Data: {newest['data']}. Model: {shape['num_hidden_layers']} layers, "
        f"{shape['hidden_size']} wide, vocabulary {shape['vocab_size']}; sequences of "
        f"{newest['length']}, batch {newest['batch_size']}. Learning rate of all methods: "
        f"{newest['rate']:g}, AdamW's best on valid, after 20 steps of warm-up. Most faults strike "
        f"in step 100 of 300. Commit {commits(known)}"
        f"{law_named(known)}; {made_with(known, newest)}.\n\n"
        "Made by `python -m benchmarks.faults` and `python -m benchmarks.faults.tables`."
    )


def target_table(results: Results) -> str:
    return numbers(["", "article's figure", "must", "aim", "measured"], targets(results))


def mix_table(results: Results) -> str:
    rows = []
    for method in (name for name in METHODS if name in results.mix):
        records = list(results.mix[method].values())
        steps = [s for r in records for s in recoveries(r)]
        wasted = waste(results, method)
        rows.append(
            [
                METHODS[method].title,
                f"{len(records)}",
                spans(results.mix[method]),
                f"{sum(r['steps_done'] for r in records)}",
                f"{sum(len(r['kinds']) for r in records)}",
                f"{sum(not r['survived'] for r in records)}",
                steps_text(statistics.median(steps)) if steps else "–",
                "–" if wasted is None else f"{wasted:.1f}",
                f"{sum(len(r.get('rollbacks', ())) for r in records)}",
            ]
        )
    head = ["", "episodes", "seeds", "steps", "faults", "crashes", "steps to recover, median"]
    return numbers([*head, "steps wasted per crash of AdamW", "rollbacks"], rows) if rows else ""


def restarts(results: Results) -> str:
    """What the waste comes to when a crash costs less than is assumed."""
    said = []
    for restart in (RESTART, 100, 50):
        wasted = waste(results, OURS, restart)
        if wasted is not None:
            share = f"{100 * (wasted / restart - 1):+.0f} %".replace("-", "−")
            said.append(f"{share} if a crash costs {restart} steps")
    if not said:
        return ""
    return (
        f"That a crash costs {RESTART} steps is an assumption, not a measurement: it is what is "
        "lost on average with a checkpoint every 500 steps, without the time to notice the crash "
        f"and to start again. Compute wasted by the guard with rollback: {', '.join(said)}."
    )


def survival_table(results: Results) -> str:
    return _by_scenario(
        results, lambda records: f"{sum(r['survived'] for r in records)}/{len(records)}"
    )


def recovery_table(results: Results) -> str:
    def entry(records: Sequence[Record]) -> str:
        return steps_text(statistics.median(steps for r in records for steps in recoveries(r)))

    return _by_scenario(results, entry)


def lost_table(results: Results) -> str:
    return _by_scenario(
        results, lambda records: f"{statistics.median(r['lost'] for r in records):g}"
    )


def losses(results: Results) -> str:
    """Every fault that the guard with rollback does not always survive, said in words."""
    lines = []
    for name in results.scenarios():
        records = results.grid.get((name, OURS), [])
        lost = [r for r in records if not r["survived"]]
        if lost:
            ratios = [r["ratio"] for r in records if r["ratio"] is not None]
            ends = (
                f"median final loss {statistics.median(ratios) - 1:+.1%}" if ratios else "no loss"
            )
            stopped = sum(r.get("exhausted", False) for r in lost)
            by_itself = f" ({stopped} stopped with GuardExhausted, as told to)" if stopped else ""
            lines.append(
                f"- {SCENARIOS[name].title}: {len(lost)} of {len(records)} lost{by_itself}, {ends}"
            )
    return "\n".join(["Not always survived by the guard with rollback:\n", *(lines or ["- none"])])


def worse_than_adamw(results: Results) -> str:
    """Every fault after which a guarded run is lost more often than a bare one, said in words."""
    lines = [
        f"- {METHODS[method].title}, {SCENARIOS[name].title}: "
        f"{_survived(results, name, method)} survive, of AdamW {_survived(results, name, 'adamw')}"
        for method in results.methods()
        for name in results.scenarios()
        if METHODS[method].guarded
        and survival(results, name, method) < survival(results, name, "adamw")
    ]
    return "\n".join(["Where a guard is worse than bare AdamW:\n", *(lines or ["- nowhere"])])


def won_by_others(results: Results) -> str:
    """Every fault that another method survives more often than the guard with rollback."""
    lines = []
    for name in results.scenarios():
        others = [method for method in results.methods() if not METHODS[method].guarded]
        better = [m for m in others if survival(results, name, m) > survival(results, name, OURS)]
        if better:
            said = ", ".join(f"{METHODS[m].title} {_survived(results, name, m)}" for m in better)
            lines.append(f"- {SCENARIOS[name].title}: {said}, {_survived(results, name, OURS)}")
    head = "Where another method survives more often than the guard with rollback (the last):\n"
    return "\n".join([head, *(lines or ["- nowhere"])])


def _survived(results: Results, scenario: str, method: str) -> str:
    found = results.grid[scenario, method]
    return f"{sum(r['survived'] for r in found)} of {len(found)}"


def calm_table(results: Results) -> str:
    rows = []
    for name, method in METHODS.items():
        if found := results.calm.get(name):
            events, steps = interventions(found)
            seeds = spans(r["seed"] for r in found)
            rate = f"{1000 * events / steps:.2f}"
            rows.append([method.title, f"{len(found)}", seeds, f"{steps}", f"{events}", rate])
    head = ["", "runs", "seeds", "steps", "interventions", "per 1000 steps"]
    return numbers(head, rows) if rows else ""


def _by_scenario(results: Results, entry: Callable[[Sequence[Record]], str]) -> str:
    methods = results.methods()
    rows = [
        [SCENARIOS[name].title]
        + [entry(found) if (found := results.grid.get((name, m))) else "" for m in methods]
        for name in results.scenarios()
    ]
    return numbers(["", *(METHODS[method].title for method in methods)], rows)


if __name__ == "__main__":
    main()
