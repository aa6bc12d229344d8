"""What the guard costs: guarded against bare AdamW on one decoder, paired in one process.

Run ``python -m benchmarks.speed.overhead``. A guard at its defaults, and one with all that it can
be given: groups that it may freeze, the activations of every layer, a signal, a constraint and a
policy. All steps are compiled first and then timed in turns, A B C C B A, each to
`block_until_ready`; reported are the medians, the spread (the middle half) of the paired ratio, and
the bytes of the optimizer state.
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

from lbw_optax import by_layer, lbw_guard
from lbw_optax.law.control import LAW
from train.loop import with_activations
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
    parser.add_argument("--pairs", type=int, default=6, help="timed steps of each")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    options = parser.parse_args()
    result = measure(options.pairs, options.batch, options.length)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step"
    print(f"{size}, {result['device']}: {result['bare_seconds']:.3f} s bare")
    for name, how in (("", "guarded"), ("everything_", "with everything on")):
        low, high = result[f"{name}time_overhead_quartiles"]
        print(
            f"{100 * result[f'{name}time_overhead']:+.2f} % {how} (middle half {100 * low:+.2f} to "
            f"{100 * high:+.2f} %), {100 * result[f'{name}bytes_overhead']:+.2f} % optimizer bytes"
        )


def measure(pairs: int, batch: int, length: int) -> dict[str, Any]:
    """Times in seconds, overheads as fractions of the bare step."""
    graph, params, frozen = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(batch, length + 1))
    plain, watched = next_token_loss(graph), next_token_loss(graph, watched=True)
    kinds = {"bare": (optax.adamw(1e-3), plain), "guarded": (lbw_guard(optax.adamw(1e-3)), plain)}
    kinds["everything"] = (_everything(optax.adamw(1e-3)), watched)
    steps = [_runner(loss, tx, params, frozen, np.int32(tokens)) for tx, loss in kinds.values()]
    seconds = dict(zip(kinds, zip(*_in_turns(steps, pairs), strict=True), strict=True))
    bare, *others = (np.array(x) for x in seconds.values())
    sizes = {name: _bytes(tx.init(params)) for name, (tx, _) in kinds.items()}
    result = {
        **provenance(),
        "law": LAW,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens": batch * length,
        "pairs": pairs,
        **{f"{name}_seconds": statistics.median(times) for name, times in seconds.items()},
        **{f"bytes_{name}": size for name, size in sizes.items()},
    }
    for prefix, name, times in zip(("", "everything_"), list(kinds)[1:], others, strict=True):
        ratios = times / bare - 1
        quartiles = [float(q) for q in np.quantile(ratios, [0.25, 0.75])]
        result[f"{prefix}time_overhead"] = float(np.median(ratios))
        result[f"{prefix}time_overhead_quartiles"] = quartiles
        result[f"{prefix}bytes_overhead"] = sizes[name] / sizes["bare"] - 1
    return result


def _everything(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return lbw_guard(
        inner,
        groups=by_layer,
        signals={"excess": lambda step: step.loss - 1.0},
        constraints={"loss_below_100": lambda step: step.loss < 100},
        policy=lambda risk, kinds, bounds: 1.0 - 0.5 * risk,
    )


def _runner(loss_fn: Any, tx: Any, params: Any, frozen: Any, tokens: Any) -> Any:
    """A function that takes one step and returns its seconds; compiled and warmed up."""
    tx = optax.with_extra_args_support(tx)

    gradient = jax.value_and_grad(with_activations(loss_fn), has_aux=True)

    def step(params: Any, state: Any) -> Any:
        (loss, activations), grads = gradient(params, frozen, tokens)
        given = {} if activations is None else {"activations": activations}
        updates, state = tx.update(grads, state, params, value=loss, **given)
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


def _in_turns(steps: list[Any], rounds: int) -> list[list[float]]:
    """The seconds of each step in every round; the order turns with every round."""
    times = []
    for i in range(rounds):
        order = list(enumerate(steps))[:: -1 if i % 2 else 1]
        found = {number: step() for number, step in order}
        times.append([found[number] for number in range(len(steps))])
    return times


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
