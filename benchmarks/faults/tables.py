"""Tables and figure from the result file of `python -m benchmarks.faults`.

    python -m benchmarks.faults.tables          # writes benchmarks/FAULTS.md and FAULTS.png

How each number is measured is said in `benchmarks.faults.measures` and above each table.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.cells import RESULTS
from benchmarks.faults.figure import draw
from benchmarks.faults.methods import METHODS, MIX_EVERY, MIX_STEPS, SCENARIOS
from benchmarks.records import one_law, read
from train.provenance import commits, machines

Record = dict[str, Any]
RESTART = 250
"""Steps that a crash costs on average when a checkpoint is written every 500."""
OURS = "guard-rollback"


class Results(NamedTuple):
    """The newest record of each cell, by part."""

    grid: dict[tuple[str, str], list[Record]]  # by scenario and method
    calm: dict[str, list[Record]]  # by method
    mix: dict[str, dict[int, Record]]  # by method and seed

    def methods(self) -> list[str]:
        return [name for name in METHODS if any(key[1] == name for key in self.grid)]

    def scenarios(self) -> list[str]:
        present = {key[0] for key in self.grid}
        return [name for name in SCENARIOS if name in present and name != "none"]


class Target(NamedTuple):
    """A row of the table of targets."""

    title: str
    article: str
    must: str
    aim: str
    measured: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file, JSON Lines")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "FAULTS.md")
    options = parser.parse_args(arguments)
    records = read(options.results)
    if not any(record.get("part") == "grid" for record in records):
        parser.exit(2, f"{options.results} holds no cell: run python -m benchmarks.faults first\n")
    picture = options.out.with_suffix(".png")
    results = load(records)
    options.out.write_text(report(results, records, picture.name), encoding="utf-8")
    draw(results, picture)
    print(f"wrote {options.out} and {picture}")


def load(records: Iterable[Record]) -> Results:
    cells = {(r["part"], r["scenario"], r["method"], r["seed"]): r for r in _cells(records)}
    results = Results({}, {}, {})
    for (part, scenario, method, seed), record in sorted(cells.items()):
        if part == "grid":
            results.grid.setdefault((scenario, method), []).append(record)
        elif part == "calm":
            results.calm.setdefault(method, []).append(record)
        else:
            results.mix.setdefault(method, {})[seed] = record
    return results


def _cells(records: Iterable[Record]) -> list[Record]:
    """Without the tuning, and of one law."""
    return one_law(r for r in records if "scenario" in r)


def report(results: Results, records: Sequence[Record], picture: str) -> str:
    parts = ["# Fault benchmark", _provenance(records), f"![Who survives what]({picture})"]
    parts += ["## Targets", target_table(results), "## The mix", _MIX, mix_table(results)]
    parts += ["## Survived", _SURVIVED, survival_table(results), losses(results)]
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
    table = _markdown([*head, "steps wasted per crash of AdamW"], rows)
    said = "; ".join(f"{t.title}: {t.measured}" for t in targets(results)[1:6])
    return f"{table}\n\nGuard with rollback: {said}.\n\n{losses(results)}"


_SURVIVED = (
    "Share of seeds whose final test loss is at most 5 % above that of the same run without the "
    "fault. A run that its rollback manager stops counts as lost."
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
    "Interventions per 1000 steps in runs of 10 000 steps: skips, cuts, holds and rollbacks of the "
    "guard, left-out steps of the others. Clipping is not counted."
)
_MIX = (
    f"Episodes of {MIX_STEPS} steps with one fault in {MIX_EVERY} steps on average, of every kind "
    "of the table below but those that fill a whole episode. A crash: a parameter that is not "
    "finite, or a final loss more than 5 % above that without faults. Wasted compute: steps lost, "
    f"and {RESTART} for a crash (a restart from a checkpoint every 500 steps), per crash of AdamW."
)


def _provenance(records: Sequence[Record]) -> str:
    records = _cells(records)
    newest = records[-1]
    shape, versions = newest["model"], newest["versions"]
    return (
        f"Data: {newest['data']}. Model: {shape['num_hidden_layers']} layers, "
        f"{shape['hidden_size']} wide, vocabulary {shape['vocab_size']}; sequences of "
        f"{newest['length']}, batch {newest['batch_size']}. Learning rate of all methods: "
        f"{newest['rate']:g}, AdamW's best on valid, after 20 steps of warm-up. Most faults strike "
        f"in step 100 of 300. Commit {commits(records)} (* with local changes); "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; {machines(records)}.\n\nMade by `python -m benchmarks.faults` and "
        "`python -m benchmarks.faults.tables`."
    )


def target_table(results: Results) -> str:
    rows = [list(row) for row in targets(results)]
    return _markdown(["", "article's figure", "must", "aim", "measured"], rows)


def targets(results: Results) -> list[Target]:
    """The issue's table, each row as measured for the guard with rollback."""
    return [
        Target("crashes in the mix, against AdamW", "−93 %", "−93 %", "none", _crashes(results)),
        Target("median steps to recover", "12", "≤ 12", "≤ 5", _recovery(results)),
        Target("compute wasted per crash", "−91 %", "−91 %", "−97 %", _waste(results)),
        Target(
            "false interventions per 1000 steps", "0.3", "≤ 0.3", "≤ 0.1", _false_alarms(results)
        ),
        Target("rollback distance", "≤ 50", "≤ 50", "median ≤ 25", _distance(results)),
        Target("NaN in parameters or optimizer state", "–", "never", "never", _nonfinite(results)),
        Target(
            "state lost after SIGKILL at a random moment",
            "–",
            "≤ cadence, 0 corrupt restores in 200 kills",
            "same",
            "see the tests of processes",
        ),
    ]


def _crashes(results: Results) -> str:
    pairs = paired(results)
    bare, ours = (sum(not pair[i]["survived"] for pair in pairs) for i in (0, 1))
    if not bare:
        return "–"
    steps = sum(pair[1]["steps_done"] for pair in pairs)
    return f"{_percent(ours / bare)} ({ours} for {bare}, in {steps / 1000:.0f} k steps)"


def _recovery(results: Results) -> str:
    """Over those faults of the grid that AdamW does not survive."""
    steps = [
        steps
        for name in results.scenarios()
        if survival(results, name, "adamw") < 0.5
        for r in results.grid.get((name, OURS), [])
        for steps in recoveries(r)
    ]
    return (
        f"{_steps(statistics.median(steps))} (faults that AdamW does not survive)" if steps else "–"
    )


def _waste(results: Results) -> str:
    wasted = waste(results, OURS)
    if wasted is None:
        return "–"
    return f"{_percent(wasted / RESTART)} ({wasted:.1f} steps for {RESTART})"


def waste(results: Results, method: str) -> float | None:
    """Steps wasted per crash of AdamW, in the episodes that both have."""
    pairs = paired(results, method)
    crashes = sum(not bare["survived"] for bare, _ in pairs)
    lost = sum(r["lost"] + RESTART * (not r["survived"]) for _, r in pairs)
    return lost / crashes if crashes else None


def _false_alarms(results: Results) -> str:
    records = results.calm.get(OURS, [])
    return f"{_per_thousand(records):.2f}" if records else "–"


def _per_thousand(records: Sequence[Record]) -> float:
    return 1000 * sum(r["interventions"] for r in records) / sum(r["steps"] for r in records)


def _distance(results: Results) -> str:
    records = [r for (_, method), found in results.grid.items() if method == OURS for r in found]
    records += results.mix.get(OURS, {}).values()
    steps = [distance for r in records for distance in r.get("rollbacks", ())]
    if not steps:
        return "–"
    return f"median {statistics.median(steps):g}, at most {max(steps)} ({len(steps)} rollbacks)"


def _nonfinite(results: Results) -> str:
    records = [r for (_, method), found in results.grid.items() if method == OURS for r in found]
    records += results.mix.get(OURS, {}).values()
    return f"in {sum(r.get('nonfinite', False) for r in records)} of {len(records)} runs"


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
                _spans(results.mix[method]),
                f"{sum(r['steps_done'] for r in records)}",
                f"{sum(len(r['kinds']) for r in records)}",
                f"{sum(not r['survived'] for r in records)}",
                _steps(statistics.median(steps)) if steps else "–",
                "–" if wasted is None else f"{wasted:.1f}",
                f"{sum(len(r.get('rollbacks', ())) for r in records)}",
            ]
        )
    head = ["", "episodes", "seeds", "steps", "faults", "crashes", "steps to recover, median"]
    return _markdown([*head, "steps wasted per crash of AdamW", "rollbacks"], rows) if rows else ""


def _spans(seeds: Iterable[int]) -> str:
    """Seeds in short.

    >>> _spans([3, 0, 1, 2, 7])
    '0–3, 7'
    """
    spans: list[list[int]] = []
    for seed in sorted(seeds):
        if spans and seed == spans[-1][-1] + 1:
            spans[-1].append(seed)
        else:
            spans.append([seed])
    return ", ".join(f"{s[0]}–{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans)


def paired(results: Results, method: str = OURS) -> list[tuple[Record, Record]]:
    """Episodes that both AdamW and this method have had."""
    bare, ours = results.mix.get("adamw", {}), results.mix.get(method, {})
    return [(bare[seed], ours[seed]) for seed in sorted(bare.keys() & ours.keys())]


def survival(results: Results, scenario: str, method: str) -> float:
    records = results.grid.get((scenario, method), [])
    return sum(r["survived"] for r in records) / len(records) if records else math.nan


def survival_table(results: Results) -> str:
    return _by_scenario(
        results, lambda records: f"{sum(r['survived'] for r in records)}/{len(records)}"
    )


def recovery_table(results: Results) -> str:
    def entry(records: Sequence[Record]) -> str:
        return _steps(statistics.median(steps for r in records for steps in recoveries(r)))

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
            lines.append(f"- {SCENARIOS[name].title}: {len(lost)} of {len(records)} lost, {ends}")
    return "\n".join(["Not always survived by the guard with rollback:\n", *(lines or ["- none"])])


def calm_table(results: Results) -> str:
    rows = [
        [METHODS[name].title, f"{sum(r['steps'] for r in found)}", f"{_per_thousand(found):.2f}"]
        for name in METHODS
        if (found := results.calm.get(name))
    ]
    return _markdown(["", "steps", "interventions per 1000"], rows) if rows else ""


def _by_scenario(results: Results, entry: Callable[[Sequence[Record]], str]) -> str:
    methods = results.methods()
    rows = [
        [SCENARIOS[name].title]
        + [entry(found) if (found := results.grid.get((name, m))) else "" for m in methods]
        for name in results.scenarios()
    ]
    return _markdown(["", *(METHODS[method].title for method in methods)], rows)


def recoveries(record: Record) -> list[float]:
    """Steps to recover from each fault of a run; a run that is lost has recovered from none."""
    lost = not record["survived"]
    return [math.inf if lost or steps is None else steps for steps in record["recovery"]]


def _steps(steps: float) -> str:
    return "–" if math.isinf(steps) else f"{steps:g}"


def _percent(share: float) -> str:
    return f"{100 * (share - 1):+.1f} %".replace("-", "−")


def _markdown(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
