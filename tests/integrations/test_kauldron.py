"""Kauldron: `GuardedTrainStep` in its own jitted step."""

import dataclasses

import jax
import jax.numpy as jnp
import loops

train_step = loops.needs("kauldron.train.train_step", "kauldron")
losses = loops.needs("kauldron.losses", "kauldron")
kontext = loops.needs("kauldron.kontext", "kauldron")
import flax.linen as nn  # noqa: E402
from kauldron.train import auxiliaries, rngs_lib  # noqa: E402
from kauldron.utils.sharding_utils import sharding  # noqa: E402

from lbw_optax.integrations.kauldron import GuardedTrainStep  # noqa: E402


class Model(nn.Module):
    """Its output is the loss of `loops.given`."""

    batch: kontext.Key = "batch"

    @nn.compact
    def __call__(self, batch):
        params = {
            name: self.param(name, lambda _, x=x: jnp.asarray(x))
            for name, x in loops.first_params().items()
        }
        return loops.given(params, batch)


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class AsItIs(losses.Loss):
    preds: kontext.Key = "preds"

    def get_values(self, preds):
        return preds[None]


def test_same_decisions_as_a_plain_loop():
    step = GuardedTrainStep(
        model=Model(),
        optimizer=loops.optimizer(),
        rng_streams=rngs_lib.RngStreams([], seed=0),
        sharding=sharding.ShardingStrategy(),
        init_transform=None,
        aux=auxiliaries.Auxiliaries(losses={"loss": AsItIs()}, metrics={}, summaries={}),
    )
    params = jax.tree.map(jnp.asarray, loops.first_params())
    state = train_step.TrainState(
        step=jnp.asarray(0), params=params, collections={}, opt_state=step.optimizer.init(params)
    )
    for batch in loops.batches():
        state, _ = step.step(state, jax.tree.map(jnp.asarray, batch), return_losses=True)
    loops.assert_same_decisions(state.opt_state)
    assert int(state.step) == loops.STEPS
