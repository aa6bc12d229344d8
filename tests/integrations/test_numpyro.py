"""NumPyro: `SVI` takes the guard as it is, and passes it the loss."""

import jax
import jax.numpy as jnp
import loops

numpyro = loops.needs("numpyro", "numpyro")
from numpyro.infer import SVI  # noqa: E402


class Given:
    """The loss of `loops.given`, where NumPyro has an ELBO."""

    def loss(self, rng_key, params, model, guide, batch):
        return loops.given(params, batch)


def model(batch):
    """Registers the parameters; its density is not used."""
    for name, x in loops.first_params().items():
        numpyro.param(name, jnp.asarray(x))


def test_same_decisions_as_a_plain_loop():
    svi = SVI(model, model, loops.optimizer(), Given())
    batches = loops.batches()
    state = svi.init(jax.random.key(0), batches[0])
    update = jax.jit(svi.update)
    for batch in batches:
        state, _ = update(state, batch)
    loops.assert_same_decisions(state.optim_state)
