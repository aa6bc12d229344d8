"""Norms in float32, whatever the gradients' type."""

import jax
import jax.numpy as jnp
import optax


def norm(array: jax.Array) -> jax.Array:
    return jnp.linalg.norm(array.astype(jnp.float32).ravel())


def global_norm(tree: optax.Updates) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree)))
