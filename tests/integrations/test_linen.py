"""Flax linen: `GuardedTrainState`."""

import jax
import jax.numpy as jnp
import loops
import optax
import pytest

pytest.importorskip("flax", reason="needs flax: pip install --group test")

from flax.training.train_state import TrainState
from support import assert_same_bits

from lbw_optax.integrations.linen import GuardedTrainState
from lbw_optax.state import find_all


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


@pytest.mark.filterwarnings("ignore:lbw_guard is given no loss")
def test_without_a_loss_it_is_its_parent():
    state = GuardedTrainState.create(
        apply_fn=None, params=loops.first_params(), tx=loops.optimizer()
    )
    step = jax.jit(lambda state, batch: state.apply_gradients(grads=loops.gradients(batch)))
    for batch in loops.batches():
        state = step(state, batch)
    loops.assert_same_decisions(state, with_loss=False)


def test_a_loop_in_a_loop_over_several_seeds():
    """As PureJaxRL has it: `scan` over epochs and minibatches, `vmap` over seeds, a clip before."""
    tx = optax.chain(optax.clip_by_global_norm(1e9), loops.optimizer())
    batches = jax.tree.map(lambda *x: jnp.stack(x), *loops.batches())
    epochs = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batches)

    def minibatch(state, batch):
        value, grads = jax.value_and_grad(loops.given)(state.params, batch)
        return state.apply_gradients(grads=grads, value=value), value

    def train(params):
        state = GuardedTrainState.create(apply_fn=None, params=params, tx=tx)
        return jax.lax.scan(lambda s, b: jax.lax.scan(minibatch, s, b), state, epochs)[0]

    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), loops.first_params())
    states = jax.jit(jax.vmap(train))(params)
    assert find_all(states)[0].law.control.skips.tolist() == [2, 2]


def test_other_fields_are_replaced_and_the_optimizer_stays():
    tx = optax.sgd(0.1)  # takes no loss
    state = GuardedTrainState.create(apply_fn=None, params=loops.first_params(), tx=tx)
    grads = loops.gradients(loops.batches()[0])
    stepped = state.apply_gradients(grads=grads, value=jnp.float32(1), apply_fn=len)
    assert stepped.tx is tx
    assert stepped.apply_fn is len
    plain = TrainState.apply_gradients(state, grads=grads)
    assert_same_bits(stepped.params, plain.params)
