"""Flax linen: two changed lines, marked, beside the imports."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from lbw_optax import explain, lbw_guard
from lbw_optax.integrations.linen import GuardedTrainState

x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sin(x.sum(axis=-1, keepdims=True))
model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(1)])
state = GuardedTrainState.create(  # <-- was TrainState.create
    apply_fn=model.apply, params=model.init(jax.random.key(1), x), tx=lbw_guard(optax.adamw(1.0))
)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn(params, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss  # <-- value=loss


for _ in range(100):
    state, loss = train_step(state, x, y)
print(f"loss {loss:.3f}.", explain(state))
