"""Levanter: its optimizer config, guarded, in its own trainer state."""

import jax
import jax.numpy as jnp
import loops

config = loops.needs("levanter.optim.config", "marin-levanter")
trainer_state = loops.needs("levanter.trainer_state", "marin-levanter")
import equinox as eqx  # noqa: E402
import jmp  # noqa: E402

from lbw_optax import metrics  # noqa: E402
from lbw_optax.integrations.levanter import guarded  # noqa: E402


class Model(eqx.Module):
    bias: jax.Array
    kernel: jax.Array


def trained(tx):
    model = Model(**jax.tree.map(jnp.asarray, loops.first_params()))
    state = trainer_state.TrainerState.init(
        tx, model, key=jax.random.key(0), is_trainable=True, mp=jmp.get_policy("f32")
    )

    @eqx.filter_jit
    def step(state, batch):
        grads = Model(**loops.gradients(batch))
        return state.take_step(grads, loss=batch["loss"], key=state.training_key)[0]

    for batch in loops.batches():
        state = step(state, jax.tree.map(jnp.asarray, batch))
    return state


def test_same_decisions_as_a_plain_loop():
    loops.assert_same_decisions(trained(loops.optimizer()).opt_state)


def test_the_config_of_an_optimizer_is_guarded():
    made = guarded(config.AdamConfig, max_skips=3)(learning_rate=0.02, beta2=0.99)
    assert (made.learning_rate, made.beta2) == (0.02, 0.99)
    assert isinstance(made, config.AdamConfig)
    assert config.OptimizerConfig.get_choice_name(type(made)) == "guarded_adam"
    assert int(metrics(trained(made.build(100)).opt_state)["skips"]) == 2
