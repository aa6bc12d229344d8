"""The stable rank of what is trained, layer by layer: low where a few directions take over."""

from typing import Any

import jax
import jax.numpy as jnp

from lbw_optax import stable_rank
from lbw_optax.activations import natural

EVERY = 100
"""Steps: each matrix is read forty times, and its rank moves slowly."""


def of_layers(params: Any, *, scan: bool) -> jax.Array | None:
    """The least stable rank of the matrices of each layer, float32[layers]; None of no matrix.

    One small program for each shape, and never more than one layer's matrix copied at a time. It is
    dispatched and not waited for.

    Args:
      params: of a `train.model.Decoder`, all that is trained.
      scan: whether the layers are one stack.

    >>> wide = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    >>> print(of_layers({"layers": {0: wide, 1: {"kernel": jnp.ones((4, 4))}}}, scan=False))
    [4. 1.]
    """
    layers = params.get("layers", {})
    if scan:
        every = [_of_stack(x) for x in jax.tree.leaves(layers) if x.ndim > 2]
        return jnp.min(jnp.stack(every), axis=0) if every else None
    ordered = [layers[name] for name in sorted(layers, key=lambda name: natural(str(name)))]
    ranks = [[_of_one(x) for x in jax.tree.leaves(layer) if x.ndim > 1] for layer in ordered]
    return jnp.stack([jnp.min(jnp.stack(own)) for own in ranks]) if any(ranks) else None


_of_one = jax.jit(stable_rank)


@jax.jit
def _of_stack(x: jax.Array) -> jax.Array:
    return jax.lax.map(stable_rank, x)
