"""A network that solves a differential equation, with its loss in several units.

Adam does not care for the unit of a loss; whoever watches the loss must not care either.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.health.task import Now, Params, Task, digits, falling, mlp, mlp_start, task


def tasks() -> dict[str, Task]:
    units = {"pinn": 1.0, "pinn-1e-4": 1e-4, "pinn-1e3": 1e3, "pinn-1e6": 1e6}
    return {name: _pinn(unit) for name, unit in units.items()}


def solution(t: jax.typing.ArrayLike) -> jax.Array:
    """Of u' = −2 u + sin 3t with u(0) = 1: a part that swings, and one that dies away."""
    t = jnp.asarray(t, jnp.float32)
    return (2 * jnp.sin(3 * t) - 3 * jnp.cos(3 * t) + 16 * jnp.exp(-2 * t)) / 13


def _pinn(unit: float) -> Task:
    t = np.linspace(0, 2, 64, dtype=np.float32)
    exact = np.asarray(solution(t))

    def u(layers: Params, s: jax.Array) -> jax.Array:
        return mlp(layers, s.reshape(1, 1), jnp.tanh)[0, 0]

    def everywhere(layers: Params) -> jax.Array:
        return jax.vmap(lambda s: u(layers, s))(t)

    def loss(layers: Params, now: Now) -> jax.Array:
        slope = jax.vmap(jax.grad(u, 1), (None, 0))(layers, t)
        residual = slope + 2 * everywhere(layers) - jnp.sin(3 * t)
        return unit * (jnp.mean(residual**2) + (u(layers, jnp.float32(0)) - 1) ** 2)

    def error(layers: Params) -> jax.Array:
        return digits(jnp.mean((everywhere(layers) - exact) ** 2))

    times = "" if unit == 1 else f", its loss times {unit:g}"
    return task(
        f"a differential equation{times}",
        lambda key: mlp_start(key, 1, 32, 32, 1),
        loss,
        error,
        rate=3e-3,
        optimizer=falling,
        unit="digits of the solution",
        higher=True,
    )
