"""What rollback costs a healthy run: guarded AdamW with and without the manager, paired.

Run ``python -m benchmarks.speed.rollback``. One decoder, one process: windows of steps without
the manager, with copies in memory, and with checkpoints on disk too, in turns; each ends with
`block_until_ready`. There is a copy every 7 steps and a checkpoint every 25, far more often than by
default. A window is as long as three cadences in memory, about one on disk, so that it holds what a
run pays on average. Reported are the medians and the middle half of
the paired ratios, and the bytes held.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.speed.overhead import CONFIG
from lbw_optax import RollbackManager, lbw_guard
from lbw_optax.law.control import LAW
from train.model import Decoder, next_token_loss, split
from train.provenance import provenance

# Never in a run of this length.
NEVER = 10**6


def main() -> None:
    """Measure, print one sentence, and write the result file."""
    parser = argparse.ArgumentParser(description="Time and memory of rollback, above the guard.")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each kind")
    parser.add_argument("--window", type=int, default=22, help="steps a window")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    out = Path("benchmarks/results/rollback_overhead.json")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    result = measure(options.rounds, options.window, options.batch, options.length)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step of "
        f"{result['bare_seconds']:.3f} s on {result['device']}: memory tier "
        f"{100 * result['memory_overhead']:+.2f} %, both tiers "
        f"{100 * result['both_overhead']:+.2f} %, {result['memory_bytes'] / 1e6:.0f} MB held."
    )


def measure(rounds: int, window: int, batch: int, length: int) -> dict[str, Any]:
    """Times in seconds a step, overheads as fractions of the step without the manager."""
    step = _Training(batch, length)
    with tempfile.TemporaryDirectory() as folder:
        memory = RollbackManager(folder + "/memory", snapshot_every=7, save_every=NEVER)
        both = RollbackManager(folder + "/both", snapshot_every=7, save_every=25)
        managers = {"bare": None, "memory": memory, "both": both}
        runs = {name: _Run(step, manager) for name, manager in managers.items()}
        for run in runs.values():
            run.window(12)  # compiles, and takes the first copies
        times = [_in_turn(runs, window, turn) for turn in range(rounds)]
        held = both.memory_bytes
        for run in runs.values():
            run.close()
    return {
        **provenance(),
        "law": LAW,
        "parameters": step.parameters,
        "tokens": batch * length,
        "rounds": rounds,
        "window": window,
        "bare_seconds": statistics.median(t["bare"] for t in times),
        **_overhead("memory", times),
        **_overhead("both", times),
        "memory_bytes": held,
    }


def _overhead(name: str, times: list[dict[str, float]]) -> dict[str, Any]:
    ratios = np.array([t[name] / t["bare"] - 1 for t in times])
    return {
        f"{name}_seconds": statistics.median(t[name] for t in times),
        f"{name}_overhead": float(np.median(ratios)),
        f"{name}_overhead_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
    }


def _in_turn(runs: dict[str, "_Run"], window: int, turn: int) -> dict[str, float]:
    """Seconds a step of each; the order turns."""
    names = list(runs)[turn % 3 :] + list(runs)[: turn % 3]
    return {name: runs[name].window(window) for name in names}


class _Training:
    """The compiled training step and the state it starts from."""

    def __init__(self, batch: int, length: int):
        graph, self.params, frozen = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
        loss_fn, self.tx = next_token_loss(graph), lbw_guard(optax.adamw(1e-3))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(batch, length + 1))

        def update(params: Any, state: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(params, frozen, np.int32(tokens))
            updates, state = self.tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update, donate_argnums=(0, 1))

    def start(self) -> Any:
        params = jax.tree.map(lambda leaf: leaf.copy(), self.params)
        return params, self.tx.init(params)


class _Run:
    """One run that is timed in windows."""

    def __init__(self, step: _Training, manager: RollbackManager | None):
        self.update, self.manager = step.update, manager
        self.step, self.tree = 0, step.start()
        if manager is not None:
            self.step, self.tree = manager.resume(self.tree)

    def window(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self.tree = self.update(*self.tree)
            if self.manager is not None:
                self.step, self.tree = self.manager.step(self.step + 1, self.tree)
        jax.block_until_ready(self.tree)
        return (time.perf_counter() - begin) / steps

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()


if __name__ == "__main__":
    main()
