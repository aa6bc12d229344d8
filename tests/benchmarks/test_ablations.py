"""A law with a part taken out differs from the whole just there, and leaves the whole as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbw_optax
from benchmarks import ablations
from lbw_optax import control


def last_scale(tx, steps=120):
    """The scale after so many steps of a fifth of the parameters' length or more."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value=jnp.sum(params**2) / 2)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.arange(1.0, 17.0)
    (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return float(lbw_optax.metrics(state)["scale"])


@pytest.mark.parametrize(
    ("alarm", "at_full_rate"),
    [
        (ablations.FULL_LAW, False),
        (ablations.soft_start_alone, True),
        (ablations.step_alone, False),
    ],
)
def test_only_feedback_keeps_the_scale_down(alarm, at_full_rate):
    tx = ablations.guard_with(alarm, optax.chain(optax.scale_by_sign(), optax.sgd(2.0)))
    assert (last_scale(tx) == 1) == at_full_rate
    assert control.alarm is ablations.FULL_LAW


@pytest.mark.parametrize(
    ("alarm", "expected"),
    [
        (ablations.overshoot_alone, 2.0),
        (ablations.step_alone, -4.0),
        (ablations.without_progress, -2.0),
    ],
)
def test_alarms(alarm, expected):
    """z = 2, r = kappa / e, no progress; the whole law gives 2."""
    given = jnp.float32(2), jnp.float32(-1), jnp.float32(0)
    np.testing.assert_allclose(alarm(*given), expected)
    np.testing.assert_allclose(ablations.FULL_LAW(*given), 2.0)
