"""NumPyro: one changed line, marked; NumPyro passes the loss itself."""

import jax
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, autoguide

from lbw_optax import explain, lbw_guard

x = jax.random.normal(jax.random.key(0), (64, 8))


def model(x, y):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ weights, 0.1), obs=y)


optimizer = lbw_guard(optax.adamw(5e-2))  # <-- was optax.adamw(5e-2)
svi = SVI(model, autoguide.AutoNormal(model), optimizer, Trace_ELBO())
run = svi.run(jax.random.key(1), 300, x, x.sum(axis=1), progress_bar=False)
print(f"loss {run.losses[-1]:.3f}.", explain(run.state.optim_state))
