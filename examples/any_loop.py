"""Three calls around any loop: logs, alerts, orders from a terminal, rollback and resume."""

import logging
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

import lbw_optax
from lbw_optax.callback import TrainGuard

x, target = jax.random.normal(jax.random.key(0), (2, 64, 64))
tx = lbw_optax.adamw(1e-2)  # the one line of the optimizer; the rest is your loop


@jax.jit
def train_step(state: Any, x: jax.Array) -> Any:
    def loss_fn(w: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x @ target)) ** 2)

    w, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(w)
    updates, opt_state = tx.update(grads, opt_state, w, value=loss)
    return w + updates, opt_state


def batch(index: int) -> jax.Array:
    return x * jnp.nan if index == 30 else jnp.roll(x, index, axis=0)  # one bad batch


def page_somebody(alert: Any) -> None:  # or lbw_optax.exporters.Webhook(url)
    print(f"{alert.level}: {alert.sentence}")


logging.basicConfig()
logging.getLogger("lbw_optax").setLevel(logging.INFO)  # what the guard does and why, in sentences
fault = {60}
w = 0.1 * jax.random.normal(jax.random.key(1), (64, 64))
with TrainGuard(tempfile.mkdtemp(), rollback=True, on_event=page_somebody) as guard:
    step, state = guard.on_restore(0, (w, tx.init(w)))  # after a kill: where the run was
    while step < 100:
        state = train_step(state, batch(guard.data_step(step)))
        if step in fault:  # a flipped bit in memory, say
            fault.discard(step)
            state = (state[0].at[3, 5].set(jnp.nan), state[1])
        step, state = guard.on_step(step + 1, state)
    healthy = guard.on_save(step, state)
finite = bool(jnp.isfinite(state[0]).all())
print(f"step {step}, healthy: {healthy}, parameters finite: {finite}")
