"""What the guard and the scripts cost: overhead, compilation, rollback, throughput."""

import json
from typing import Any

from benchmarks.markdown import table
from benchmarks.records import FOLDER, law_named
from train.provenance import made_at

_PARTS = {"loop": "all parameters", "torch": "LoRA"}
_AGAINST = {
    "plain": "a bare jitted loop",
    "plain, guarded": "the same, guarded",
    "torch": "torch, transformers and peft",
    "torch, memory kept": "the same, its memory kept by `train.memory` as ours is",
}


def overhead() -> str:
    """A row for each measured number of tokens a step."""
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("overhead*.json"))]
    rows = []
    for result in sorted(results, key=lambda result: result["tokens"]):
        row = [f"{result['tokens']}", f"{result['bare_seconds']:.2f} s"]
        for prefix in ("", "everything_"):
            if f"{prefix}time_overhead" not in result:  # measured before there was so much
                row += ["–", "–"]
                continue
            spread = result[f"{prefix}time_overhead_quartiles"]
            row.append(_change(result[f"{prefix}time_overhead"], *spread))
            row.append(f"{100 * result[f'{prefix}bytes_overhead']:+.2f} %")
        rows.append(row)
    head = ["tokens a step", "a step of AdamW", "with the guard (middle half)", "optimizer bytes"]
    head += ["with everything on", "optimizer bytes"]
    note = (
        f"A decoder of {results[0]['parameters'] / 1e6:.0f} M parameters, paired steps "
        f"(`python -m benchmarks.speed.overhead`, {made_at(results)}{law_named(results)})."
    )
    return f"{table(head, rows)}\n\n{note}"


def rollback_cost() -> str:
    """One sentence: both tiers of `RollbackManager`, above the guard."""
    result = json.loads((FOLDER / "rollback_overhead.json").read_text())
    memory, both = (
        _change(result[f"{name}_overhead"], *result[f"{name}_overhead_quartiles"])
        for name in ("memory", "both")
    )
    return (
        "`RollbackManager` with a copy every 7 steps and a checkpoint every 25, on a step of "
        f"{result['bare_seconds']:.1f} s of the same decoder: {memory} for copies in memory "
        f"({result['memory_bytes'] / 1e9:.1f} GB of host memory), {both} with checkpoints on disk "
        "too; in brackets the middle "
        f"half (`python -m benchmarks.speed.rollback`, {made_at([result])}{law_named([result])})."
    )


def _change(middle: float, low: float, high: float) -> str:
    """A share, and its middle half.

    >>> _change(0.025, 0.016, 0.055)
    '+2.5 % (+1.6 to +5.5 %)'
    """
    return f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f} %)"


def cost() -> str:
    """By XLA's own analysis: a row an optimizer, compile times by the number of leaves."""
    result = json.loads((FOLDER / "cost.json").read_text())
    found = {(row["optimizer"], row["leaves"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for name, _ in found))
    sizes = sorted({leaves for _, leaves in found})
    rows = []
    for name in names:
        few, many = found[name, sizes[0]], found[name, sizes[1]]
        a_leaf = (many["instructions"] - few["instructions"]) / (sizes[1] - sizes[0])
        rows.append(
            [
                name,
                f"{many['passes']:.1f}",
                f"{many['temporaries']:.2f}",
                f"{a_leaf:.0f}",
                *(_compile_time(found, name, leaves) for leaves in sizes),
            ]
        )
    head = ["", "passes", "temporaries", "instructions a leaf"]
    head += [f"compile, {leaves} leaves" for leaves in sizes]
    note = (
        f"Passes and temporaries in units of the parameters, at {sizes[1]} leaves; compile in "
        "seconds of the processor, and over AdamW's. A guard that observes is the same program as "
        f"one that governs (`python -m benchmarks.speed.cost`, {made_at([result])}"
        f"{law_named([result])})."
    )
    return f"{table(head, rows)}\n\n{note}"


def _compile_time(found: dict[tuple[str, int], dict[str, Any]], name: str, leaves: int) -> str:
    if (name, leaves) not in found:
        return "–"
    seconds, base = (found[x, leaves]["compile_seconds"] for x in (name, "AdamW"))
    return f"{seconds:.1f} s" + f" ({seconds / base:.1f} ×)" * (name != "AdamW")


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
    return table(["", "tokens a step", *machines], rows)


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
    results = [result for _, _, result in compared]
    where = f"{made_at(results)}{law_named(results)}"
    return f"{table(head, rows)}\n\nIn turns (`python -m benchmarks.speed.throughput`, {where})."


def _compared() -> list[tuple[str, str, dict[str, Any]]]:
    """Every comparison that was measured: which part, with what, and the result that holds it."""
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("throughput*.json"))]
    results.sort(key=lambda result: result["tokens"])
    return [
        (part, other, result)
        for part in _PARTS
        for result in results
        for other in result.get(part, {}).get("ours_over", {})
    ]


def _processor(result: dict[str, Any]) -> str:
    return result["machine"].split(",")[0]
