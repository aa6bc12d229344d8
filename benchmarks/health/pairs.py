"""Pairs: embeddings of which a batch touches few, and two views of one thing."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.health.task import Params, Task, cross_entropy, mlp, mlp_start, task


def tasks() -> dict[str, Task]:
    return {"embeddings": _embeddings(), "contrastive": _contrastive()}


def _embeddings(rows: int = 2000, width: int = 16, batch: int = 64) -> Task:
    """Skip-gram with one negative: frequent rows are touched often, most hardly ever."""

    def pairs(p: Params, key: jax.Array) -> jax.Array:
        one, other = jax.random.split(key)
        i = (rows * jax.random.uniform(one, (batch,)) ** 3).astype(jnp.int32)
        j, negative = (7 * i + 3) % rows, jax.random.randint(other, (batch,), 0, rows)
        near = (p["e"][i] * p["c"][j]).sum(1)
        far = (p["e"][i] * p["c"][negative]).sum(1)
        return jnp.mean(jax.nn.softplus(-near) + jax.nn.softplus(far))

    def start(key: jax.Array) -> Params:
        e = (jax.random.uniform(key, (rows, width)) - 0.5) / width
        return {"e": e, "c": jnp.zeros((rows, width))}

    def metric(p: Params) -> jax.Array:
        keys = jax.random.split(jax.random.key(97), 50)
        return jnp.mean(jax.vmap(lambda key: pairs(p, key))(keys))

    return task(
        "sparse embeddings: a batch touches 64 of 2000 rows",
        start,
        lambda p, now: pairs(p, now.key),
        metric,
        rate=0.03,
    )


def _contrastive(size: int = 64) -> Task:
    mix = (np.random.default_rng(5).normal(size=(16, 32)) / 4).astype(np.float32)

    def loss(layers: Params, key: jax.Array) -> jax.Array:
        thing, noise = jax.random.split(key)
        x = jnp.tanh(jax.random.normal(thing, (size, 16)) @ mix)
        noises = 0.3 * jax.random.normal(noise, (2, size, 32))
        one, other = (_unit(mlp(layers, x + n)) for n in noises)
        return cross_entropy(one @ other.T / 0.1, jnp.arange(size))

    def metric(layers: Params) -> jax.Array:
        keys = jax.random.split(jax.random.key(99), 8)
        return jnp.mean(jax.vmap(lambda key: loss(layers, key))(keys))

    return task(
        "contrastive learning",
        lambda key: mlp_start(key, 32, 64, 16),
        lambda layers, now: loss(layers, now.key),
        metric,
        rate=0.01,
    )


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-6)
