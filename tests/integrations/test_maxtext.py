"""MaxText: its factory of optimizers, guarded, in its own train state and checkpoint layout."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import loops
import pytest

train_state = loops.needs("maxtext.common.train_state_nnx", "maxtext")
optimizers = loops.needs("maxtext.optimizers.optimizers", "maxtext")
from flax import nnx  # noqa: E402

from lbw_optax.integrations.maxtext import guarded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
CONFIG = SimpleNamespace(
    opt_type="adamw",
    adam_b1=0.9,
    adam_b2=0.999,
    adam_eps=1e-8,
    adam_eps_root=0.0,
    adam_weight_decay=1e-4,
    mu_dtype=None,
    adamw_mask=None,
    skip_step_on_spikes=True,
    skip_step_interval=128,
    skip_step_scaling_factor=6.0,
)


class Model(nnx.Module):
    def __init__(self):
        for name, x in loops.first_params().items():
            setattr(self, name, nnx.Param(jnp.asarray(x)))


def loss_of(model, batch):
    return loops.given({name: getattr(model, name)[...] for name in ("bias", "kernel")}, batch)


def trained(config=CONFIG):
    tx = guarded(optimizers.get_optimizer)(config, lambda step: 1e-2)
    model = Model()
    graphdef, state = nnx.split(
        train_state.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    )

    @jax.jit
    def step(state, batch):
        run = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(loss_of)(run.model, batch)
        if config.skip_step_on_spikes:  # as MaxText's train_step has it
            run.apply_gradients(grads, loss=loss, grad_norm=jnp.float32(1))
        else:
            run.apply_gradients(grads)
        return nnx.split(run)[1]

    for batch in loops.batches():
        state = step(state, batch)
    return graphdef, state


def test_same_decisions_as_a_plain_loop():
    graphdef, state = trained()
    loops.assert_same_decisions(nnx.merge(graphdef, state).optimizer.opt_state)


def test_without_its_setting_there_is_no_loss():
    graphdef, state = trained(SimpleNamespace(**{**vars(CONFIG), "skip_step_on_spikes": False}))
    loops.assert_same_decisions(nnx.merge(graphdef, state).optimizer.opt_state, with_loss=False)


def test_its_checkpoint_layout_and_back():
    _, state = trained()
    pure = nnx.to_pure_dict(state)
    again = train_state.from_linen_checkpoint_dict(train_state.to_linen_checkpoint_dict(pure))
    assert jax.tree.structure(again["optimizer"]) == jax.tree.structure(pure["optimizer"])
    loops.assert_same_decisions(again["optimizer"]["opt_state"])
