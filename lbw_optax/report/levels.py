"""The level of a loss: where it was lowest, and since when it rises."""

import numpy as np

# The level of a loss, in words, is the median of this many entries.
LEVEL = 10
# A loss has come back when less than this share of its rise is left.
LEFT_OF_RISE = 0.1


def levels(loss: np.ndarray) -> np.ndarray:
    """The median of each stretch of `LEVEL` finite losses.

    >>> levels(np.r_[np.full(10, 3.0), np.nan, np.full(15, 2.0)]).tolist()
    [3.0, 2.0]
    """
    finite = loss[np.isfinite(loss)]
    whole = finite[: len(finite) // LEVEL * LEVEL].reshape(-1, LEVEL)
    return np.median(whole if len(whole) else finite[None], axis=1) if len(finite) else finite


def lowest_at(loss: np.ndarray) -> int | None:
    """The place of the last entry of the lowest level; None without a whole one.

    >>> lowest_at(np.repeat([3.0, 1.0, 2.0, 4.0], 10))
    19
    """
    places = np.flatnonzero(np.isfinite(loss))[LEVEL - 1 :: LEVEL]
    return int(places[levels(loss).argmin()]) if len(places) else None


def rises_from(at: int, step: np.ndarray, loss: np.ndarray) -> int:
    """The last step up to that one at which the loss was near its lowest level.

    >>> rises_from(40, np.arange(1, 41), np.repeat([3.0, 1.0, 2.0, 4.0], 10))
    20
    """
    before = np.isfinite(loss) & (step <= at)
    found, ends = levels(loss[before]), step[before][LEVEL - 1 :: LEVEL]
    if len(ends) < 2:
        return at
    low = found.min() + LEFT_OF_RISE * (found[-1] - found.min())
    return int(ends[np.flatnonzero(found <= low)[-1]])


def last_low(at: int, step: np.ndarray, loss: np.ndarray) -> int:
    """The step of the last single loss up to that one that was near the lowest level.

    Closer than `rises_from` where a loss rose just before that step and is far above since, as
    where a guard asks to go back: it is sure after four steps.

    >>> last_low(44, np.arange(1, 45), np.r_[np.full(40, 1.0), np.full(4, 3.0)])
    40
    """
    before = np.isfinite(loss) & (step <= at)
    loss, step = loss[before], step[before]
    if len(loss) <= LEVEL:
        return at
    low = levels(loss).min()
    near = loss <= low + LEFT_OF_RISE * max(float(np.median(loss[-4:])) - low, 0.0)
    return int(step[np.flatnonzero(near)[-1]]) if near.any() else at
