"""Add the guard in the middle of a run: Adam's moments stay, the guard starts anew."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import lbw_optax

x, target = jax.random.normal(jax.random.key(0), (2, 64, 64))


def loss_fn(w: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x @ target)) ** 2)


def train(tx: Any, w: jax.Array, state: Any, steps: int) -> tuple[jax.Array, Any, jax.Array]:
    update = jax.jit(optax.with_extra_args_support(tx).update)
    for _ in range(steps):
        value, grads = jax.value_and_grad(loss_fn)(w)
        updates, state = update(grads, state, w, value=value)
        w = optax.apply_updates(w, updates)
    return w, state, value


bare = optax.adamw(1e-2)
w = 0.1 * jax.random.normal(jax.random.key(1), (64, 64))
w, bare_state, before = train(bare, w, bare.init(w), steps=100)

# From here on the run is guarded, as after a restart from an old checkpoint.
tx = lbw_optax.lbw_guard(bare)
state = lbw_optax.adopt(tx.init(w), bare_state)
moment_kept = bool((optax.tree.get(state, "mu") == optax.tree.get(bare_state, "mu")).all())
w, state, after = train(tx, w, state, steps=100)

# And back: the state that the unguarded optimizer needs.
plain = lbw_optax.strip(state)
same_structure = jax.tree.structure(plain) == jax.tree.structure(bare_state)
print(f"loss {before:.4f}, then {after:.4f}; moments kept: {moment_kept}; back: {same_structure}")
