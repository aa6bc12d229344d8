"""What an optimizer's step costs by XLA's own analysis: passes, temporaries, instructions, compile.

Run ``python -m benchmarks.speed.cost``. Each optimizer's step (the update, applied; state and
parameters donated) is compiled for a decoder's layers, of which nothing is ever made: all but the
time is the same on every run. Passes are the bytes that XLA says the step reads and writes, over
those of the parameters; temporaries likewise. The time to compile is of the processor, summed over
threads.

A guard that governs and one that observes are one program: the mode is a number in its state.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.command import check_names
from lbw_optax import lbw_guard
from lbw_optax.law.control import LAW
from train.provenance import provenance

LEAVES = (30, 300, 996, 2004)
LAYER = ((512,), (512, 1536), (512, 512), (512,), (512, 2048), (2048, 512))
"""Shapes of one layer: norm, q k v, out, norm, up, down."""
BASE = "AdamW"


def _layer(path: str) -> str:
    """The group of a leaf, which its number in the list of them names."""
    return f"layers/{int(path) // len(LAYER)}"


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    BASE: lambda: optax.adamw(1e-3),
    "Lion": lambda: optax.lion(1e-3),
    "Muon": lambda: optax.contrib.muon(1e-3),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-3), 5),
    "guard around AdamW": lambda: lbw_guard(optax.adamw(1e-3)),
    "guard around AdamW, groups": lambda: lbw_guard(optax.adamw(1e-3), groups=_layer),
    "guard before AdamW": lambda: optax.chain(lbw_guard(), optax.adamw(1e-3)),
}

MOST_LEAVES = {"Muon": 300}  # it iterates on every matrix: beyond, minutes


def main() -> None:
    """Measure, print a line for each, and write the result file."""
    parser = argparse.ArgumentParser(description="The cost of a step by XLA's own analysis.")
    parser.add_argument("--leaves", type=int, nargs="+", default=LEAVES, help="of the parameters")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cost.json"))
    options = parser.parse_args()
    check_names(options.optimizers, OPTIMIZERS, "optimizer")
    jax.config.update("jax_enable_compilation_cache", False)
    cost(optax.identity(), 1)  # the first compilation sets the compiler up
    rows: list[dict[str, Any]] = []
    for leaves in options.leaves:
        for name in (x for x in options.optimizers if leaves <= MOST_LEAVES.get(x, leaves)):
            row = {"optimizer": name, "leaves": leaves, **cost(OPTIMIZERS[name](), leaves)}
            print(json.dumps(row), flush=True)
            rows.append(row)
            result = {**provenance(), "law": LAW, "rows": rows}
            options.out.write_text(json.dumps(result, indent=1) + "\n")


def cost(tx: Any, leaves: int) -> dict[str, float]:
    """Of one step, for parameters of so many leaves.

    Returns:
      `parameters`; `passes` and `temporaries` in units of their bytes; `instructions` of the
      compiled program, those within kernels included; `compile_seconds`, of the processor.
    """
    update = optax.with_extra_args_support(tx).update
    shapes = [LAYER[i % len(LAYER)] for i in range(leaves)]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)

    def step(grads: Any, state: Any, params: Any, loss: Any) -> Any:
        updates, state = update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params, loss)
    start = time.process_time()
    compiled: Any = lowered.compile()
    seconds = time.process_time() - start
    size = sum(x.size for x in params)
    unit = 4 * size
    return {
        "parameters": size,
        "passes": compiled.cost_analysis()["bytes accessed"] / unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / unit,
        "instructions": len(re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.M)),
        "compile_seconds": seconds,
    }


if __name__ == "__main__":
    main()
