"""Flax linen: the guard inside a `TrainState`; a learning rate that is far too high."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import lbw_optax

x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sin(x.sum(axis=-1, keepdims=True))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.tanh(nn.Dense(64)(x)))


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    # `TrainState.apply_gradients` cannot pass the loss on, so its three lines stand here.
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss


model = Model()
params = model.init(jax.random.key(1), x)["params"]
tx = lbw_optax.lbw_guard(optax.adamw(10.0))
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
for step in range(300):
    state, loss = train_step(state, x, y)
    if step % 50 == 0:
        lbw_optax.check(state.opt_state)
scale = lbw_optax.metrics(state.opt_state)["scale"]
print(f"loss {loss:.3f}, scale {scale:.4f}")
