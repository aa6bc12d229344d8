"""Your own checkpoints, with Orbax: the guard's state is a part of the optimizer state."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from orbax.checkpoint import v1 as ocp

import lbw_optax

x, target = jax.random.normal(jax.random.key(0), (2, 64, 64))
tx = lbw_optax.lbw_guard(optax.adamw(10.0))


@jax.jit
def train_step(w: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    def loss_fn(w: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x @ target)) ** 2)

    value, grads = jax.value_and_grad(loss_fn)(w)
    updates, state = tx.update(grads, state, w, value=value)
    return optax.apply_updates(w, updates), state


w = 0.1 * jax.random.normal(jax.random.key(1), (64, 64))
state = tx.init(w)
for _ in range(50):
    w, state = train_step(w, state)
path = Path(tempfile.mkdtemp()) / "50"
ocp.save(path, {"w": w, "opt_state": state})

for _ in range(50):  # the run goes on
    w, state = train_step(w, state)

# Another process: make a state of the same kind, and load with its shapes, dtypes and shardings.
# Without them Orbax returns dicts, and the NamedTuples of the state are lost.
fresh = {"w": jnp.zeros_like(w), "opt_state": tx.init(w)}
loaded = ocp.load(path, jax.tree.map(ocp.arrays.to_shape_dtype_struct, fresh))
w_again, state_again = loaded["w"], loaded["opt_state"]
for _ in range(50):
    w_again, state_again = train_step(w_again, state_again)

same = all(
    bool((a == b).all())
    for a, b in zip(
        jax.tree.leaves((w, state)), jax.tree.leaves((w_again, state_again)), strict=True
    )
)
print(f"the same weights and the same state after 100 steps: {same}")
