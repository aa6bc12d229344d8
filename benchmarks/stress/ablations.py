"""The guard with a part of its law taken out, for the benchmark's table only."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from lbw_optax import lbw_guard
from lbw_optax.law import control

Alarm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""As `lbw_optax.law.control.alarm`: of overshoot, log(r / kappa) and progress."""

FULL_LAW = control.alarm


def soft_start_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    """No feedback but the immediate cut of steps above 3 kappa: the scale grows at its pace."""
    return jnp.full_like(overshoot, -control.GROWTH / control.GAIN)


def overshoot_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    return overshoot


def step_alone(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    return control.STEP_WEIGHT * log_step


def without_progress(overshoot: jax.Array, log_step: jax.Array, progress: jax.Array) -> jax.Array:
    """No credit, as in a run without a loss: overshoot always counts."""
    return FULL_LAW(overshoot, log_step, jnp.zeros_like(progress))


def guard_with(alarm: Alarm, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The guard around `inner`, judging by another alarm while it is traced.

    >>> tx = guard_with(overshoot_alone, optax.sgd(0.1))
    >>> _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    """
    tx = lbw_guard(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        with mock.patch.object(control, "alarm", alarm):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)
