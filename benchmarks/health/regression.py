"""Least squares and other small problems with few parameters, many of which begin at zero."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.health.task import Now, Params, Task, at, digits, falling, task


def tasks() -> dict[str, Task]:
    return {
        "linear-zero": _linear("least squares, from zero", lambda key: jnp.zeros(10), rate=0.03),
        "linear-random": _linear(
            "least squares, from random", lambda key: jax.random.normal(key, (10,)), rate=0.03
        ),
        "linear-batches": _linear(
            "least squares in batches, from zero", lambda key: jnp.zeros(10), rate=0.03, size=32
        ),
        "linear-exact": _exact(),
        "two-parameters": _line(),
        "bias-only": _bias(),
        "far-target": _far(),
        "factors": _factors("matrix factors", 0.5, rate=0.03),
        "factors-small": _factors("matrix factors from nearly zero", 0.01, rate=0.03),
        "rosenbrock": _rosenbrock(),
    }


_RNG = np.random.default_rng(0)
# Columns of lengths from 1 to 1/32, so that the problem is ill-conditioned.
A = (_RNG.normal(size=(200, 10)) * np.logspace(0, -1.5, 10)).astype(np.float32)
W = (3 * _RNG.normal(size=10)).astype(np.float32)
B = A @ W + 0.5 * _RNG.normal(size=200).astype(np.float32)
LOW_RANK = (_RNG.normal(size=(40, 4)) @ _RNG.normal(size=(4, 30))).astype(np.float32)
TARGETS = (2 * _RNG.normal(size=50)).astype(np.float32)


def _linear(
    title: str, start: Callable[[jax.Array], Params], *, rate: float, size: int | None = None
) -> Task:
    def loss(w: Params, now: Now) -> jax.Array:
        if size is None:
            return jnp.mean((A @ w - B) ** 2)
        rows = jax.random.randint(now.key, (size,), 0, len(A))
        return jnp.mean((at(A, rows) @ w - at(B, rows)) ** 2)

    return task(title, start, loss, lambda w: jnp.mean((A @ w - B) ** 2), rate=rate)


def _exact() -> Task:
    """Without noise: the loss goes to zero."""

    def loss(w: Params) -> jax.Array:
        return jnp.mean((A @ (w - W)) ** 2)

    return task(
        "least squares without noise: the loss goes to 0",
        lambda key: jax.random.normal(key, (10,)),
        lambda w, now: loss(w),
        lambda w: digits(loss(w)),
        unit="digits",
        higher=True,
        rate=0.1,
        optimizer=falling,
    )


def _line() -> Task:
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    return _noisy(
        "a line, two parameters from zero",
        lambda key: jnp.zeros(2),
        lambda p: p[0] * x + p[1] - (3 * x + 7),
        noise=0.1,
        rate=0.1,
    )


def _bias() -> Task:
    return _noisy(
        "one bias under a frozen model, from zero",
        lambda key: jnp.zeros(50),
        lambda w: w - TARGETS,
        noise=0.5,
        rate=0.03,
    )


def _far() -> Task:
    """The parameters must grow to a thousand times their first size."""
    return _noisy(
        "a target a thousand times as far as the start is long",
        lambda key: 0.1 * jax.random.normal(key, (20,)),
        lambda w: w - 100,
        noise=1.0,
        rate=0.3,
    )


def _noisy(
    title: str,
    start: Callable[[jax.Array], Params],
    error: Callable[[Params], jax.Array],
    *,
    noise: float,
    rate: float,
) -> Task:
    """Mean square of errors that are known but for Gaussian noise, anew in every step."""

    def loss(p: Params, now: Now) -> jax.Array:
        exact = error(p)
        return jnp.mean((exact + noise * jax.random.normal(now.key, exact.shape)) ** 2)

    return task(title, start, loss, lambda p: jnp.mean(error(p) ** 2) + noise**2, rate=rate)


def _factors(title: str, size: float, *, rate: float) -> Task:
    def start(key: jax.Array) -> Params:
        one, other = jax.random.split(key)
        return {
            "a": size * jax.random.normal(one, (40, 4)),
            "b": size * jax.random.normal(other, (4, 30)),
        }

    def loss(p: Params) -> jax.Array:
        return jnp.mean((p["a"] @ p["b"] - LOW_RANK) ** 2)

    return task(
        title,
        start,
        lambda p, now: loss(p),
        lambda p: digits(loss(p)),
        unit="digits",
        higher=True,
        rate=rate,
        optimizer=falling,
    )


def _rosenbrock() -> Task:
    def loss(p: Params) -> jax.Array:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    return task(
        "Rosenbrock's valley",
        lambda key: jnp.array([-1.2, 1.0]) + 0.1 * jax.random.normal(key, (2,)),
        lambda p, now: loss(p),
        lambda p: digits(loss(p)),
        unit="digits",
        higher=True,
        rate=0.1,
        optimizer=falling,
    )
