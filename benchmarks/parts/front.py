"""What the front pages show: demo, placements, and the short tables of stress and faults."""

import json
from typing import Any

from benchmarks.faults import tables as faults_tables
from benchmarks.faults.results import load as load_faults
from benchmarks.markdown import table
from benchmarks.records import FOLDER, law_named, one_law, read
from benchmarks.stress import grid as stress_grid
from benchmarks.stress import tables as stress_tables
from train.provenance import made_at


def demo() -> str:
    """The demo's table."""
    result = json.loads((FOLDER / "demo.json").read_text())
    titles = {"scratch": "from scratch, warm-up + cosine", "lora": "LoRA"}
    cells = {(r["task"], r["multiple_of_tuned"], r["method"]): r for r in result["runs"]}
    rows = []
    for task, title in titles.items():
        for multiple in (1, 10, 100):
            adamw, guard = (cells[task, multiple, method] for method in ("adamw", "guard"))
            rate = f"{adamw['learning_rate']:g}" + (" (tuned)" if multiple == 1 else "")
            rows.append([title, rate, _perplexity(adamw), _perplexity(guard)])
    rows += _mishaps([run for run in result["runs"] if run["task"] == "mishap"])
    shown = table(["", "learning rate", "AdamW", "guarded AdamW"], rows)
    return (
        f"{shown}\n\nTest perplexity, and its ratio to AdamW at its tuned rate. "
        f"`make demo` at {made_at([result])}{law_named([result])}; {result['seconds']:.0f} s."
    )


def _mishaps(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The guarded run through bad batches, and what became of AdamW on them where that was run."""
    adamw = "lost (NaN)" if any(run["method"] == "adamw" for run in runs) else "–"
    rows = []
    for run in runs:
        if run["method"] != "adamw":
            back = ", ".join(f"step {r['from_step']} to {r['to_step']}" for r in run["rollbacks"])
            bad = sum(loss is None for loss in run["history"]["loss"])
            title = f"LoRA, {bad} batches whose loss is NaN, rollback (from {back})"
            rows.append([title, f"{run['learning_rate']:g}", adamw, _perplexity(run)])
    return rows


def _perplexity(run: dict[str, Any]) -> str:
    return f"{run['perplexity']:.2f} ({run['ratio_to_tuned_adamw']:.2f} ×)"


def placements() -> str:
    """What each placement does, in LoRA far above the tuned rate and on one NaN gradient."""
    result = json.loads((FOLDER / "placements.json").read_text())
    rows = [
        [
            f"`{row['code']}`",
            f"{row['tuned']:.2f}",
            f"{row['hundredfold']:.2f}",
            "nothing moves" if row["moved_by_nan"] == 0 else _moved(row["moved_by_nan"]),
        ]
        for row in result["rows"]
    ]
    head = ["", "tuned rate", "100 × tuned", "one NaN gradient after 20 steps"]
    where = f"{made_at([result])}{law_named([result])}"
    note = f"LoRA, valid perplexity (`python -m benchmarks.placements`, {where})."
    return f"{table(head, rows)}\n\n{note}"


def _moved(share: float | None) -> str:
    return "all weights NaN" if share is None else f"weights move by {100 * share:.2f} %"


def stress() -> str:
    """The short table of the stress benchmark."""
    grid = stress_grid.load(read(FOLDER / "stress.jsonl"), "test")
    note = (
        "Final test perplexity over that of AdamW at its tuned rate, in each regime at that rate, "
        "10 and 30 times it, median over seeds; **bold** is the best of a column. All methods, all "
        "rates, targets and every cell that a peer wins: [STRESS.md](benchmarks/STRESS.md)."
    )
    return f"{stress_tables.short_table(grid)}\n\n{note}"


def faults() -> str:
    """What each method survives of the faults that are put into its runs."""
    records = read(FOLDER / "faults.jsonl")
    where = f"`python -m benchmarks.faults`, {made_at([records[-1]])}{law_named(one_law(records))}"
    return f"{faults_tables.summary(load_faults(records))}\n\n({where}.)"
