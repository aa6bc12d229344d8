"""The page of the health benchmark from its result file, and the short table of the docs.

`python -m benchmarks.pages` writes both.
"""

import statistics
from collections.abc import Sequence

from benchmarks.faults.results import spans
from benchmarks.health.methods import BARE, METHODS, WARMED_UP
from benchmarks.health.results import Pair, Results, change, ended, load, skipped_share
from benchmarks.health.targets import missed, said, targets
from benchmarks.health.task import Task
from benchmarks.health.tasks import tasks
from benchmarks.markdown import numbers, table
from benchmarks.records import Record, made_with
from train.provenance import commits


def page(records: Sequence[Record]) -> str:
    """The whole page; without a record it says how to get some."""
    results = load(records)
    parts = ["# Health benchmark", _about()]
    if not results.methods():
        return "\n\n".join([*parts, NOT_RUN, "The tasks:", task_table()]) + "\n"
    parts += [_provenance(results), "## Targets", target_table(results), misses(results)]
    parts += ["## Every task", _BY_TASK, metric_table(results)]
    parts += ["## What the guard did", _DONE, deed_table(results)]
    parts += ["## The tasks", _TASKS, task_table()]
    return "\n\n".join(parts) + "\n"


def summary(records: Sequence[Record]) -> str:
    """For the documentation: the targets, and what was missed."""
    results = load(records)
    if not results.methods():
        return NOT_RUN
    return "\n\n".join([target_table(results), misses(results), _provenance(results)])


NOT_RUN = (
    "No law was measured yet, or none whose tasks are today's: `python -m benchmarks.health` runs "
    "them, and `python -m benchmarks.pages` writes what they say."
)
_BY_TASK = (
    "The bare metric is the mean over seeds. The change is how much worse the guarded run ends, "
    "over the bare one with the same seed and the same batches, mean over seeds ± its standard "
    "error: above 0 it is worse, whether a larger metric is better or a smaller. **bare, warmed "
    "up** is a bare run whose first ten updates grow to their full length, as warm-up has it: what "
    "that changes is no harm that only a guard does."
)
_DONE = (
    "Sums over seeds. A skipped step moves no parameter. A run that ends is one in which the guard "
    "is exhausted, or in which its rollback manager raises. The scale is the guard's last, the "
    "median over seeds; at 1.00 the learning rate is the task's own."
)
_TASKS = (
    "The optimizer is Adam, but for AdamW with GRPO, at a rate that is good for the bare run. "
    "Digits are −log₁₀ of an error that goes to zero."
)


def _about() -> str:
    return (
        f"{len(tasks())} small training runs that are sound as they are and look ill to a watcher: "
        "classes that come rarely, gradients with heavy tails, losses that rise because a target, "
        "a curriculum or a weight moves, losses in other units, parameters that begin at zero. "
        "Each is trained bare, bare with ten steps of warm-up, under the guard, and under "
        "the guard with a rollback manager at its defaults. Nothing is injected: **whatever the "
        "guard does here costs something and saves nothing.** A step of a GAN is one of each of "
        "its two optimizers. The final metric is the mean of ten, evenly over the last tenth of a "
        "run."
    )


def _provenance(results: Results) -> str:
    found = list(results.cells.values())
    hours = sum(r["seconds"] for r in found) / 3600
    laws = sorted({r["law"] for r in found} - {None})
    return (
        f"Law {', '.join(laws)}; {len(found)} runs, seeds {spans({r['seed'] for r in found})}, "
        f"{hours:.1f} hours of one core, at commit {commits(found)}, "
        f"{made_with(found, found[-1])}. Made by `python -m benchmarks.health` and "
        "`python -m benchmarks.pages`."
    )


def target_table(results: Results) -> str:
    rows = [
        [METHODS[method].title, t.title, t.must, t.measured, t.verdict]
        for method in results.methods()
        for t in targets(results, method)
    ]
    return table(["", "", "must", "measured", ""], rows)


def misses(results: Results) -> str:
    """Every task in which a target is missed, said in words."""
    lines = [
        f"- {METHODS[method].title}, {line}"
        for method in results.methods()
        for line in missed(results, method)
    ]
    return "\n".join(["Where a target is missed:\n", *(lines or ["- nowhere"])])


def metric_table(results: Results) -> str:
    methods = [WARMED_UP] * results.has(WARMED_UP) + results.methods()
    rows = []
    for name, task in tasks().items():
        bare = [r["metric"] for r in results.of(BARE, name)]
        known = [x for x in bare if x is not None]
        mean = f"{statistics.fmean(known):.4g}" if known else "–"
        changes = [_change(task, results.pairs(name, method)) for method in methods]
        rows.append([name, f"{task.unit}{' ↑' if task.higher else ''}", mean, *changes])
    head = ["", "metric (↑ more is better)", "bare"]
    return numbers([*head, *(METHODS[m].title for m in methods)], rows)


def _change(task: Task, pairs: list[Pair]) -> str:
    found = change(task, pairs)
    if found is None:
        return "–"
    return f"**{said(found)}**" if found.mean > task.allowed else said(found)


def deed_table(results: Results) -> str:
    methods = results.methods()
    rows = [
        [
            name,
            *(entry for m in methods for entry in _deeds([g for _, g in results.pairs(name, m)])),
        ]
        for name in tasks()
    ]
    what = ("skipped", "rollbacks", "ended", "scale")
    return numbers(["", *(f"{METHODS[m].title}: {w}" for m in methods for w in what)], rows)


def _deeds(runs: list[Record]) -> list[str]:
    if not runs:
        return ["–"] * 4
    back = [reason for r in runs for reason in r.get("rollbacks", ())]
    managed = any("rollbacks" in r for r in runs)
    steps = ", ".join(str(r["ended"]) for r in ended(runs))
    return [
        f"{100 * skipped_share(runs):.2f} %",
        f"{len(back)}" if managed else "",
        f"{len(ended(runs))} of {len(runs)}" + (f" (step {steps})" if steps else ""),
        f"{statistics.median(r['scale'] for r in runs):.2f}",
    ]


def task_table() -> str:
    rows = [[name, t.title, f"{t.steps}", f"{t.rate:g}"] for name, t in tasks().items()]
    return table(["", "", "steps", "rate"], rows)
