"""Losses that rise although the run is sound: curricula, annealed terms, levels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.health import classes
from benchmarks.health.pictures import pictures
from benchmarks.health.task import STEPS, Now, Params, Task, cross_entropy, mlp, mlp_start, task


def tasks() -> dict[str, Task]:
    return {
        "curriculum-stages": _curriculum(
            "a curriculum in ten stages", lambda batch: 0.08 * (batch // (STEPS // 10))
        ),
        "curriculum-linear": _curriculum(
            "a curriculum that gets harder step by step", lambda batch: 0.8 * batch / STEPS
        ),
        "rising-level": _shifted("a level that rises by 0.3 every 100 steps", _stairs, _one),
        "term-annealed": _shifted("a term without a gradient, annealed in up to 2", _ramp, _one),
        "weight-annealed": _shifted(
            "the weight of the loss annealed from 1 to 5", _nothing, _growing
        ),
        "kl-annealing": _autoencoder(),
    }


def _curriculum(title: str, noise: Callable[[jax.Array], jax.Array]) -> Task:
    """Pictures with ever more noise; judged on the hardest."""
    _, test = pictures()

    def loss(layers: Params, now: Now) -> jax.Array:
        x, y = classes.draw(now.key)
        more = jax.random.normal(jax.random.fold_in(now.key, 1), x.shape)
        return cross_entropy(mlp(layers, x + _hardest(noise(now.batch)) * more), y)

    def metric(layers: Params) -> jax.Array:
        more = jax.random.normal(jax.random.key(7), test.x.shape)
        return cross_entropy(mlp(layers, jnp.asarray(test.x) + 0.8 * more), jnp.asarray(test.y))

    return task(title, classes.start, loss, metric, rate=3e-3, unit="loss on the hardest")


def _hardest(noise: jax.Array) -> jax.Array:
    return jnp.minimum(noise, 0.8)


def _shifted(
    title: str,
    level: Callable[[jax.Array], jax.Array],
    weight: Callable[[jax.Array], jax.Array],
) -> Task:
    """A regression whose loss is weight times the error plus a level; judged by the error."""
    true = jax.random.normal(jax.random.key(3), (32, 8)) / jnp.sqrt(32)

    def error(layers: Params, key: jax.Array, size: int) -> jax.Array:
        one, other = jax.random.split(key)
        x = jax.random.normal(one, (size, 32))
        y = jnp.tanh(x @ true) + 0.3 * jax.random.normal(other, (size, 8))
        return jnp.mean((mlp(layers, x, jnp.tanh) - y) ** 2)

    def loss(layers: Params, now: Now) -> jax.Array:
        return weight(now.step) * error(layers, now.key, 64) + level(now.step)

    return task(
        title,
        lambda key: mlp_start(key, 32, 64, 8),
        loss,
        lambda layers: error(layers, jax.random.key(98), 2000),
        rate=3e-3,
        unit="held-out error",
    )


def _one(step: jax.Array) -> jax.Array:
    return jnp.float32(1)


def _nothing(step: jax.Array) -> jax.Array:
    return jnp.float32(0)


def _stairs(step: jax.Array) -> jax.Array:
    return 0.3 * (step // 100)


def _ramp(step: jax.Array) -> jax.Array:
    return 2 * jnp.clip((step - 100) / 300, 0, 1)


def _growing(step: jax.Array) -> jax.Array:
    return 1 + 4 * jnp.minimum(step / 400, 1)


def _autoencoder(width: int = 4) -> Task:
    """A variational autoencoder; the divergence's weight goes from 0 to 1 between two steps."""
    _, test = pictures()

    def parts(p: Params, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_spread = jnp.split(mlp(p["encoder"], x), 2, axis=1)
        z = mean + jnp.exp(log_spread) * jax.random.normal(key, mean.shape)
        rebuilt = jnp.sum((mlp(p["decoder"], z) - x) ** 2, axis=1) / (2 * 0.35**2)
        divergence = jnp.sum((mean**2 + jnp.exp(2 * log_spread) - 1) / 2 - log_spread, axis=1)
        return jnp.mean(rebuilt), jnp.mean(divergence)

    def start(key: jax.Array) -> Params:
        one, other = jax.random.split(key)
        return {
            "encoder": mlp_start(one, 64, 64, 2 * width),
            "decoder": mlp_start(other, width, 64, 64),
        }

    def loss(p: Params, now: Now) -> jax.Array:
        rebuilt, divergence = parts(p, classes.draw(now.key)[0], jax.random.fold_in(now.key, 1))
        return rebuilt + jnp.clip((now.step - 200) / 400, 0, 1) * divergence

    def metric(p: Params) -> jax.Array:
        return sum(parts(p, jnp.asarray(test.x), jax.random.key(6)), start=jnp.float32(0))

    return task(
        "a variational autoencoder, its divergence annealed in",
        start,
        loss,
        metric,
        rate=3e-3,
        unit="held-out bound",
    )
