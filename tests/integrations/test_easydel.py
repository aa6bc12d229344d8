"""EasyDeL: the guard in its train state, which passes no loss."""

import jax
import jax.numpy as jnp
import loops
import pytest

# EasyDeL asks XLA for options that the newest one does not know, and ends for. XLA reads them when
# it starts, so it starts before.
jax.devices()
base_state = loops.needs("easydel.infra.base_state", "easydel")
from flax import nnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of a loss that is not given, and its own


class Model(nnx.Module):
    def __init__(self):
        for name, x in loops.first_params().items():
            setattr(self, name, nnx.Param(jnp.asarray(x)))


def test_same_decisions_as_a_plain_loop_without_a_loss():
    graphdef, params, others = nnx.split(Model(), nnx.Param, ...)
    state = base_state.EasyDeLState.create(
        graphdef=graphdef,
        graphstate=params,
        graphother=others,
        tx=loops.optimizer(),
        init_opt_state=True,
    )

    @jax.jit
    def step(state, batch):
        grads = jax.tree.map(lambda p: p, state.graphstate)
        nnx.replace_by_pure_dict(grads, loops.gradients(batch))
        return state.apply_gradients(grads=grads)

    for batch in loops.batches():
        state = step(state, batch)
    loops.assert_same_decisions(state.opt_state, with_loss=False)
