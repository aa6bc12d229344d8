"""What could tell a rate that is too high: each candidate signal on bare AdamW, regime by regime.

Run ``python -m benchmarks.signals --data-dir DIR``; it writes ``benchmarks/results/signals.jsonl``,
a line a run, and goes on where it stopped. AdamW trains at its tuned rate (where the stress
benchmark's search starts) and above it, watched by a guard that does not act. A law needs a signal
with one threshold for all regimes: below it at the tuned rate, above it at ten times that.

Of a window of steps, with p the parameters, u the last step, g the gradients before and h the
gradient after it:

- relative step: median of |u| / |p|, in units of kappa; the same of the median leaf and of the
  leaf where it is largest, without leaves that start at zero;
- overshoot: mean of cos(h, u), in standard errors of that mean;
- secant curvature: sum of <h - g, u> over sum of <-g, u>, which is 1 at the minimum along the step
  and 2 where gradient descent begins to diverge, in the optimizer's own metric: for a step
  u = -lr g / P it is lr times the curvature of P^-1 H along u. Less 1 it is the overshoot ratio
  <h, u> / |<g, u>|;
- norm growth: log(|p| at the end / |p| at the start) a step, in units of 10^-4.

Source of the limit: Cohen et al., Adaptive gradient methods at the edge of stability
(arXiv:2207.14484).
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import runner
from benchmarks.records import FOLDER, Cell, Record
from benchmarks.runner import Book
from benchmarks.stress.bench import Bench, prepare, start
from benchmarks.stress.methods import METHODS, adamw
from benchmarks.stress.regimes import REGIMES, SIZES, Regime, batches, recipe, run_cell
from lbw_optax.law.control import FIRST_SCALE, KAPPA
from train.provenance import provenance

RESULTS = FOLDER / "signals.jsonl"
SEEDS, MULTIPLES = (0, 1, 2), (1, 3, 10)
WINDOW = slice(20, 80)
"""The first steps of AdamW are long whatever the rate; the warm-up's peak is at step 40."""
KEPT = (
    "overshoot",
    "curvature",
    "gradient_norm",
    "update_norm",
    "parameter_norm",
    "relative_step",
)


def main() -> None:
    """Run the cells that the result file lacks."""
    parser = argparse.ArgumentParser(description="Signals of bare AdamW below and above its rate.")
    parser.add_argument("--data-dir", type=Path, help="as for benchmarks.stress")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    provenance()  # now, before anything is edited
    bench = prepare(options.data_dir, SIZES["default"])
    book = Book(options.out, bench.facts, functools.partial(measure, bench), bench.about)
    runner.run(book, plan(bench), str)


def plan(bench: Bench) -> list[Cell]:
    """All cells. Bare AdamW has no law, and the guard that watches it does not act."""
    return [
        {
            "regime": regime,
            "multiple": multiple,
            "seed": seed,
            "steps": bench.size.steps[regime],
            "law": None,
        }
        for regime, multiple, seed in itertools.product(REGIMES, MULTIPLES, SEEDS)
    ]


def measure(bench: Bench, cell: Cell) -> Record:
    """Run one cell."""
    regime, seed = REGIMES[cell["regime"]], cell["seed"]
    rate = cell["multiple"] * regime.guess
    result = run_cell(bench, regime, METHODS["guard-observe"].build, rate, seed, keep=KEPT)
    return {
        "learning_rate": rate,
        "perplexity": result["perplexity"]["valid"],
        **signals(result["metrics"]),
        **by_leaf(*_leaf_lengths(bench, regime, rate, seed)),
    }


def signals(metrics: dict[str, list[float]]) -> dict[str, float]:
    """The four signals of one run, from what a guard in `observe` mode saw in every step."""
    seen = {name: np.asarray(values) for name, values in metrics.items()}
    # An observing guard measures the step at the scale that it would have held.
    held = np.concatenate([[FIRST_SCALE], seen["scale"][:-1]])
    last = np.concatenate([[np.nan], (seen["update_norm"] / held)[:-1]])
    after = (seen["overshoot"] * seen["gradient_norm"] * last)[WINDOW]
    change = (seen["curvature"] * last**2)[WINDOW]
    cosine, norm = seen["overshoot"][WINDOW], seen["parameter_norm"][WINDOW]
    return {
        "relative_step": float(np.median((seen["relative_step"] / held)[WINDOW]) / KAPPA),
        "overshoot": float(cosine.mean() / (cosine.std(ddof=1) / np.sqrt(cosine.size))),
        "secant": float(change.sum() / (change - after).sum()),
        "norm_growth": float(1e4 * np.log(norm[-1] / norm[0]) / (norm.size - 1)),
    }


def by_leaf(updates: np.ndarray, params: np.ndarray) -> dict[str, float]:
    """The relative step of the median leaf and of the largest, from lengths of (steps, leaves).

    >>> by_leaf(np.full((80, 3), 0.01), np.ones((80, 1)) * [1.0, 2.0, 4.0])
    {'median_leaf': 0.5, 'largest_leaf': 1.0}
    """
    has_length = params[0] > 0
    ratios = updates[WINDOW][:, has_length] / params[WINDOW][:, has_length] / KAPPA
    return {
        "median_leaf": float(np.median(np.median(ratios, axis=1))),
        "largest_leaf": float(np.median(np.max(ratios, axis=1))),
    }


def _leaf_lengths(
    bench: Bench, regime: Regime, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each leaf's update and parameters, in every step to the end of the window, bare AdamW."""
    loss_fn, steps = bench.losses[regime.adapters], bench.size.steps[regime.name]
    params, frozen = start(bench, seed, from_base=regime.from_base, adapters=regime.adapters)
    drawn = np.concatenate(batches(bench, regime, seed, steps))[: WINDOW.stop]
    tx = adamw(recipe(regime, jnp.float32(rate), steps))

    def lengths(tree: Any) -> jax.Array:
        return jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])

    def step(carry: Any, batch: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        grads = jax.grad(loss_fn)(params, frozen, batch)
        updates, state = tx.update(grads, state, params)
        seen = lengths(updates), lengths(params)
        return (optax.apply_updates(params, updates), state), seen

    run = jax.jit(lambda carry, drawn: jax.lax.scan(step, carry, drawn)[1])
    updates, norms = run((params, tx.init(params)), drawn)
    return np.asarray(updates), np.asarray(norms)


if __name__ == "__main__":
    main()
