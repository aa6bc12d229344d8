"""Equinox: the guard above AdamW on the arrays of a module; a learning rate that is too high."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lbw_optax

x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sin(x.sum(axis=-1, keepdims=True))
tx = lbw_optax.lbw_guard(optax.adamw(10.0))


@eqx.filter_value_and_grad
def value_and_grad(model: eqx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def train_step(
    model: eqx.Module, opt_state: optax.OptState, x: jax.Array, y: jax.Array
) -> tuple[eqx.Module, optax.OptState, jax.Array]:
    loss, grads = value_and_grad(model, x, y)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return eqx.apply_updates(model, updates), opt_state, loss


model = eqx.nn.MLP(8, 1, width_size=64, depth=1, activation=jnp.tanh, key=jax.random.key(1))
opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
for step in range(300):
    model, opt_state, loss = train_step(model, opt_state, x, y)
    if step % 50 == 0:
        lbw_optax.check(opt_state)
scale = lbw_optax.metrics(opt_state)["scale"]
print(f"loss {loss:.3f}, scale {scale:.4f}")
