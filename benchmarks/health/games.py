"""Two networks against each other: neither loss falls for long."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.health.task import Now, Params, Task, mlp, mlp_start

STEPS = 2000


def tasks() -> dict[str, Task]:
    return {"gan": _gan()}


def _gan() -> Task:
    """Eight blobs on a circle; the critic is trained first in every step, each by its own Adam."""

    def start(key: jax.Array) -> dict[str, Params]:
        one, other = jax.random.split(key)
        return {"critic": mlp_start(one, 2, 64, 64, 1), "maker": mlp_start(other, 4, 64, 64, 2)}

    def critic(own: Params, models: dict[str, Params], now: Now) -> jax.Array:
        fake = mlp(models["maker"], jax.random.normal(now.key, (128, 4)))
        real = _blobs(jax.random.fold_in(now.key, 1), 128)
        return jnp.mean(jax.nn.softplus(-mlp(own, real)) + jax.nn.softplus(mlp(own, fake)))

    def maker(own: Params, models: dict[str, Params], now: Now) -> jax.Array:
        fake = mlp(own, jax.random.normal(now.key, (128, 4)))
        return jnp.mean(jax.nn.softplus(-mlp(models["critic"], fake)))

    def metric(models: dict[str, Params]) -> jax.Array:
        """The distance of the made from the real ones, by a kernel of width 0.3, unsquared."""
        x = _blobs(jax.random.key(5), 500)
        y = mlp(models["maker"], jax.random.normal(jax.random.key(6), (500, 4)))
        squared = _near(x, x) + _near(y, y) - 2 * _near(x, y)
        return jnp.sqrt(jnp.maximum(squared, 0))

    return Task(
        title="a GAN of eight blobs, two optimizers",
        unit="distance",
        higher=False,
        steps=STEPS,
        rate=1e-3,
        optimizer=lambda rate: optax.adam(optax.cosine_decay_schedule(rate, STEPS), b1=0.5),
        start=start,
        losses={"critic": critic, "maker": maker},
        metric=metric,
        remember=lambda memory, models, step: (),
        memory=lambda models: (),
        allowed=0.05,
    )


def _blobs(key: jax.Array, number: int) -> jax.Array:
    which, noise = jax.random.split(key)
    angle = 2 * jnp.pi * jax.random.randint(which, (number,), 0, 8) / 8
    centre = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return centre + 0.05 * jax.random.normal(noise, (number, 2))


def _near(x: jax.Array, y: jax.Array) -> jax.Array:
    squared = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    return jnp.mean(jnp.exp(-squared / 0.1))
