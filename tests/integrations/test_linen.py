"""Flax linen: `GuardedTrainState`."""

import jax
import loops
import pytest

pytest.importorskip("flax", reason="needs flax: pip install --group test")

from lbw_optax.integrations.linen import GuardedTrainState


def test_same_decisions_as_a_plain_loop():
    state = GuardedTrainState.create(
        apply_fn=None, params=loops.first_params(), tx=loops.optimizer()
    )

    @jax.jit
    def step(state, batch):
        value, grads = jax.value_and_grad(loops.given)(state.params, batch)
        return state.apply_gradients(grads=grads, value=value)

    for batch in loops.batches():
        state = step(state, batch)
    loops.assert_same_decisions(state)
    assert int(state.step) == loops.STEPS
    assert step._cache_size() <= 2
