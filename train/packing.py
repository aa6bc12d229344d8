"""Rows in which documents lie end to end without seeing each other, and batches made ahead."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np

from train.corpora import DataError
from train.losses import Batch


def packed(
    tokens: np.ndarray, seed: int, step: int, *, batch_size: int, length: int, end: int
) -> Batch:
    """Draw a batch of packed rows: a pure function of its input.

    The stream of tokens is cut into rows of length + 1 that overlap by one token, so that each
    token is a target at most once an epoch; a document ends with the token `end`, and may be cut
    at the end of a row. Each epoch visits every row once, in an order given by (seed, epoch).
    Raises `DataError` for a stream shorter than one row.

    >>> batch = packed(np.array([5, 6, 0, 7, 8, 9, 0]), 0, 0, batch_size=1, length=6, end=0)
    >>> print(batch.tokens, batch.segments)
    [[5 6 0 7 8 9 0]] [[0 0 0 1 1 1 1]]
    """
    rows = (len(tokens) - 1) // length
    if rows < 1:
        raise DataError(
            f"{len(tokens)} tokens are too few for one sequence of {length}: "
            "give more text or a shorter sequence"
        )
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), rows)
    orders = [_order(seed, int(epoch), rows) for epoch in epochs]
    chosen = np.array([order[i] for order, i in zip(orders, places, strict=True)])
    cut = np.asarray(tokens[chosen[:, None] * length + np.arange(length + 1)], np.int32)
    return Batch(cut, segments(cut, end))


def segments(tokens: np.ndarray, end: int) -> np.ndarray:
    """The number of each token's document in its row, from 0; it grows after a token `end`."""
    begins = np.zeros(tokens.shape, np.int32)
    begins[:, 1:] = tokens[:, :-1] == end
    return np.cumsum(begins, axis=1, dtype=np.int32)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


class Prefetch:
    """``batch(index)`` on the device, made by a thread while the steps before it run.

    The next `ahead` indices are expected; any other is made when it is asked for, so that a run
    which jumps gets the batches of one which does not.

    >>> with Prefetch(lambda index: np.full(2, index)) as batch:
    ...     print(batch(0), batch(1), batch(7))
    [0 0] [1 1] [7 7]
    """

    def __init__(
        self,
        batch: Callable[[int], Any],
        put: Callable[[Any], Any] = jax.device_put,
        ahead: int = 2,
    ):
        self._make = lambda index: put(batch(index))
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._coming: dict[int, Future[Any]] = {}

    def __call__(self, index: int) -> Any:
        wanted = range(index, index + self._ahead + 1)
        known = self._coming
        self._coming = {
            i: known[i] if i in known else self._thread.submit(self._make, i) for i in wanted
        }
        return self._coming.pop(index).result()

    def close(self) -> None:
        """Stop the thread; batches that nobody asked for are dropped."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
