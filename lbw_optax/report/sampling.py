"""Fewer points for a picture, with every extreme kept: a spike of one step must not vanish."""

import numpy as np


def extremes(x: np.ndarray, y: np.ndarray, low: float, high: float, buckets: int) -> np.ndarray:
    """Indices of the points to draw, in order: of each bucket along x the least and the largest y.

    Args:
      x: ascending.
      y: finite, of the same length.
      low: x at the left edge of the picture; `high` at the right one.
      buckets: of equal width between the two.

    >>> y = np.array([0.0, 1.0, 9.0, 1.0, 0.5, -3.0, 0.0, 0.0])
    >>> extremes(np.arange(8.0), y, 0.0, 8.0, 2).tolist()
    [0, 2, 4, 5]
    """
    if len(x) <= 2 * buckets:
        return np.arange(len(x))
    bucket = bucket_of(x, low, high, buckets)
    order = np.lexsort((y, bucket))  # by bucket, and by y in it
    edges = np.flatnonzero(np.diff(bucket[order])) + 1
    firsts, lasts = np.concatenate([[0], edges]), np.concatenate([edges - 1, [len(x) - 1]])
    return np.unique(np.concatenate([order[firsts], order[lasts]]))


def bucket_of(x: np.ndarray, low: float, high: float, buckets: int) -> np.ndarray:
    """The number of each x's bucket; those beyond the edges belong to the outermost."""
    share = (x - low) / max(high - low, 1e-300)
    return np.clip((share * buckets).astype(np.int64), 0, buckets - 1)


def smooth(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` neighbours, of fewer at the ends; finite y."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, len(y))
    return (total[high] - total[low]) / (high - low)


def runs_of(step: np.ndarray, names: np.ndarray) -> list[tuple[float, float, str]]:
    """Stretches of equal names: first step, the step at which the next begins, name."""
    if not len(names):
        return []
    starts = np.concatenate([[0], np.flatnonzero(names[1:] != names[:-1]) + 1])
    ends = [*step[starts[1:]], step[-1]]
    return [
        (float(step[i]), float(end), str(names[i])) for i, end in zip(starts, ends, strict=True)
    ]


def worst(x: np.ndarray, rank: np.ndarray, low: float, high: float, buckets: int) -> np.ndarray:
    """Indices, one a bucket along ascending x: the first of the highest rank."""
    if len(x) <= buckets:
        return np.arange(len(x))
    bucket = bucket_of(x, low, high, buckets)
    order = np.lexsort((-rank, bucket))
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(bucket[order])) + 1])
    return np.sort(order[firsts])
