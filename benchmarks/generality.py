"""The guard on other models and above other optimizers, at the tuned rate and at 30 times it.

    python -m benchmarks.generality --data-dir wikitext-2

AdamW trains each model of `benchmarks.tasks`; the plain decoder is also trained by other inner
optimizers. For each pair the bare optimizer's rate is tuned first, by the held-out loss with seed
0; then the bare and the guarded one run at both rates with the reported seeds. A line a run is
appended to ``benchmarks/results/generality.jsonl``; a second call goes on where the first stopped.
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

from benchmarks import results_file
from benchmarks.provenance import provenance
from benchmarks.stress import GUARD_CODE, ladder
from benchmarks.tasks import VOCABULARY, Task, tasks
from lbw_optax import lbw_guard
from train import data

RESULTS = Path(__file__).resolve().parent / "results" / "generality.jsonl"
STEPS, TUNING_SEED, SEEDS, MULTIPLES = 250, 0, (3, 4, 5), (1, 30)

Inner = Callable[[Any], optax.GradientTransformation]

INNER: dict[str, Inner] = {
    "AdamW": lambda lr: optax.adamw(lr),
    "Lion": lambda lr: optax.lion(lr),
    "Muon": lambda lr: optax.contrib.muon(lr),
    "SGD with momentum": lambda lr: optax.sgd(lr, momentum=0.9),
}
GUESSES = {"AdamW": 5e-3, "Lion": 5e-4, "Muon": 2e-2, "SGD with momentum": 0.5}
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
    done = {_key(record): record for record in results_file.read(options.out)}

    def loss(task: str, inner: str, guarded: bool, lr: float, seed: int) -> float:
        cell = {"task": task, "inner": inner, "guarded": guarded, "lr": lr, "seed": seed}
        cell["law"] = GUARD_CODE if guarded else None
        if _key(cell) not in done:
            record = cell | run(known[task], INNER[inner], guarded, lr, seed) | provenance()
            done[_key(cell)] = results_file.append(options.out, record)
            print(f"{task}, {inner}, {'guarded' if guarded else 'bare'}, {lr:g}: {record['loss']}")
        found = done[_key(cell)]["loss"]
        return np.inf if found is None else found

    for task, inner in PAIRS:
        bare = functools.partial(loss, task, inner, False)
        tuned = ladder(functools.cache(lambda lr, bare=bare: bare(lr, TUNING_SEED)), GUESSES[inner])
        for guarded, multiple, seed in itertools.product((False, True), MULTIPLES, SEEDS):
            loss(task, inner, guarded, round(multiple * tuned, 12), seed)


def run(task: Task, inner: Inner, guarded: bool, lr: float, seed: int) -> dict[str, Any]:
    """Train once: the held-out loss before and after, and the last scale."""
    params = task.init(seed)
    batches = np.stack([task.batch(seed, step) for step in range(STEPS)])
    before, after, scale = _compiled(task.loss, inner, guarded)(
        jnp.float32(lr), params, batches, task.held_out
    )
    return {"before": float(before), "loss": float(after), "scale": float(scale), "steps": STEPS}


@functools.lru_cache(maxsize=4)
def _compiled(loss: Any, inner: Inner, guarded: bool) -> Callable[..., Any]:
    def whole(lr: jax.Array, params: Any, batches: jax.Array, held_out: jax.Array) -> Any:
        tx = lbw_guard(inner(lr)) if guarded else optax.with_extra_args_support(inner(lr))

        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        (trained, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        scale = jnp.exp(state.control.log_scale) if guarded else 1.0
        return loss(params, held_out), loss(trained, held_out), scale

    return jax.jit(whole)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("task", "inner", "guarded", "lr", "seed", "law"))


if __name__ == "__main__":
    main()
