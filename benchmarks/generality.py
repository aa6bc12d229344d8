"""The guard on other models, above other optimizers and under two schedules, at 1 and 30 x tuned.

    python -m benchmarks.generality --data-dir wikitext-2

AdamW trains each model of `benchmarks.tasks`; the plain decoder is also trained by other inner
optimizers; each pair once at a constant rate and once with warm-up + cosine. There the bare
optimizer's rate is tuned first, by the held-out loss with seed 0; then the bare and the guarded one
run at both rates with the reported seeds. A line a run is appended to
``benchmarks/results/generality.jsonl``; a second call goes on where the first stopped.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.stress.regimes import REGIMES, recipe
from benchmarks.stress.run import GUARD_CODE, ladder
from benchmarks.tasks import VOCABULARY, Task, tasks
from lbw_optax import lbw_guard
from train import data, jsonl
from train.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results" / "generality.jsonl"
STEPS, TUNING_SEED, SEEDS, MULTIPLES = 250, 0, (3, 4, 5), (1, 30)

Inner = Callable[[Any], optax.GradientTransformation]

INNER: dict[str, Inner] = {
    "AdamW": optax.adamw,
    "Lion": optax.lion,
    "Muon": optax.contrib.muon,
    "SGD with momentum": functools.partial(optax.sgd, momentum=0.9),
}
GUESSES = {"AdamW": 5e-3, "Lion": 5e-4, "Muon": 2e-2, "SGD with momentum": 0.5}
SCHEDULES = {"constant rate": REGIMES["scratch"], "warm-up + cosine": REGIMES["recipe"]}
"""The regimes of the stress benchmark whose schedule is taken."""
PAIRS = [(task, "AdamW") for task in ("experts", "recurrence", "diffusion")] + [
    ("decoder", inner) for inner in INNER if inner != "AdamW"
]


def main() -> None:
    """Run the cells that the result file lacks."""
    parser = argparse.ArgumentParser(description="The guard on other models and optimizers.")
    parser.add_argument("--data-dir", type=Path, help="as for benchmarks.stress")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    provenance()  # now, before anything is edited
    known = tasks(data.load(options.data_dir, vocab_size=VOCABULARY))
    done = {_key(record): record for record in jsonl.read(options.out)}

    def loss(schedule: str, task: str, inner: str, guarded: bool, lr: float, seed: int) -> float:
        cell = {"schedule": schedule, "task": task, "inner": inner, "guarded": guarded}
        cell |= {"lr": lr, "seed": seed, "law": GUARD_CODE if guarded else None}
        if _key(cell) not in done:
            found = run(known[task], INNER[inner], schedule, guarded, lr, seed)
            done[_key(cell)] = jsonl.append(options.out, cell | found | provenance())
            who = "guarded" if guarded else "bare"
            print(f"{schedule}, {task}, {inner}, {who}, {lr:g}: {found['loss']}")
        found = done[_key(cell)]["loss"]
        return np.inf if found is None else found

    for schedule, (task, inner) in itertools.product(SCHEDULES, PAIRS):
        bare = functools.partial(loss, schedule, task, inner, False)
        tuned = ladder(functools.cache(lambda lr, bare=bare: bare(lr, TUNING_SEED)), GUESSES[inner])
        for guarded, multiple, seed in itertools.product((False, True), MULTIPLES, SEEDS):
            loss(schedule, task, inner, guarded, round(multiple * tuned, 12), seed)


def run(
    task: Task, inner: Inner, schedule: str, guarded: bool, lr: float, seed: int
) -> dict[str, Any]:
    """Train once: the held-out loss before and after, and the last scale."""
    params = task.init(seed)
    batches = np.stack([task.batch(seed, step) for step in range(STEPS)])
    before, after, scale = _compiled(task.loss, inner, schedule, guarded)(
        jnp.float32(lr), params, batches, task.held_out
    )
    return {"before": float(before), "loss": float(after), "scale": float(scale), "steps": STEPS}


@functools.lru_cache(maxsize=4)
def _compiled(loss: Any, inner: Inner, schedule: str, guarded: bool) -> Callable[..., Any]:
    def whole(peak: jax.Array, params: Any, batches: jax.Array, held_out: jax.Array) -> Any:
        bare = inner(recipe(SCHEDULES[schedule], peak, STEPS).learning_rate)
        tx = lbw_guard(bare) if guarded else optax.with_extra_args_support(bare)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        (trained, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        scale = jnp.exp(state.law.control.log_scale) if guarded else 1.0
        return loss(params, held_out), loss(trained, held_out), scale

    return jax.jit(whole)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("schedule", "task", "inner", "guarded", "lr", "seed", "law")
    return tuple(record[name] for name in names)


if __name__ == "__main__":
    main()
