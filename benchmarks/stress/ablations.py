"""The guard with a part of its law taken out, for the benchmark's table only."""

import jax
import jax.numpy as jnp
import optax

from lbw_optax.guard import DEFAULTS, govern
from lbw_optax.law.control import RULES, Rules


def _always_grow(overshoot: jax.Array) -> jax.Array:
    return jnp.full_like(overshoot, -1.0)


def _no_ceiling(age: jax.Array, cosine: jax.Array) -> jax.Array:
    return jnp.full_like(age, 100.0, jnp.float32)


SOFT_START_ALONE = Rules(_always_grow, _no_ceiling)
CEILING_ALONE = RULES._replace(alarm=_always_grow)
OVERSHOOT_ALONE = RULES._replace(log_ceiling=_no_ceiling)


def guard_with(rules: Rules, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The guard around `inner`, with other equations for its scale.

    >>> tx = guard_with(OVERSHOOT_ALONE, optax.sgd(0.1))
    >>> params = jnp.ones(3)
    >>> _, state = tx.update(params, tx.init(params), params, value=1.0)
    """
    return govern(inner, DEFAULTS, "govern", rules)
