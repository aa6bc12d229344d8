"""Tokens a second: our loop against a bare one, and against torch, in turns.

Run ``python -m benchmarks.speed.throughput``. Two comparisons, each on one model and
the same batches:

- the loop of `train.run` (guard, checkpoints, log, progress) against a plain loop of ``jax.jit``
  without any of it, and against a plain loop whose optimizer is guarded, in one process;
- LoRA on a model in Hugging Face's format, in our loop, in a plain loop of ``jax.jit``, and in
  `transformers` with `peft` (dependency group ``parity``; left out where they are not installed),
  in a process each (`benchmarks.speed.peft_loop`).

All are compiled and warmed up first, then run in turns, a stretch of steps each; reported are
medians, and median and middle half of the paired ratio.
"""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax
from flax import nnx

from benchmarks.speed import peft_loop
from benchmarks.speed.loops import SIZES, Shape, decoder, measured, options_of, ours, plain
from lbw_optax import lbw_guard
from lbw_optax.law.control import LAW
from train.provenance import provenance


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one sentence a comparison, and write the result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--batch", type=int, help="sequences a step; default: by size")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=25, help="steps a turn")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    options = parser.parse_args(arguments)
    # Before JAX starts: the processes of the second comparison share one GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shape = SIZES[options.size]
    shape = shape._replace(batch_size=options.batch or shape.batch_size)
    result = {**provenance(), "law": LAW, **vars(options) | {"out": None}}
    result["tokens"] = shape.batch_size * shape.length
    result["malloc"] = os.environ.get("GLIBC_TUNABLES")
    for part in options.parts:
        result[part] = PARTS[part](shape, options.rounds, options.steps)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # the next may need too much
        print(describe(part, result[part], result["device"]))


def compare_loops(shape: Shape, rounds: int, steps: int) -> dict[str, Any]:
    """All parameters trained: a bare loop, a guarded bare loop, and ours."""
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(tempfile.TemporaryDirectory())
        options = options_of(shape, Path(place), steps * (rounds + 1))
        model, bare = decoder(shape, options), optax.adamw(1e-4)
        stretches = {
            "plain": plain(model, nnx.Param, options, bare, steps),
            "plain, guarded": plain(model, nnx.Param, options, lbw_guard(bare), steps),
            "ours": ours(model, nnx.Param, options, steps, opened),
        }
        return measured(stretches, shape, steps, rounds, trains_all=True)


PARTS = {"loop": compare_loops, "torch": peft_loop.compare}


def describe(name: str, result: dict[str, Any] | None, device: str) -> str:
    """One line: tokens a second of each, and ours over the others."""
    if result is None:
        return f"{name}: left out, for torch, transformers and peft are not installed"
    rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in result["tokens_per_second"].items())
    ratios = ", ".join(
        f"{_percent(middle)} against {who} ({_percent(low)} to {_percent(high)})"
        for who, (low, middle, high) in result["ours_over"].items()
    )
    return f"{name}, {device}: {rates} tokens/s; ours {ratios}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


if __name__ == "__main__":
    main()
