"""A law with a part taken out differs from the whole just there, and leaves the whole as it was."""

import jax
import jax.numpy as jnp
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
    ("rules", "at_full_rate"),
    [
        (control.RULES, False),
        (ablations.SOFT_START_ALONE, True),
        (ablations.OVERSHOOT_ALONE, False),
        (ablations.CEILING_ALONE, False),
    ],
)
def test_only_feedback_keeps_the_scale_down(rules, at_full_rate):
    """At the full rate each step is as long as the parameters, to and fro."""
    tx = ablations.guard_with(rules, optax.sgd(1.0))
    assert (last_scale(tx) == 1) == at_full_rate
