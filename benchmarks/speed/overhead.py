"""What the guard costs: guarded against bare AdamW on one decoder, paired in one process.

Run ``python -m benchmarks.speed.overhead``. Both steps are compiled first and then timed in turns,
A B B A, each to `block_until_ready`; reported are the medians, the spread (the middle half) of the
paired ratio, and the bytes of the optimizer state.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from lbw_optax import lbw_guard
from lbw_optax.law.control import LAW
from train.model import Config, Decoder, next_token_loss, split
from train.provenance import provenance

CONFIG = Config(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


def main() -> None:
    """Measure, print one sentence, and write the result file."""
    parser = argparse.ArgumentParser(description="Time and memory of the guard, above AdamW.")
    parser.add_argument("--pairs", type=int, default=6, help="timed pairs of steps")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    options = parser.parse_args()
    result = measure(options.pairs, options.batch, options.length)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step, "
        f"{result['device']}: {result['bare_seconds']:.3f} s bare, "
        f"{100 * result['time_overhead']:+.2f} % guarded (middle half "
        f"{100 * result['time_overhead_quartiles'][0]:+.2f} to "
        f"{100 * result['time_overhead_quartiles'][1]:+.2f} %), "
        f"{100 * result['bytes_overhead']:+.2f} % optimizer bytes."
    )


def measure(pairs: int, batch: int, length: int) -> dict[str, Any]:
    """Times in seconds, overheads as fractions of the bare step."""
    graph, params, frozen = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    loss_fn = next_token_loss(graph)
    tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(batch, length + 1))
    bare, guarded = (
        _runner(loss_fn, tx, params, frozen, np.int32(tokens))
        for tx in (optax.adamw(1e-3), lbw_guard(optax.adamw(1e-3)))
    )
    times = _paired(bare, guarded, pairs)
    ratios = np.array([b / a - 1 for a, b in times])
    bytes_bare, bytes_guarded = (
        _bytes(tx.init(params)) for tx in (optax.adamw(1e-3), lbw_guard(optax.adamw(1e-3)))
    )
    return {
        **provenance(),
        "law": LAW,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens": batch * length,
        "pairs": pairs,
        "bare_seconds": statistics.median(a for a, _ in times),
        "guarded_seconds": statistics.median(b for _, b in times),
        "time_overhead": float(np.median(ratios)),
        "time_overhead_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "bytes_bare": bytes_bare,
        "bytes_guarded": bytes_guarded,
        "bytes_overhead": bytes_guarded / bytes_bare - 1,
    }


def _runner(loss_fn: Any, tx: Any, params: Any, frozen: Any, tokens: Any) -> Any:
    """A function that takes one step and returns its seconds; compiled and warmed up."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, tokens)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carry = [jax.tree.map(lambda leaf: leaf.copy(), params), tx.init(params)]

    def timed() -> float:
        start = time.perf_counter()
        carry[:] = jax.block_until_ready(compiled(*carry))
        return time.perf_counter() - start

    for _ in range(3):
        timed()
    return timed


def _paired(bare: Any, guarded: Any, pairs: int) -> list[tuple[float, float]]:
    """Pairs of (bare, guarded) seconds; the order turns with every pair."""
    times = []
    for i in range(pairs):
        if i % 2:
            second = guarded()
            times.append((bare(), second))
        else:
            first = bare()
            times.append((first, guarded()))
    return times


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
