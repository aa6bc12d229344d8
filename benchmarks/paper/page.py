"""The paper's table beside ours, from the result files: ``python -m benchmarks.paper.page``.

Writes ``benchmarks/PAPER.md``; with ``--check`` it only compares.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from benchmarks import markdown
from benchmarks.paper import rows as paper_rows
from benchmarks.paper.rows import CASES, LARGE_RATES, METHODS, Case
from benchmarks.records import law_named
from train import estimate, jsonl, lora, qwen_lora, recipes, run, tinyllama_full
from train.model import Decoder, split
from train.options import Options
from train.presets import PRESETS
from train.provenance import made_at

PAGE = Path(__file__).resolve().parent.parent / "PAPER.md"
RESULTS = PAGE.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    options = parser.parse_args(arguments)
    text = page(jsonl.read(RESULTS / "paper_tiny.jsonl"))
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(records: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n\n".join([_INTRODUCTION, table(records), _notes(records), _LARGE, large()]) + "\n"


_INTRODUCTION = """# The paper's table

The rows of "Learn-by-Wire Guard" (arXiv 2605.19008: Qwen2.5-7B, LoRA, WikiText-103) beside small
models that are pre-trained and fine-tuned here in the same way. A ratio is to AdamW at the
reference rate. The paper's reference rate is not in what is public: it is taken as 1e-4, so that
its 1e-3 and 3e-3 are 10 and 30 times the reference; ours is the rate tuned for AdamW on the valid
split. What stands for 3B, 7B and 14B differs in width and depth (`benchmarks/paper/tiny.py`)."""

_LARGE = """## The real models

They need their weights, a network or a cache that holds them, and a GPU. Nothing here was run: no
such machine was at hand. Memory is from shapes (`train/estimate.py`), for one device; over
several it is divided (`--mesh`). `python -m benchmarks.paper --preset qwen2.5-7b` runs all rows,
`--rows NAME` some of them, `--list` prints the commands:"""


def table(records: Sequence[dict[str, Any]]) -> str:
    """Paper and measured side by side; what has not been run is a dash."""
    found = {(r["row"], r["method"]): r for r in records}
    rows = [
        [
            case.title,
            *(_paper(case, i) for i in range(2)),
            *(_ours(found, case, m) for m in METHODS),
        ]
        for case in CASES
    ]
    seconds = [_seconds(found.get(("reference", method))) for method in METHODS]
    rows.insert(1, ["its time", "392.54 s", "357.02 s", *seconds])
    return markdown.table(["", *(f"paper: {m}" for m in METHODS.values()), *METHODS.values()], rows)


def _paper(case: Case, method: int) -> str:
    perplexity = case.paper[method]
    reference = CASES[0].paper[0]
    if perplexity is None or reference is None:
        return "–"
    return f"{perplexity:.2f} ({perplexity / reference:.2f} ×)"


def _ours(found: dict[tuple[str, str], dict[str, Any]], case: Case, method: str) -> str:
    record = found.get((case.name, method))
    reference = found.get((_reference(case), "adamw"))
    if record is None:
        return "–"
    perplexity = record["perplexity"]["test"]
    if perplexity is None:
        return "stopped by the guard" if record["exit_code"] == 3 else "not finite"
    if reference is None or reference["perplexity"]["test"] is None:
        return f"{perplexity:.2f}"
    return f"{perplexity:.2f} ({perplexity / reference['perplexity']['test']:.2f} ×)"


def _reference(case: Case) -> str:
    """The row of the same model at the reference rate."""
    return next(other.name for other in CASES if other.size == case.size and other.multiple == 1)


def _seconds(record: dict[str, Any] | None) -> str:
    return "–" if record is None or "seconds" not in record else f"{record['seconds']:.0f} s"


def _notes(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return "Not run yet: `python -m benchmarks.paper --preset tiny`."
    known = [r for r in records if "commit" in r]
    newest = known[-1]
    rates = {kind: tuned(records, kind) for kind in ("lora", "full")}
    return (
        "Test perplexity over all tokens of the held-out text, in windows of "
        f"{newest.get('context')} tokens that begin every {newest.get('stride')}. Reference rates "
        f"here: {', '.join(f'{rate:g} ({kind})' for kind, rate in rates.items())}. Seconds are of "
        "the whole run with its compilation and evaluation; the AdamW runs are watched by a guard "
        "that does not act, so the two differ by what it does and not by what it costs. "
        f"`python -m benchmarks.paper --preset tiny` at {made_at(known)}{law_named(known)}."
    )


def tuned(records: Sequence[dict[str, Any]], kind: str) -> float:
    """The best of a grid on the valid split; NaN where it has not been run."""
    tried = [r for r in records if r["row"] == f"tune-{kind}"]
    ended = [r for r in tried if r["perplexity"]["valid"] is not None]
    best = min(ended, key=lambda r: r["perplexity"]["valid"], default={"rate": float("nan")})
    return float(best["rate"])


def large() -> str:
    """A command, its memory and the smallest single device for each large row with the guard."""
    rows = []
    for case in CASES:
        need = _need(case.size)
        command = paper_rows.command("qwen2.5-7b", case, "lbw", LARGE_RATES)
        rows.append([case.title, f"`{command}`", f"{need / 1e9:.0f} GB", _device(need)])
    return markdown.table(
        ["", "with the guard (AdamW: `--optimizer adamw`)", "memory", "device"], rows
    )


DEVICES = {"24 GB": 24e9, "48 GB (L40S)": 48e9, "80 GB (A100, H100)": 80e9, "141 GB (H200)": 141e9}
USABLE = 0.85
"""Share of a device's memory that a run may plan with."""


def _device(need: int) -> str:
    fits = [name for name, size in DEVICES.items() if need < USABLE * size]
    return fits[0] if fits else "several"


def _need(size: str) -> int:
    options: Options = (
        tinyllama_full.PRESETS["tinyllama-1.1b"]
        if size == "TinyLlama"
        else qwen_lora.PRESETS[f"qwen2.5-{size.lower()}"]
    )
    decoder = nnx.eval_shape(lambda: _build(options))
    trained = nnx.LoRAParam if isinstance(options, qwen_lora.LoraOptions) else nnx.Param
    _, params, frozen = split(decoder, trained)
    opt_state = jax.eval_shape(recipes.optimizer(options).init, params)
    return estimate.estimate(decoder.config, options, params, frozen, opt_state, "gpu").bytes


def _build(options: Options) -> Decoder:
    decoder = Decoder(PRESETS[options.model], rngs=nnx.Rngs(0), **run.kinds(options))
    if isinstance(options, qwen_lora.LoraOptions):
        lora.add_lora(decoder, rank=options.rank, alpha=options.alpha, rngs=nnx.Rngs(0))
    return decoder


if __name__ == "__main__":
    sys.exit(main())
