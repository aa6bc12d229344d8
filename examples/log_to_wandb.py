"""Weights & Biases: the guard's metrics in groups, and its interventions as alerts and a table."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import wandb

import lbw_optax
from lbw_optax.exporters import grouped, wandb_alert

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
rows: list[dict[str, Any]] = []
# Offline: nothing leaves this machine until somebody calls `wandb sync` on the folder.
with wandb.init(project="lbw_optax", mode="offline", dir=tempfile.mkdtemp()) as run:
    tell = (wandb_alert, lambda alert: rows.append(alert.line))
    with lbw_optax.AuditLog(Path(run.dir) / "audit.jsonl", on_event=tell) as audit:
        for step in range(100):
            batch = x * jnp.nan if step == 42 else x  # a bad batch
            w, state, metrics = train_step(w, state, batch)
            if step % 10 == 9:  # reading waits for the device
                run.log(grouped(metrics), step=step)
                audit.record(step, state)
    columns = ["step", "action", "signal", "value", "scale_after"]
    table = [[row.get(name) for name in columns] for row in rows]
    run.log({"guard/events": wandb.Table(columns=columns, data=table)})
actions = ", ".join(f"{row['action']} at {row['step']}" for row in rows)
print(f"loss {metrics['loss']:.4f}; logged: {actions}")
