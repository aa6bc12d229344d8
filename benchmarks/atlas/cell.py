"""`run_cell`: one training run of one task, as one compiled program.

To try any optimizer (a variant of the law, say) from a scratch script::

    from benchmarks.atlas.cell import run_cell
    from benchmarks.atlas.draw import tasks

    factory = lambda recipe: lbw_guard(own(recipe))      # benchmarks.atlas.methods.own
    for task in tasks("choose").values():
        cell = run_cell(task, factory, lr, seed=0, directory="wikitext-2", keep=("relative_step",))
        cell["loss"], cell["valid_curve"], cell["metrics"]["scale"]

One factory object is compiled once a task, for learning rate and seed are arguments of the compiled
run: keep the factory while you sweep them.
"""

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.atlas import data, models
from benchmarks.atlas.draw import POINTS, Task
from benchmarks.ladder import ladder
from benchmarks.stress.bench import kept
from benchmarks.stress.regimes import Factory, Recipe, averaged, watch

CURVE = 8
"""One in so many examples of the validation set is behind a point of the curve."""


def run_cell(
    task: Task,
    factory: Factory,
    lr: float,
    seed: int,
    *,
    directory: str | Path | None = None,
    cache: Path | None = None,
    keep: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train once and evaluate: the validation loss, its curve, the guard's metrics of every step.

    Args:
      task: of `benchmarks.atlas.draw.tasks`.
      factory: makes the optimizer.
      lr: peak learning rate.
      seed: of initialisation (or of adapters) and of the order of the batches.
      directory: of the text; None is the embedded corpus.
      cache: a folder that keeps trained bases for other processes.
      keep: names of further guard metrics.
    """
    began = time.perf_counter()
    pool = _pool(task, directory)
    params, frozen = _start(task, seed, directory, cache)
    batches = data.batches(task, pool.train, seed, task.steps)
    run = _compiled(task, factory, keep)
    result = jax.device_get(run(jnp.float32(lr), params, frozen, _stretches(batches), pool.valid))
    return {
        "before": float(result["before"]),
        "loss": float(result["loss"]),
        "train_curve": result["losses"].mean(1).tolist(),
        "valid_curve": result["curve"].tolist(),
        "metrics": {
            name: values.reshape(task.steps, *values.shape[2:]).tolist()
            for name, values in result["metrics"].items()
        },
        "seconds": time.perf_counter() - began,
    }


def is_perplexity(task: Task) -> bool:
    """Whether the loss is a cross-entropy, of which exp is compared; else the loss itself is."""
    return task.family not in ("diffusion", "regression")


@functools.lru_cache(maxsize=4)
def _pool(task: Task, directory: str | Path | None) -> data.Pool:
    return data.pool(task, directory)


@functools.lru_cache(maxsize=8)  # a whole grid of programs would fill the memory
def _compiled(task: Task, factory: Factory, keep: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """One program for a whole run: a loop over steps on the host takes twice the time."""

    def loss(params: Any, frozen: Any, batch: Any, evaluating: bool = False) -> jax.Array:
        trained = params if frozen is None else models.adapted(frozen, params)
        return models.loss(task, trained, batch, evaluating=evaluating)

    def run(lr: jax.Array, params: Any, frozen: Any, batches: Any, valid: Any) -> dict[str, Any]:
        tx = optax.with_extra_args_support(factory(recipe(task, lr)))
        few = jax.tree.map(lambda array: array[::CURVE], valid)

        def step(carry: Any, batch: Any) -> tuple[Any, Any]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, frozen, batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), (value, watch(state, keep))

        def stretch(carry: Any, batches: Any) -> tuple[Any, Any]:
            carry, (losses, metrics) = jax.lax.scan(step, carry, batches)
            return carry, (losses, metrics, loss(averaged(*carry), frozen, few, True))

        def judge(params: Any) -> jax.Array:
            """In pieces, so that a wide model's activations fit the memory."""
            pieces = jax.tree.map(_in_pieces, valid)
            return jnp.mean(jax.lax.map(lambda piece: loss(params, frozen, piece, True), pieces))

        carry, (losses, metrics, curve) = jax.lax.scan(stretch, (params, tx.init(params)), batches)
        return {
            "before": loss(params, frozen, few, True),
            "loss": judge(averaged(*carry)),
            "params": carry[0],
            "losses": losses,
            "curve": curve,
            "metrics": metrics,
        }

    return jax.jit(run)


def _in_pieces(array: jax.Array) -> jax.Array:
    size = min(32, len(array))
    return array[: len(array) // size * size].reshape(-1, size, *array.shape[1:])


def _stretches(batches: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(POINTS, -1, *a.shape[1:]), batches)


# The learning rate over a run


def recipe(task: Task, peak: jax.Array) -> Recipe:
    """What a method is given."""
    shape = functools.partial(_shape, task)
    flat = task._replace(schedule="constant")
    return Recipe(
        peak=peak,
        learning_rate=lambda count: peak * shape(count),
        undecayed=lambda count: peak * _shape(flat, count),
        shape=shape,
        b1=0.9,
        b2=task.b2,
        weight_decay=task.weight_decay,
        clip=task.clip,
        steps=task.steps,
        optimizer=task.optimizer,
    )


def _shape(task: Task, count: jax.typing.ArrayLike) -> jax.Array:
    """The schedule with a peak of 1; it starts above zero (Prodigy needs that)."""
    done = (jnp.asarray(count, jnp.float32) + 1) / task.steps
    risen = jnp.minimum(1.0, done / task.warmup) if task.warmup else jnp.ones_like(done)
    after = jnp.clip((done - task.warmup) / (1 - task.warmup), 0.0, 1.0)
    falls = {
        "constant": jnp.ones_like(done),
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * after)),
        "WSD": jnp.minimum(1.0, (1 - done) / 0.2 + 1 / task.steps),
        "inverse root": jax.lax.rsqrt(jnp.maximum(1.0, done / max(task.warmup, 0.05))),
    }
    return risen * falls[task.schedule]


# Where a run starts


def _start(task: Task, seed: int, directory: str | Path | None, cache: Path | None) -> Any:
    """What is trained, and the frozen base under adapters or None."""
    if task.start == "scratch":
        return models.init(task, seed), None
    base = _base(task, directory, cache)
    if task.start == "full":
        return base, None
    return models.adapters(task, seed), base


@functools.lru_cache(maxsize=4)
def _base(task: Task, directory: str | Path | None, cache: Path | None) -> models.Weights:
    """Trained with AdamW, at the best rate of its own ladder."""
    of_base, digest = base_task(task), data.text(directory, task.vocabulary).digest
    key = hashlib.sha256(repr((of_base._replace(rank=0), digest)).encode()).hexdigest()[:16]

    def make() -> models.Weights:
        return _train_base(task, data.base_pool(task, directory))

    if cache is None:
        return make()
    tree = jax.tree.structure(models.init(of_base, 0))
    return kept(cache / f"atlas-base-{key}.npz", tree, make)


def base_task(task: Task) -> Task:
    """The training of the base: as long as the task, but at least 200 steps."""
    return task._replace(
        start="scratch",
        optimizer="AdamW",
        b2=0.99,
        weight_decay=0.01,
        clip=1.0,
        schedule="constant" if task.shift == "none" else "cosine",
        warmup=0.1,
        steps=max(200, task.steps),
    )


def _train_base(task: Task, pool: data.Pool) -> models.Weights:
    of_base = base_task(task)
    batches = _stretches(data.batches(of_base, pool.train, 0, of_base.steps))
    run = _compiled(of_base, _adamw, ())
    found: dict[float, Any] = {}

    def loss(lr: float) -> float:
        if lr not in found:
            start = models.init(of_base, 0)
            found[lr] = jax.device_get(run(jnp.float32(lr), start, None, batches, pool.valid))
        return finite(float(found[lr]["loss"]), lr)

    return found[ladder(loss, guess(of_base))]["params"]


def _adamw(recipe: Recipe) -> optax.GradientTransformation:
    inner = optax.adamw(recipe.learning_rate, b2=recipe.b2, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


# The search for the tuned rate


def guess(task: Task) -> float:
    """Where the search starts: a rung of the ladder."""
    rate = _GUESSES[task.optimizer]
    if task.optimizer in ("AdamW", "Lion"):
        rate *= {"muP": 5.0}.get(task.init, (64 / task.width) ** 0.5)
    if task.start == "full":
        rate /= 3
    power = int(np.floor(np.log10(rate)))
    return min(
        (round(digit * 10.0**power, 12) for digit in (1, 2, 5, 10)),
        key=lambda rung: abs(np.log(rung / rate)),
    )


def finite(loss: float, lr: float) -> float:
    """A run that diverged counts as a huge loss, so that the search goes down from it."""
    return loss if np.isfinite(loss) else 1e6 * (1 + lr)


_GUESSES = {"AdamW": 5e-3, "Lion": 5e-4, "Muon": 2e-2, "SGD": 0.1, "Adafactor": 0.05}
