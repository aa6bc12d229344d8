"""The page of the atlas from the result file of `python -m benchmarks.atlas`.

    python -m benchmarks.atlas.tables          # writes benchmarks/ATLAS.md

What the ratio is stands in `benchmarks.atlas.grid`.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.atlas.draw import HALVES, Task, facts
from benchmarks.atlas.grid import Grid, Spread, load, ratio, runs_on, spread
from benchmarks.atlas.methods import METHODS, OWN
from benchmarks.atlas.run import RESULTS
from benchmarks.atlas.targets import ABOVE, targets
from benchmarks.markdown import numbers, table
from train.provenance import commits, machines

TITLES = {
    "choose": "The half that chose the law",
    "held-out": "The half that was held out, and looked at once",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atlas.tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file, JSON Lines")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "ATLAS.md")
    options = parser.parse_args(arguments)
    grid = load(records.read(options.results))
    if not grid.tuned:
        parser.exit(2, f"{options.results} holds no task: run python -m benchmarks.atlas first\n")
    options.out.write_text(report(grid), encoding="utf-8")
    print(f"wrote {options.out}")


def page(results: Path) -> str:
    """The whole page."""
    return report(load(records.read(results)))


def report(grid: Grid) -> str:
    parts = ["# Atlas", _ABOUT, _provenance(grid)]
    for half in HALVES:
        chosen = grid.tasks(half)
        if chosen:
            parts += [f"## {TITLES[half]}", target_table(grid, half)]
            parts += [_BY_METHOD, method_table(grid, chosen), _BY_TASK, ratio_table(grid, chosen)]
            parts += ["The tasks:", task_table(grid, chosen)]
    return "\n\n".join(parts) + "\n"


_ABOUT = (
    "48 training tasks drawn by seed, of which one half chose the law and the other was held out. "
    "A number is a **ratio**: the final validation loss against that of the task's own optimizer "
    "at its tuned rate, as a ratio of perplexities where the loss is a cross-entropy, and of the "
    "losses where it is a squared error (diffusion, regression). 1.00 is where the tuned run ends; "
    "×3 is three times its rate.\n\n"
    "Small tasks are small: a run is a few seconds of one core, so where a model is wide or deep "
    "its batches are small and its steps few, and none is what one would train for its own sake. "
    "They are many and different, which is what they are for."
)
_BY_METHOD = (
    "Ratios by method over all tasks of this half. A method that takes no rate stands in every "
    "column with its one run a task. The clip is the own optimizer itself where the task has it. "
    "Methods that are an Adam with a rate run on tasks of AdamW only."
)
_BY_TASK = "The guard and the own optimizer, task by task:"


def _provenance(grid: Grid) -> str:
    found = list(grid.cells.values())
    newest = max(found, key=lambda record: len(record["versions"]))
    seeds = ", ".join(str(seed) for seed in sorted({key[3] for key in grid.cells}))
    versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
    text = next((record["data"] for record in found if "data" in record), "none")
    return (
        f"Text: {text}. {len(found)} cells with seeds {seeds}, {_hours(found):.1f} hours of one "
        f"core, at commit {commits(found)}; {versions}; {machines(found)}. "
        "Made by `python -m benchmarks.atlas` and `python -m benchmarks.atlas.tables`."
    )


def _hours(found: Sequence[records.Record]) -> float:
    return sum(record["seconds"] for record in found) / 3600


def target_table(grid: Grid, half: str) -> str:
    rows = [
        [t.title, f"≤ {t.must:g}", f"≤ {t.aim:g}", number(t.measured), t.verdict]
        for t in targets(grid, half)
    ]
    return numbers(["guard ÷ own optimizer at its tuned rate", "must", "aim", "measured", ""], rows)


def method_table(grid: Grid, chosen: Sequence[Task]) -> str:
    rows = []
    for name, method in METHODS.items():
        columns = [spread(grid, chosen, name, multiples) for multiples in ([1], ABOVE)]
        on = sum(runs_on(name, task) for task in chosen)
        rows.append([method.title, f"{on}", *(x for column in columns for x in _three(column))])
    head = [f"{at}, {what}" for at in ("×1", "×3 …") for what in ("median", "95 %", "worst")]
    return numbers(["", "tasks", *head], rows)


def _three(found: Spread | None) -> list[str]:
    return ["–"] * 3 if found is None else [number(x) for x in found[:3]]


def ratio_table(grid: Grid, chosen: Sequence[Task]) -> str:
    multiples = sorted({k for task in chosen for k in task.multiples})
    rows = [
        [task.name, *(number(ratio(grid, task, m, k)) for m in ("guard", OWN) for k in multiples)]
        for task in chosen
    ]
    head = [f"{METHODS[m].title} ×{k}" for m in ("guard", OWN) for k in multiples]
    return numbers(["", *head], rows)


def task_table(grid: Grid, chosen: Sequence[Task]) -> str:
    head = ["task", "model", "width × depth", "batch × length", "steps", "optimizer", "schedule"]
    head += ["init, layout, precision", "start", "tuned rate", "loss there, before"]
    rows = [[*facts(task), f"{grid.tuned[task.name]:g}", _losses(grid, task)] for task in chosen]
    return table(head, rows)


def _losses(grid: Grid, task: Task) -> str:
    found = grid.losses(task, OWN, 1)
    before = [r["before"] for key, r in grid.cells.items() if key[:3] == (task.name, OWN, 1)]
    if not found:
        return "–"
    return f"{statistics.median(found.values()):.4g}, {statistics.median(before):.4g}"


def number(value: float | None) -> str:
    """Three decimals where they say something."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "diverged"
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


if __name__ == "__main__":
    main()
