"""Tunix: `PeftTrainer` with all parameters and with LoRA, accumulation, and a resumed run."""

import jax
import jax.numpy as jnp
import loops
import numpy as np
import optax
import pytest

peft_trainer = loops.needs("tunix.sft.peft_trainer", "google-tunix")
from flax import nnx  # noqa: E402

from lbw_optax import lbw_guard, metrics  # noqa: E402
from lbw_optax.integrations.tunix import GuardedPeftTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own


class Model(nnx.Module):
    """The loss of `loops.given`, of a layer or of an adapter on it."""

    def __init__(self, lora: bool):
        kind = nnx.LoRAParam if lora else nnx.Param
        for name, x in loops.first_params().items():
            setattr(self, name, kind(jnp.asarray(x)))
        if lora:
            self.frozen = nnx.Param(jnp.ones(3))


def loss_of(model, bias, kernel, loss):
    params = {name: getattr(model, name)[...] for name in ("bias", "kernel")}
    return loops.given(params, {"bias": bias, "kernel": kernel, "loss": loss})


def trainer(tx, lora=False, **config):
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, **config)
    return GuardedPeftTrainer(Model(lora), tx, config).with_loss_fn(loss_of)


def batches(first=0):
    """As a data loader gives them: NumPy arrays with a leading axis."""
    return loops.batches()[first:]


@pytest.mark.parametrize("lora", [False, True])
def test_same_decisions_as_a_plain_loop(lora):
    run = trainer(loops.optimizer(), lora)
    run.train(batches())
    loops.assert_same_decisions(run.optimizer.opt_state)


def test_a_resumed_run_is_the_same_run(tmp_path):
    half = loops.STEPS // 2
    for last in (half, loops.STEPS):
        run = trainer(loops.optimizer(), checkpoint_root_directory=str(tmp_path), max_steps=last)
        run.train(batches())
        run.close()
    loops.assert_same_decisions(run.optimizer.opt_state)


def test_a_bad_batch_costs_that_batch_alone_where_gradients_are_accumulated():
    run = trainer(lbw_guard(optax.MultiSteps(optax.adamw(1e-2), 4)))
    run.train(batches())
    state = run.optimizer.opt_state
    assert int(metrics(state)["skips"]) == 2
    assert int(state.inner_state.gradient_step[...]) == (loops.STEPS - 2) // 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(run.model)))


def test_the_accumulation_that_keeps_a_nan_is_refused():
    with pytest.raises(ValueError, match=r"lbw_guard\(optax.MultiSteps\(optimizer, 4\)\)"):
        trainer(loops.optimizer(), gradient_accumulation_steps=4)
