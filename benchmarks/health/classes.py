"""Classifiers whose batches differ: rare classes, heavy tails, masked labels, several sources."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.health.pictures import pictures
from benchmarks.health.task import (
    Now,
    Optimizer,
    Params,
    Task,
    at,
    cross_entropy,
    falling,
    mlp,
    mlp_start,
    task,
)

BATCH = 64


def tasks() -> dict[str, Task]:
    rare = {f"rare-{share:g}": _rare(share) for share in (1, 2, 5, 10)}
    tails = {f"heavy-tail-{spread:g}": _heavy_tail(spread) for spread in (1.5, 2, 3)}
    return {
        "logistic": _logistic("logistic regression, all data, from zero", None),
        "logistic-batches": _logistic("logistic regression in batches, from zero", BATCH),
        "mlp": _classifier("an MLP in batches", lambda now: 1.0),
        "mlp-all": _full_batch(),
        "zero-head": _zero_head(),
        "cyclic-rate": _classifier(
            "a rate in cycles, from a tenth to the whole", lambda now: 1.0, optimizer=_cycles
        ),
        **rare,
        "second-source": _second_source(),
        "alternating": _classifier(
            "every other batch has a 200th of the gradient",
            lambda now: jnp.where(now.batch % 2, 0.005, 1.0),
        ),
        **tails,
        "masked-tenth": _classifier(
            "all labels masked in every tenth batch", lambda now: 1.0 * (now.batch % 10 != 9)
        ),
        "masked-rows": _classifier(
            "all labels masked in 40 batches of 300", lambda now: 1.0 * (now.batch % 300 < 260)
        ),
    }


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch."""
    train, _ = pictures()
    rows = jax.random.randint(key, (BATCH,), 0, len(train.y))
    return at(train.x, rows), at(train.y, rows)


def held_out(layers: Params) -> jax.Array:
    """The loss on pictures that no batch holds."""
    _, test = pictures()
    return cross_entropy(mlp(layers, jnp.asarray(test.x)), jnp.asarray(test.y))


def start(key: jax.Array) -> Params:
    return mlp_start(key, 64, 64, 10)


def _classifier(
    title: str,
    weight: Callable[[Now], float | jax.Array],
    *,
    optimizer: Optimizer = optax.adam,
    rate: float = 3e-3,
) -> Task:
    """An MLP on pictures; a batch weighs what `weight` gives it, 0 where its labels are masked."""

    def loss(layers: Params, now: Now) -> jax.Array:
        x, y = draw(now.key)
        return weight(now) * cross_entropy(mlp(layers, x), y)

    return task(title, start, loss, held_out, rate=rate, optimizer=optimizer, unit="held-out loss")


def _heavy_tail(spread: float) -> Task:
    """The batches' weights are lognormal, all with the same minimum."""
    return _classifier(
        f"batches whose weights are lognormal, σ {spread:g}",
        lambda now: jnp.exp(spread * jax.random.normal(jax.random.fold_in(now.key, 1))),
    )


def _cycles(rate: float) -> optax.GradientTransformation:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        phase = jnp.asarray(count, jnp.float32) / 250
        return rate * (0.1 + 0.9 * jnp.abs(2 * (phase - jnp.floor(phase + 0.5))))

    return optax.adam(schedule)


def _logistic(title: str, size: int | None) -> Task:
    train, _ = pictures()

    def objective(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(x @ p["w"] + p["b"], y) + 1e-3 * jnp.sum(p["w"] ** 2)

    def loss(p: Params, now: Now) -> jax.Array:
        if size is None:
            return objective(p, jnp.asarray(train.x), jnp.asarray(train.y))
        return objective(p, *draw(now.key))

    return task(
        title,
        lambda key: {"w": jnp.zeros((64, 10)), "b": jnp.zeros((1, 10))},
        loss,
        lambda p: objective(p, jnp.asarray(train.x), jnp.asarray(train.y)),
        rate=0.01,
    )


def _full_batch() -> Task:
    train, _ = pictures()
    x, y = train.x[:500], train.y[:500]

    def loss(layers: Params) -> jax.Array:
        decay = 1e-3 * sum(jnp.sum(layer["w"] ** 2) for layer in layers)
        return cross_entropy(mlp(layers, jnp.asarray(x)), jnp.asarray(y)) + decay

    return task(
        "an MLP, all data in every batch",
        lambda key: mlp_start(key, 64, 32, 10),
        lambda layers, now: loss(layers),
        loss,
        rate=0.01,
    )


def _zero_head() -> Task:
    """A body that is not trained, and a head that starts at zero."""
    body = np.asarray(np.random.default_rng(5).normal(size=(64, 128)) / 4, np.float32)

    def loss(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(jnp.tanh(x @ body) @ p["w"] + p["b"], y)

    _, test = pictures()
    return task(
        "a head from zero on a frozen body",
        lambda key: {"w": jnp.zeros((128, 10)), "b": jnp.zeros((1, 10))},
        lambda p, now: loss(p, *draw(now.key)),
        lambda p: loss(p, jnp.asarray(test.x), jnp.asarray(test.y)),
        rate=0.003,
        unit="held-out loss",
    )


def _rare(percent: float) -> Task:
    """A class that only so many batches hold, and these hold nothing else."""
    train, test = pictures()
    common, rare = train.of(train.y < 9), train.of(train.y == 9)
    wanted = test.of(test.y == 9)

    def loss(layers: Params, now: Now) -> jax.Array:
        which, rows = jax.random.split(now.key)
        # One batch of every 100 / percent, at a place of its own: all seeds have as many.
        every = round(100 / percent)
        place = jax.random.randint(
            jax.random.fold_in(jax.random.key(9), now.batch // every), (), 0, every
        )
        is_rare = now.batch % every == place
        a = jax.random.randint(which, (BATCH,), 0, len(common.y))
        b = jax.random.randint(rows, (BATCH,), 0, len(rare.y))
        x = jnp.where(is_rare, at(rare.x, b), at(common.x, a))
        y = jnp.where(is_rare, at(rare.y, b), at(common.y, a))
        return cross_entropy(mlp(layers, x), y)

    def accuracy(layers: Params) -> jax.Array:
        return jnp.mean(mlp(layers, jnp.asarray(wanted.x)).argmax(1) == 9)

    return task(
        f"a class in {percent:g} % of the batches only",
        start,
        loss,
        accuracy,
        rate=0.01,
        steps=2000 if percent <= 2 else 1000,  # 20 of its batches, or more
        unit="accuracy on that class",
        higher=True,
    )


def _second_source() -> Task:
    """A second task, in 3 % of the batches, whose gradients are 15 to 300 times as long."""
    _, test = pictures()

    def loss(layers: Params, now: Now) -> jax.Array:
        x, y = draw(now.key)
        logits = mlp(layers, x)
        size = jnp.exp(jax.random.uniform(jax.random.fold_in(now.key, 1)) * jnp.log(20.0))
        other = 15 * size * jnp.mean((logits.mean(1) - 3.0) ** 2)
        return jnp.where(now.batch % 33 == 32, other, cross_entropy(logits, y))

    def metric(layers: Params) -> jax.Array:
        """Both tasks: the classes are blind to the mean that the second one sets."""
        logits = mlp(layers, jnp.asarray(test.x))
        return cross_entropy(logits, jnp.asarray(test.y)) + jnp.mean((logits.mean(1) - 3.0) ** 2)

    return task(
        "a second task in 3 % of the batches, with gradients 15 to 300 times as long",
        start,
        loss,
        metric,
        rate=3e-3,
        optimizer=falling,
        unit="held-out loss of both",
    )
