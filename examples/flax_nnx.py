"""Flax NNX: the guard inside `nnx.Optimizer`; a learning rate that is far too high."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lbw_optax

x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sin(x.sum(axis=-1, keepdims=True))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.tanh(self.hidden(x)))


def loss_fn(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, value=loss)  # the loss goes through to the guard
    return loss


model = Model(nnx.Rngs(0))
tx = lbw_optax.lbw_guard(optax.adamw(10.0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
for step in range(300):
    loss = train_step(model, optimizer, x, y)
    if step % 50 == 0:
        lbw_optax.check(optimizer.opt_state)
scale = lbw_optax.metrics(optimizer.opt_state)["scale"]
print(f"loss {loss:.3f}, scale {scale:.4f}")
