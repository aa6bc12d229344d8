"""Weights & Biases: the guard's metrics beside the loss, and its interventions as a table."""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
import wandb

import lbw_optax

x, target = jax.random.normal(jax.random.key(0), (2, 64, 64))
tx = lbw_optax.lbw_guard(optax.adamw(10.0))


@jax.jit
def train_step(
    w: jax.Array, state: Any, x: jax.Array
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    def loss_fn(w: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x @ target)) ** 2)

    value, grads = jax.value_and_grad(loss_fn)(w)
    updates, state = tx.update(grads, state, w, value=value)
    return optax.apply_updates(w, updates), state, lbw_optax.metrics(state)


w = 0.1 * jax.random.normal(jax.random.key(1), (64, 64))
state = tx.init(w)
seen: dict[int, lbw_optax.Event] = {}
# Offline: nothing leaves this machine until somebody calls `wandb sync` on the folder.
with wandb.init(project="lbw_optax", mode="offline", dir=tempfile.mkdtemp()) as run:
    for step in range(100):
        batch = x * jnp.nan if step == 42 else x  # a bad batch
        w, state, metrics = train_step(w, state, batch)
        if step % 10 == 0:  # reading waits for the device
            run.log({f"guard/{name}": float(x) for name, x in metrics.items()}, step=step)
            seen |= {event.number: event for event in lbw_optax.events(state)}
    rows = [list(event) for event in seen.values()]
    run.log({"guard/events": wandb.Table(columns=list(lbw_optax.Event._fields), data=rows)})
actions = ", ".join(f"{event.action} at {event.step}" for event in seen.values())
print(f"loss {metrics['loss']:.4f}; logged: {actions}")
