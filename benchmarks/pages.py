"""Write the measured parts of the pages from the result files: ``python -m benchmarks.pages``.

A part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; what is there is replaced. With
``--check`` nothing is written, and the exit code is 1 if the page is not what the files say.
"""

import argparse
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import generality as generality_run
from benchmarks.faults import tables as faults_tables
from benchmarks.records import one_law, read
from benchmarks.stress import grid as stress_grid
from benchmarks.stress import run as stress_run
from benchmarks.stress import tables as stress_tables
from train import jsonl
from train.provenance import made_at

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the pages up to date; returns the exit code."""
    parser = argparse.ArgumentParser(description="The measured parts of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    options = parser.parse_args(arguments)
    stale = [page for page in PAGES if not _bring_up_to_date(ROOT / page, write=not options.check)]
    if options.check and stale:
        print(f"{', '.join(stale)}: not what the result files say; run python -m benchmarks.pages")
    return int(options.check and bool(stale))


def _bring_up_to_date(path: Path, *, write: bool) -> bool:
    """Whether the page was what its result files say."""
    old = path.read_text(encoding="utf-8")
    new = fill(old, {name: part() for name, part in PAGES[str(path.relative_to(ROOT))].items()})
    if write:
        path.write_text(new, encoding="utf-8")
    return old == new


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with each named part replaced; a name that the page lacks raises `ValueError`."""
    for name, text in parts.items():
        found = re.search(rf"(<!-- {name} -->\n)(.*?)<!-- /{name} -->", page, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no part <!-- {name} --> ... <!-- /{name} -->")
        start, end = found.span(2)
        page = page[:start] + text + "\n" + page[end:]
    return page


def demo() -> str:
    """The demo's table."""
    result = json.loads((RESULTS / "demo.json").read_text())
    titles = {"scratch": "from scratch, warm-up + cosine", "lora": "LoRA"}
    cells = {(r["task"], r["multiple_of_tuned"], r["method"]): r for r in result["runs"]}
    rows = []
    for task, title in titles.items():
        for multiple in (1, 10, 100):
            adamw, guard = (cells[task, multiple, method] for method in ("adamw", "guard"))
            rate = f"{adamw['learning_rate']:g}" + (" (tuned)" if multiple == 1 else "")
            rows.append([title, rate, _perplexity(adamw), _perplexity(guard)])
    rows += [_mishap(run) for run in result["runs"] if run["task"] == "mishap"]
    table = _table(["", "learning rate", "AdamW", "guarded AdamW"], rows)
    return (
        f"{table}\n\nTest perplexity, and its ratio to AdamW at its tuned rate. "
        f"`make demo` at {made_at([result])}; {result['seconds']:.0f} s."
    )


def _mishap(run: dict[str, Any]) -> list[str]:
    back = ", ".join(f"step {r['from_step']} to {r['to_step']}" for r in run["rollbacks"])
    bad = sum(loss is None for loss in run["history"]["loss"])
    title = f"LoRA, {bad} batches whose loss is NaN, rollback (from {back})"
    return [title, f"{run['learning_rate']:g}", "–", _perplexity(run)]


def overhead() -> str:
    """A row for each measured number of tokens a step."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("overhead*.json"))]
    rows = []
    for result in sorted(results, key=lambda result: result["tokens"]):
        rows.append(
            [
                f"{result['tokens']}",
                f"{result['bare_seconds']:.2f} s",
                _change(result["time_overhead"], *result["time_overhead_quartiles"]),
                f"{100 * result['bytes_overhead']:+.2f} %",
            ]
        )
    head = ["tokens a step", "a step of AdamW", "with the guard (middle half)", "optimizer bytes"]
    note = (
        f"A decoder of {results[0]['parameters'] / 1e6:.0f} M parameters, paired steps "
        f"(`python -m benchmarks.speed.overhead`, {made_at(results)})."
    )
    return f"{_table(head, rows)}\n\n{note}"


def rollback_cost() -> str:
    """One sentence: both tiers of `RollbackManager`, above the guard."""
    result = json.loads((RESULTS / "rollback_overhead.json").read_text())
    memory, both = (
        _change(result[f"{name}_overhead"], *result[f"{name}_overhead_quartiles"])
        for name in ("memory", "both")
    )
    return (
        f"`RollbackManager` at its default cadence, on a step of {result['bare_seconds']:.1f} s of "
        f"the same decoder: {memory} for copies in memory ({result['memory_bytes'] / 1e9:.1f} GB "
        f"of host memory), {both} with checkpoints on disk too; in brackets the middle "
        f"half (`python -m benchmarks.speed.rollback`, {made_at([result])})."
    )


def _change(middle: float, low: float, high: float) -> str:
    """A share, and its middle half.

    >>> _change(0.025, 0.016, 0.055)
    '+2.5 % (+1.6 to +5.5 %)'
    """
    return f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f} %)"


def throughput_short() -> str:
    """How much faster the scripts' loop is: a row a rival and size, a column a machine."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for part, other, result in _compared():
        if other in ("plain", "torch"):
            title = f"{_PARTS[part]}, against {_AGAINST[other]}"
            row = found.setdefault((title, str(result["tokens"])), {})
            middle = result[part]["ours_over"][other][1] - 1
            row.setdefault(_processor(result), []).append(f"{100 * middle:+.1f} %")
    machines = sorted({name for row in found.values() for name in row})
    rows = [
        [title, tokens, *(", ".join(row.get(machine, ["–"])) for machine in machines)]
        for (title, tokens), row in found.items()
    ]
    return _table(["", "tokens a step", *machines], rows)


def throughput() -> str:
    """Tokens a second of the scripts' loop, against a bare one and against torch: every run."""
    compared = _compared()
    rows = [
        [
            f"{_PARTS[part]}, against {_AGAINST[other]}",
            f"{result['tokens']}",
            f"{_processor(result)}, {result['commit'][:7]}",
            f"{result[part]['tokens_per_second'][other]:,.0f}",
            f"{result[part]['tokens_per_second']['ours']:,.0f}",
            _change(middle - 1, low - 1, high - 1),
        ]
        for part, other, result in compared
        for low, middle, high in [result[part]["ours_over"][other]]
    ]
    head = [
        "",
        "tokens a step",
        "machine, commit",
        "its tokens/s",
        "ours",
        "ours over it (middle half)",
    ]
    where = made_at([result for _, _, result in compared])
    return f"{_table(head, rows)}\n\nIn turns (`python -m benchmarks.speed.throughput`, {where})."


def _compared() -> list[tuple[str, str, dict[str, Any]]]:
    """Every comparison that was measured: which part, with what, and the result that holds it."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("throughput*.json"))]
    results.sort(key=lambda result: result["tokens"])
    return [
        (part, other, result)
        for part in _PARTS
        for result in results
        for other in result.get(part, {}).get("ours_over", {})
    ]


def _processor(result: dict[str, Any]) -> str:
    return result["machine"].split(",")[0]


_PARTS = {"loop": "all parameters", "torch": "LoRA"}
_AGAINST = {
    "plain": "a bare jitted loop",
    "plain, guarded": "the same, guarded",
    "torch": "torch, transformers and peft",
    "torch, memory kept": "the same, its memory kept by `train.memory` as ours is",
}


def placements() -> str:
    """What each placement does, in LoRA far above the tuned rate and on one NaN gradient."""
    result = json.loads((RESULTS / "placements.json").read_text())
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
    note = f"LoRA, valid perplexity (`python -m benchmarks.placements`, {made_at([result])})."
    return f"{_table(head, rows)}\n\n{note}"


def sensitivity() -> str:
    """Each knob over decades: perplexity at the tuned rate and far above it."""
    records = one_law(read(RESULTS / "sensitivity.jsonl"))
    columns = [("lora", 1), ("lora", 100), ("recipe", 1), ("recipe", 30)]
    rows = []
    for knob, value in dict.fromkeys((r["knob"], r["value"]) for r in records):
        found = {(r["regime"], r["multiple"]): r for r in records if _is(r, knob, value)}
        cells = [
            f"{found[c]['perplexity']:.2f}" + (" (exhausted)" if found[c]["exhausted"] else "")
            for c in columns
        ]
        rows.append([f"`{knob}={value:g}`", *cells])
    head = ["", "LoRA ×1", "LoRA ×100", "from scratch ×1", "from scratch ×30"]
    note = f"Valid perplexity (`python -m benchmarks.sensitivity`, {made_at(records)})."
    return f"{_table(head, rows)}\n\n{note}"


def stress() -> str:
    """The short table of the stress benchmark."""
    grid = stress_grid.load(read(stress_run.RESULTS), "test")
    note = (
        "Final test perplexity over that of AdamW at its tuned rate, in each regime at that rate, "
        "10 and 30 times it, median over seeds; **bold** is the best of a column. All methods, all "
        "rates, targets and every cell that a peer wins: [STRESS.md](benchmarks/STRESS.md)."
    )
    return f"{stress_tables.short_table(grid)}\n\n{note}"


def more_seeds() -> str:
    """Warm-up + cosine at the tuned rate, over more seeds: two laws over AdamW."""
    records = read(RESULTS / "stress_more_seeds.jsonl")
    bare = {r["seed"]: r["perplexity"]["test"] for r in records if r["method"] == "adamw"}
    said = []
    for law, title in _LAWS.items():
        guarded = {r["seed"]: r["perplexity"]["test"] for r in records if r["law"] == law}
        logs = [math.log(perplexity / bare[seed]) for seed, perplexity in guarded.items()]
        ratio = math.exp(statistics.mean(logs))
        error = ratio * statistics.stdev(logs) / math.sqrt(len(logs))
        said.append(f"{title} {ratio:.3f} ± {error:.3f} ({len(logs)} seeds)")
    return (
        "Warm-up + cosine at the tuned rate, test perplexity over AdamW's, geometric mean of the "
        f"paired ratios ± its standard error: {'; '.join(said)} "
        f"(`results/stress_more_seeds.jsonl`, {made_at(records)})."
    )


_LAWS = {
    "G": "law G",
    "G, steps trusted to 2.5 kappa": "law G with steps trusted to 2.5 κ (attempt 19)",
}


def generality() -> str:
    """Other models and other inner optimizers: loss, bare and guarded, at both rates."""
    records = one_law(read(RESULTS / "generality.jsonl"))
    head = ["model", "inner", "tuned rate", "bare ×1", "guarded ×1", "bare ×30", "guarded ×30"]
    parts = []
    for schedule in dict.fromkeys(r["schedule"] for r in records):
        runs = [r for r in records if r["schedule"] == schedule]
        pairs = dict.fromkeys((r["task"], r["inner"]) for r in runs)
        rows = [_generality_row(runs, task, inner) for task, inner in pairs]
        parts.append(f"**{schedule.capitalize()}**\n\n{_table(head, rows)}")
    where = made_at(records)
    note = f"Held-out loss, median of three seeds (`python -m benchmarks.generality`, {where})."
    return "\n\n".join([*parts, note])


def _generality_row(records: list[dict[str, Any]], task: str, inner: str) -> list[str]:
    runs = [r for r in records if (r["task"], r["inner"]) == (task, inner)]
    tuned = min(r["lr"] for r in runs if r["guarded"])
    cells = [
        _median([r["loss"] for r in runs if _is_cell(r, guarded, tuned * multiple)])
        for multiple in (1, 30)
        for guarded in (False, True)
    ]
    return [task, inner, f"{tuned:g}", *cells]


def _is_cell(record: dict[str, Any], guarded: bool, lr: float) -> bool:
    reported = record["seed"] in generality_run.SEEDS
    return reported and record["guarded"] == guarded and math.isclose(record["lr"], lr)


def _median(losses: list[float | None]) -> str:
    middle = statistics.median(math.inf if loss is None else loss for loss in losses)
    return "diverged" if math.isinf(middle) else f"{middle:.3f}"


def attempts(model: str) -> str:
    """Every law that was tried on a model so described: geometric mean over seeds."""
    tried = [t for t in jsonl.read(RESULTS / "law_attempts.jsonl") if t["model"].startswith(model)]
    cells: dict[str, dict[tuple[str, float], list[float]]] = {}
    for attempt in tried:
        found = cells.setdefault(attempt["law"], {})
        for regime, rate, _, perplexity, *_ in attempt["runs"]:
            found.setdefault((regime, rate), []).append(perplexity)
    parts = []
    for regime, title in {
        "lora": "LoRA",
        "full": "Full fine-tuning",
        "scratch": "From scratch, constant rate, no warm-up",
        "recipe": "From scratch, warm-up + cosine, b2 0.95",
    }.items():
        rates = sorted({key[1] for law in cells.values() for key in law if key[0] == regime})
        if not rates:
            continue
        rows = [
            [law, *(_mean(of_law.get((regime, rate))) for rate in rates)]
            for law, of_law in cells.items()
            if any(key[0] == regime for key in of_law)
        ]
        parts.append(f"**{title}**\n\n" + _table(["", *(f"{rate:g}" for rate in rates)], rows))
    return "\n\n".join(parts)


def _mean(values: list[float] | None) -> str:
    if not values:
        return "–"
    seeds = f" ({len(values)})" if len(values) > 1 else ""
    return f"{math.exp(math.fsum(map(math.log, values)) / len(values)):.2f}{seeds}"


def signals() -> str:
    """Each candidate signal of bare AdamW, median over seeds, and whether one threshold does."""
    records = read(RESULTS / "signals.jsonl")
    titles = {
        "relative_step": "relative step, in κ",
        "median_leaf": "the same, median leaf",
        "largest_leaf": "the same, largest leaf",
        "overshoot": "overshoot, standard errors",
        "secant": "secant curvature",
        "norm_growth": "growth of the norm, 10⁻⁴ a step",
    }
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in records:
        runs.setdefault((r["regime"], r["multiple"]), []).append(r)
    medians = {
        column: [statistics.median(r[name] for r in found) for name in titles]
        for column, found in runs.items()
    }
    rows = [
        [f"{regime} ×{multiple}", *(f"{x:.2f}" for x in values)]
        for (regime, multiple), values in medians.items()
    ]

    def at(multiple: int) -> Iterable[tuple[float, ...]]:
        """A signal's medians in all regimes, one signal after the other."""
        return zip(*(values for (_, k), values in medians.items() if k == multiple), strict=True)

    rows.append(["**largest at ×1**", *(f"**{max(values):.2f}**" for values in at(1))])
    rows.append(["**smallest at ×10**", *(f"**{min(values):.2f}**" for values in at(10))])
    note = (
        "Bare AdamW, steps 20 to 79, median of three seeds "
        f"(`python -m benchmarks.signals`, {made_at(records)})."
    )
    return f"{_table(['', *titles.values()], rows)}\n\n{note}"


def faults() -> str:
    """What each method survives of the faults that are put into its runs."""
    records = read(RESULTS / "faults.jsonl")
    where = f"`python -m benchmarks.faults`, {made_at([records[-1]])}"
    return f"{faults_tables.summary(faults_tables.load(records))}\n\n({where}.)"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "demo": demo,
        "overhead": overhead,
        "rollback cost": rollback_cost,
        "throughput": throughput_short,
        "placements": placements,
        "stress": stress,
        "faults": faults,
    },
    "benchmarks/THROUGHPUT.md": {"throughput": throughput},
    "benchmarks/LAW.md": {
        "more seeds": more_seeds,
        "attempts": functools.partial(attempts, "hidden 64,"),
        "attempts at the benchmark's size": functools.partial(attempts, "hidden 96,"),
        "attempts over ten seeds": functools.partial(attempts, "seeds 10 to 19,"),
        "attempts on a base that knows the text": functools.partial(attempts, "known text,"),
        "generality": generality,
        "signals": signals,
        "sensitivity": sensitivity,
    },
}


def _is(record: dict[str, Any], knob: str, value: float) -> bool:
    return (record["knob"], record["value"]) == (knob, value)


def _perplexity(run: dict[str, Any]) -> str:
    return f"{run['perplexity']:.2f} ({run['ratio_to_tuned_adamw']:.2f} ×)"


def _moved(share: float | None) -> str:
    return "all weights NaN" if share is None else f"weights move by {100 * share:.2f} %"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
