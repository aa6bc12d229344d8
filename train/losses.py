"""The next-token loss of a batch: its targets, and their cross-entropy whole or in chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

IGNORED = -1
"""A target with this value is padding: it has no loss and no weight."""


class Batch(NamedTuple):
    """What a step is given when it needs more than tokens; each array is (batch, length + 1).

    Attributes:
      tokens: int32 ids; `IGNORED` is padding.
      segments: int32, the same number for all tokens of a document. Tokens of different
        documents do not see one another, and none is the target of another document's.
      positions: int32 for the rotary embedding. None: from 0 on in every document.
      step: uint32 scalar. With it dropout is on, and a pure function of it; None: it is off.
    """

    tokens: Any
    segments: Any = None
    positions: Any = None
    step: Any = None


def targets(batch: Any) -> Any:
    """What the loss counts: (batch, length) ids, `IGNORED` where there is nothing to predict.

    `batch` is a `Batch` or the tokens alone, of NumPy or of JAX.

    >>> import numpy as np
    >>> targets(Batch(np.array([[5, 6, 7, 8]]), np.array([[1, 1, 2, 2]]))).tolist()
    [[6, -1, 8]]
    """
    batch = batch if isinstance(batch, Batch) else Batch(batch)
    tokens, segments = batch.tokens, batch.segments
    if segments is None:
        return tokens[:, 1:]
    same = segments[:, 1:] == segments[:, :-1]
    return tokens[:, 1:] * same + IGNORED * ~same


def cross_entropy(logits: jax.Array, targets: jax.Array, z_loss: float = 0.0) -> jax.Array:
    """Mean of ``logsumexp(logits) - logits[target]`` over targets that are not `IGNORED`.

    `z_loss` adds so many times ``logsumexp(logits)^2``, which keeps the normaliser near 1.
    Source of the z-loss: PaLM, arXiv 2204.02311.
    """
    counted = targets != IGNORED
    return _sum(logits, targets, z_loss) / jnp.maximum(counted.sum(), 1)


def chunked_cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> jax.Array:
    """`cross_entropy` without ever holding the logits of a whole batch, in either direction.

    Takes `chunk` positions of every sequence at a time, and computes their logits again for the
    gradient. The batch axis stays whole, so it may be sharded.

    Args:
      logits: from rows, (n, hidden) to (n, vocabulary).
      hidden: (batch, length, hidden).
      targets: (batch, length).
      chunk: positions at a time; batch * chunk * vocabulary floats are held.
      z_loss: as in `cross_entropy`.

    Raises:
      ValueError: for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: the loss takes at least one position at a time")

    @jax.checkpoint
    def add(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, wanted = piece[0].reshape(-1, hidden.shape[-1]), piece[1].reshape(-1)
        return total + _sum(logits(rows), wanted, z_loss), None

    pieces = _pieces(hidden, chunk, 0), _pieces(targets, chunk, IGNORED)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)
    return total / jnp.maximum((targets != IGNORED).sum(), 1)


def _sum(logits: jax.Array, targets: jax.Array, z_loss: float) -> jax.Array:
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - picked
    if z_loss:
        losses += z_loss * normaliser**2
    return jnp.where(targets != IGNORED, losses, 0.0).sum()


def _pieces(x: jax.Array, chunk: int, fill: int) -> jax.Array:
    """(batch, length, ...) to (pieces, batch, chunk, ...), filled up at the end."""
    batch, length, *rest = x.shape
    pieces = -(-length // chunk)
    padding = [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * len(rest)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(batch, pieces, chunk, *rest).swapaxes(0, 1)
