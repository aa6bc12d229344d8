"""What each placement of the guard can and cannot do: ``python -m benchmarks.placements``.

LoRA fine-tuning at the tuned learning rate and at 100 times it (perplexity on the valid split),
and how far the weights move in a step whose gradients are NaN, after 20 good ones.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.stress import methods
from benchmarks.stress.bench import prepare
from benchmarks.stress.regimes import REGIMES, SIZES, Recipe, run_cell
from lbw_optax import lbw_guard
from lbw_optax.law.control import LAW
from train.provenance import provenance

PLACEMENTS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "optax.adamw(lr)": lambda adamw: adamw,
    "optax.chain(lbw_guard(), optax.adamw(lr))": lambda adamw: optax.chain(lbw_guard(), adamw),
    "lbw_guard(optax.adamw(lr))": lbw_guard,
}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description="Authority of the guard by its placement.")
    parser.add_argument("--data-dir", type=Path, help="as for benchmarks.stress")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/placements.json"))
    options = parser.parse_args()
    bench, regime = prepare(options.data_dir, SIZES[options.size]), REGIMES["lora"]

    def row(code: str, place: Callable[[Any], optax.GradientTransformation]) -> dict[str, Any]:
        def build(recipe: Recipe) -> optax.GradientTransformation:
            return place(methods.adamw(recipe))

        tuned, hundredfold = (
            run_cell(bench, regime, build, multiple * regime.guess, seed=0)["perplexity"]["valid"]
            for multiple in (1, 100)
        )
        moved = moved_by_nan(place(optax.adamw(1e-3)))
        return {"code": code, "tuned": tuned, "hundredfold": hundredfold, "moved_by_nan": moved}

    rows = [row(code, place) for code, place in PLACEMENTS.items()]
    facts = {"law": LAW, "learning_rate": regime.guess, **bench.facts, **bench.about}
    result = {"rows": rows, **facts, **provenance()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(*rows, sep="\n")


def moved_by_nan(tx: optax.GradientTransformation) -> float | None:
    """|change of the weights| / |weights| in a step with NaN gradients; None if they turn NaN."""
    tx = optax.with_extra_args_support(tx)
    weights = jax.random.normal(jax.random.key(0), (64, 64))
    state = tx.init(weights)
    for _ in range(20):
        updates, state = tx.update(weights, state, weights)
        weights = optax.apply_updates(weights, updates)
    updates, state = tx.update(weights * jnp.nan, state, weights)
    share = float(optax.tree.norm(updates) / optax.tree.norm(weights))
    return share if math.isfinite(share) else None


if __name__ == "__main__":
    main()
