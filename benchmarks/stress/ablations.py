"""The guard with a part of its law taken out, for the benchmark's table only."""

import jax
import jax.numpy as jnp
import optax

from lbw_optax.guard import DEFAULTS, govern
from lbw_optax.law import control
from lbw_optax.law.control import Alarm


def soft_start_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    """No feedback but the immediate cut of steps above 3 kappa: the scale grows at its pace."""
    return jnp.full_like(overshoot, -control.GROWTH / control.GAIN)


def overshoot_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    return overshoot


def step_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    return control.STEP_WEIGHT * log_step


def without_progress(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    """No credit, as in a run without a loss: overshoot always counts."""
    return control.alarm(overshoot, log_step, jnp.zeros_like(progress))


def guard_with(alarm: Alarm, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The guard around `inner`, judging by another alarm.

    >>> tx = guard_with(overshoot_alone, optax.sgd(0.1))
    >>> params = jnp.ones(3)
    >>> _, state = tx.update(params, tx.init(params), params, value=1.0)
    """
    return govern(inner, DEFAULTS, "govern", alarm)
