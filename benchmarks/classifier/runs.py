"""The runs of one setting, side by side in one program: what a guard would see in each step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.atlas import cell, data, models
from benchmarks.atlas.draw import Task
from benchmarks.atlas.methods import own
from benchmarks.classifier.tasks import STEPS, Lanes, lanes
from lbw_optax.law import telemetry
from lbw_optax.law.telemetry import Probe


class Factors(NamedTuple):
    """What befalls the runs, step by step: float32[runs, steps] each, 1 where nothing does."""

    gradients: np.ndarray
    loss: np.ndarray
    rate: np.ndarray
    weights: np.ndarray  # of the first matrix


def run(task: Task) -> dict[str, np.ndarray]:
    """All runs of a setting: `loss` as it was logged, and the scalars of `Telemetry` by name.

    Arrays are [run, step]; what befell the runs is in `lanes`.
    """
    befell = lanes(task)
    pool = data.pool(task, None)
    size = len(jax.tree.leaves(pool.train)[0])
    index = np.stack(
        [
            np.random.default_rng([seed, 0]).integers(size, size=(task.steps, task.batch))
            for seed in befell.seed
        ]
    )
    starts = [models.init(task, int(seed) % 2**16) for seed in befell.seed]
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    rates = jnp.asarray(befell.rate * cell.guess(task), jnp.float32)
    loss, seen = jax.device_get(_program(task)(params, rates, factors(befell), index, pool.train))
    scalars = {name: x for name, x in seen._asdict().items() if name != "histogram"}
    return {"logged": loss, **scalars}


def factors(befell: Lanes) -> Factors:
    """The faults of `benchmarks.classifier.tasks`, as factors."""
    step = np.arange(STEPS)[None]
    since = step - befell.at[:, None]
    strikes = (since >= 0) & (since < befell.length[:, None])
    size = befell.size[:, None]

    def where(kinds: dict[str, Any]) -> np.ndarray:
        found = np.ones(strikes.shape, np.float32)
        for kind, factor in kinds.items():
            hit = strikes & (befell.fault == kind)[:, None]
            found = np.where(hit, factor, found)
        return found.astype(np.float32)

    shifts = {"hard_batch": size, "level_shift": size}
    return Factors(
        gradients=where({**shifts, "scaled_gradient": size, "nan_gradient": np.nan}),
        loss=where({**shifts, "nan_loss": np.nan}),
        rate=where({"learning_rate": size, "drift": size ** (since + 1.0).clip(0)}),
        weights=where({"broken_weights": size}),
    )


def _program(task: Task) -> Any:
    """All runs of a setting. The law is not in it, for it would take longer to compile than to run:
    `benchmarks.classifier.examples` reads what is recorded here with the law, once for all.
    """

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def go(params: Any, rate: Any, befalls: Any, index: Any, examples: Any) -> Any:
        recipe = cell.recipe(task, rate)

        def learning_rate(count: jax.Array) -> jax.Array:
            return recipe.learning_rate(count) * befalls.rate[count]

        tx = optax.with_extra_args_support(own(recipe._replace(learning_rate=learning_rate)))
        broken = next(name for name, leaf in models.shapes(task).items() if len(leaf.shape) > 1)

        def step(carry: Any, now: Any) -> Any:
            params, state, seen, probe = carry
            age, factor, rows = now
            batch = jax.tree.map(lambda x: x[rows], examples)
            params = params | {broken: params[broken] * factor.weights}
            loss, grads = jax.value_and_grad(functools.partial(models.loss, task))(params, batch)
            loss, grads = loss * factor.loss, jax.tree.map(lambda g: g * factor.gradients, grads)
            seen, probe = telemetry.observe_gradients(seen, probe, grads, params, loss, age)
            updates, state = tx.update(grads, state, params, value=loss)
            seen = telemetry.observe_step(seen, updates, params, jnp.float32(1), jnp.array(False))
            params = optax.apply_updates(params, updates)
            told = seen._replace(histogram=jnp.zeros(0))
            return (params, state, seen, probe), (loss, told)

        probe = Probe(telemetry.sample_of_zeros(params), parameters=None)
        first = params, tx.init(params), telemetry.init(), probe
        _, told = jax.lax.scan(step, first, (jnp.arange(task.steps), befalls, index))
        return told

    return go
