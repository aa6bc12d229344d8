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
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax
from benchmarks import runner
from benchmarks.ladder import ladder
from benchmarks.records import FOLDER, Cell, Record, law
from benchmarks.runner import Book
from benchmarks.stress.bench import fingerprint
from benchmarks.stress.regimes import REGIMES, recipe
from benchmarks.tasks import VOCABULARY, Task, tasks
from lbw_optax import lbw_guard
from train import data
from train.provenance import provenance

RESULTS = FOLDER / "generality.jsonl"
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
    corpus = data.load(options.data_dir, vocab_size=VOCABULARY)
    known, facts = tasks(corpus), {"tokens": fingerprint(corpus)}
    about = {"data": "standard library" if options.data_dir is None else options.data_dir.name}
    book = Book(options.out, facts, lambda cell: measure(known[cell["task"]], cell), about)
    cells = []
    for schedule, (task, inner) in itertools.product(SCHEDULES, PAIRS):
        tuned = ladder(functools.partial(_loss, book, schedule, task, inner), GUESSES[inner])
        for guarded, multiple, seed in itertools.product((False, True), MULTIPLES, SEEDS):
            rate = round(multiple * tuned, 12)
            cells.append(cell_of(schedule, task, inner, guarded, rate, seed))
    runner.run(book, cells, _line)


def cell_of(schedule: str, task: str, inner: str, guarded: bool, lr: float, seed: int) -> Cell:
    """One run."""
    cell = {"schedule": schedule, "task": task, "inner": inner, "guarded": guarded}
    return {**cell, "lr": lr, "seed": seed, "steps": STEPS, "law": law(guarded)}


def _loss(book: Book, schedule: str, task: str, inner: str, lr: float) -> float:
    """Of the bare optimizer, for the tuning."""
    found = book.record(cell_of(schedule, task, inner, False, lr, TUNING_SEED))["loss"]
    return math.inf if found is None else found


def measure(task: Task, cell: Cell) -> Record:
    """Train once: the held-out loss before and after, and the last scale."""
    params = task.init(cell["seed"])
    batches = np.stack([task.batch(cell["seed"], step) for step in range(STEPS)])
    run = _compiled(task.loss, INNER[cell["inner"]], cell["schedule"], cell["guarded"])
    before, after, scale = run(jnp.float32(cell["lr"]), params, batches, task.held_out)
    return {"before": float(before), "loss": float(after), "scale": float(scale)}


def _line(record: Record) -> str:
    who = "guarded" if record["guarded"] else "bare"
    run = f"{record['schedule']}, {record['task']}, {record['inner']}, {who}, {record['lr']:g}"
    return f"{run}, seed {record['seed']}: {record['loss']}"


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
        scale = lbw_optax.metrics(state)["scale"] if guarded else 1.0
        return loss(params, held_out), loss(trained, held_out), scale

    return jax.jit(whole)


if __name__ == "__main__":
    main()
