"""What the research log shows: attempts at the law, more seeds, other models, knobs."""

import math
import statistics
from typing import Any

from benchmarks import generality as generality_run
from benchmarks.markdown import table
from benchmarks.records import FOLDER, one_law, read
from train import jsonl
from train.provenance import made_at


def attempts(model: str) -> str:
    """Every law that was tried on a model so described: geometric mean over seeds."""
    tried = [t for t in jsonl.read(FOLDER / "law_attempts.jsonl") if t["model"].startswith(model)]
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
        parts.append(f"**{title}**\n\n" + table(["", *(f"{rate:g}" for rate in rates)], rows))
    return "\n\n".join(parts)


def _mean(values: list[float] | None) -> str:
    if not values:
        return "–"
    seeds = f" ({len(values)})" if len(values) > 1 else ""
    return f"{math.exp(math.fsum(map(math.log, values)) / len(values)):.2f}{seeds}"


def more_seeds() -> str:
    """Warm-up + cosine at the tuned rate, over more seeds: two laws over AdamW."""
    records = read(FOLDER / "stress_more_seeds.jsonl")
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
    records = one_law(read(FOLDER / "generality.jsonl"))
    head = ["model", "inner", "tuned rate", "bare ×1", "guarded ×1", "bare ×30", "guarded ×30"]
    parts = []
    for schedule in dict.fromkeys(r["schedule"] for r in records):
        runs = [r for r in records if r["schedule"] == schedule]
        pairs = dict.fromkeys((r["task"], r["inner"]) for r in runs)
        rows = [_generality_row(runs, task, inner) for task, inner in pairs]
        parts.append(f"**{schedule.capitalize()}**\n\n{table(head, rows)}")
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


def sensitivity() -> str:
    """Each knob over decades: perplexity at the tuned rate and far above it."""
    records = one_law(read(FOLDER / "sensitivity.jsonl"))
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
    return f"{table(head, rows)}\n\n{note}"


def _is(record: dict[str, Any], knob: str, value: float) -> bool:
    return (record["knob"], record["value"]) == (knob, value)
