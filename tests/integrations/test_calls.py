"""How frameworks call `update`, where Optax alone is installed."""

import jax
import jax.numpy as jnp
import loops
import optax
import pytest

CALLS = {
    "easydel": lambda tx, g, s, p, loss: tx.update(updates=g, state=s, params=p),
    "levanter": lambda tx, g, s, p, loss: tx.update(g, s, params=p, obj_fn=None, loss=loss),
    "maxtext": lambda tx, g, s, p, loss: tx.update(g, s, p, loss=loss, grad_norm=loss),
}


@pytest.mark.filterwarnings("ignore:lbw_guard is given no loss")
@pytest.mark.parametrize("name", CALLS)
def test_same_decisions_as_a_plain_loop(name):
    tx, params = loops.optimizer(), jax.tree.map(jnp.asarray, loops.first_params())
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = CALLS[name](tx, loops.gradients(batch), state, params, batch["loss"])
        return optax.apply_updates(params, updates), state

    for batch in loops.batches():
        params, state = step(params, state, batch)
    loops.assert_same_decisions(state, with_loss=name != "easydel")
