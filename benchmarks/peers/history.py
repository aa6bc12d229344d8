"""The last values of a scalar, for the rules that compare a step with its recent past."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class History(NamedTuple):
    values: jax.Array  # shape (window,), a ring
    seen: jax.Array


def empty(window: int) -> History:
    return History(jnp.zeros(window), jnp.zeros((), jnp.int32))


def push(history: History, value: jax.Array) -> History:
    slot = jnp.arange(history.values.size) == history.seen % history.values.size
    return History(jnp.where(slot, value, history.values), history.seen + 1)


def limit(history: History, sigmas: float) -> jax.Array:
    """Mean + sigmas · standard deviation; infinite until the ring is half full.

    Values that are not numbers are left out; the deviation is at least 1e-6.
    """
    window = history.values.size
    known = (jnp.arange(window) < history.seen) & ~jnp.isnan(history.values)
    mean = jnp.mean(history.values, where=known)
    deviation = jnp.std(history.values, where=known)
    enough = history.seen >= max(2, window // 2)
    return jnp.where(enough, mean + sigmas * jnp.maximum(deviation, 1e-6), jnp.inf)
