"""Names inside a state of arrays, so that whoever reads a state needs nothing else to know them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def encoded(names: Sequence[str]) -> jax.Array:
    """uint8[names, longest], UTF-8.

    >>> from lbw_optax.names import decoded, encoded
    >>> decoded(encoded(["layers/3", "é"]))
    ['layers/3', 'é']
    """
    rows = [name.encode() for name in names]
    longest = max(map(len, rows), default=0)
    return jnp.asarray([list(row.ljust(longest, b"\0")) for row in rows], jnp.uint8)


def decoded(rows: jax.Array) -> list[str]:
    """The names, in their order. On the host."""
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(rows, np.uint8)]
