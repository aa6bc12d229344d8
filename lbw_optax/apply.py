"""What a decision does to a pytree: it is scaled, or nothing of it is left."""

import jax
import jax.numpy as jnp

from lbw_optax.law.telemetry import wide_type
from lbw_optax.types import PyTree


def scaled(tree: PyTree, scale: jax.Array, skip: jax.Array) -> PyTree:
    """Each leaf times `scale`, in its own dtype; zeros where `skip`.

    Args:
      tree: gradients or updates. Leaves of integers are not scaled.
      scale: float32 scalar.
      skip: bool scalar; selects, so that a NaN does not survive a product with zero.
    """

    def act(x: jax.Array) -> jax.Array:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        if x.dtype == jax.dtypes.float0:  # what JAX gives for the gradient of an integer
            return x
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.where(skip, jnp.zeros_like(x), x)
        wide = wide_type(x.dtype)
        y = (x.astype(wide) * scale.astype(wide)).astype(x.dtype)
        y = jnp.where(scale == 1, x, y)  # arithmetic flushes subnormals on some devices
        # Adding -0.0 leaves every float as it is; adding 0.0 would turn -0.0 into 0.0.
        return jnp.where(skip, jnp.full_like(x, -0.0), y)

    return jax.tree.map(act, tree)


def either(first: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the bool scalar `first` is true, `b` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)
