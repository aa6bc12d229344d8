"""A law with a part taken out differs from the whole just there, and leaves the whole as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbw_optax
from benchmarks.stress import ablations
from lbw_optax.law import control


def last_scale(tx, steps=80):
    """The scale after so many gradients that point to and fro."""

    def step(carry, k):
        params, state = carry
        grads = jnp.where(k % 2 == 0, jnp.ones(16), -jnp.ones(16))
        updates, state = tx.update(grads, state, params, value=jnp.float32(1))
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(16)
    (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return float(lbw_optax.metrics(state)["scale"])


@pytest.mark.parametrize(
    ("alarm", "at_full_rate"),
    [
        (control.alarm, False),
        (ablations.soft_start_alone, True),
        (ablations.step_alone, False),
    ],
)
def test_only_feedback_keeps_the_scale_down(alarm, at_full_rate):
    """At the full rate each step has the length of two kappa."""
    tx = ablations.guard_with(alarm, optax.sgd(2 * control.KAPPA))
    assert (last_scale(tx) == 1) == at_full_rate


@pytest.mark.parametrize(
    ("alarm", "expected"),
    [
        (ablations.overshoot_alone, 2.0),
        (ablations.step_alone, -4.0),
        (ablations.without_progress, 2.0),
    ],
)
def test_alarms(alarm, expected):
    """z = 2, r = kappa / e; progress of 8 is a credit of 5: the whole law gives 0 - 4."""
    given = jnp.float32(2), jnp.float32(-1), jnp.float32(8)
    np.testing.assert_allclose(alarm(*given), expected)
    np.testing.assert_allclose(control.alarm(*given), -4.0)
