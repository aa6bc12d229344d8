"""A loop as in PureJaxRL, scans in scans under vmap: two changed lines, marked."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lbw_optax
from lbw_optax.integrations.linen import GuardedTrainState

x = jax.random.normal(jax.random.key(0), (64, 8))
y = jnp.sin(x.sum(axis=-1, keepdims=True))
model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(1)])
tx = lbw_optax.lbw_guard(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.3)))


def train(seed):
    def minibatch(state, rows):
        def loss_fn(params):
            return jnp.mean((state.apply_fn(params, x[rows]) - y[rows]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss  # <-- value=loss

    def epoch(state, seed):
        rows = jax.random.permutation(seed, len(x)).reshape(4, 16)
        return jax.lax.scan(minibatch, state, rows)

    params = model.init(seed, x)
    state = GuardedTrainState.create(apply_fn=model.apply, params=params, tx=tx)  # <-- TrainState
    return jax.lax.scan(epoch, state, jax.random.split(seed, 50))


state, losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(1), 3))
one = jax.tree.map(lambda x: x[0], state)
print(f"loss {losses[0, -1].mean():.3f}.", lbw_optax.explain(one))
