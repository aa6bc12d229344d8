"""What divergence is: one definition, for the classifier, its benchmark and their tests.

This looks at a run that is over, with NumPy, and may look ahead; what a running guard can know is in
:mod:`lbw_optax.law.divergence`.
"""

import numpy as np

# The level of a loss is the median of so many entries, half of them before and half after.
LEVEL = 9
# It has risen by so much of all that it had fallen, and by so many standard deviations of its noise.
SHARE, STDS = 0.25, 6.0
# And stays there for so many entries, or to the end of the log, and then for so many at least.
STAYS, LEAST = 20, 4
# Nothing is said of the first entries: there is no level that the loss could leave.
FIRST = 5


def diverges_at(loss: np.ndarray, rollbacks: np.ndarray | None = None) -> int | None:
    r"""The entry at which a run begins to diverge, or None if it does not.

    It is the first t, not among the first five, for which one of these holds: the loss is not
    finite; a rollback was made; or, with m the median of nine entries around each one,

    .. math::
      \min(m_t, \dots, m_{t+19}) > m^*_t + \max\big(\tfrac14 (m_0 - m^*_t)_+,\ 6 \sigma_t\big), \qquad
      m^*_t = \min_{i < t} m_i,

    where σ is 1.48 times the median of |y_i - m_i| so far. A log that ends before twenty entries
    have passed needs four. The unit of the loss does not matter, nor what is added to it.

    Args:
      loss: float[n], an entry a step or every so many steps; a missing one is left out before.
      rollbacks: bool[n], where one was made.

    Example:
      >>> import numpy as np
      >>> falling = 3 * 0.99 ** np.arange(200.0)
      >>> diverges_at(falling), diverges_at(np.append(falling, 3 * np.ones(50)))
      (None, 200)
    """
    loss = np.asarray(loss, np.float64)
    ends = [_first(~np.isfinite(loss)), _rises_at(loss)]
    if rollbacks is not None:
        ends.append(_first(np.asarray(rollbacks, bool)))
    found = [end for end in ends if end is not None]
    return max(min(found), FIRST) if found else None


def _first(hits: np.ndarray) -> int | None:
    return int(hits.argmax()) if hits.any() else None


def _rises_at(loss: np.ndarray) -> int | None:
    broken = _first(~np.isfinite(loss))
    loss = loss if broken is None else loss[:broken]
    if len(loss) < FIRST + LEAST:
        return None
    level = _level(loss)
    best = np.minimum.accumulate(level)[:-1]
    noise = 1.4826 * _median_so_far(np.abs(loss - level))[:-1]
    margin = np.maximum(SHARE * np.maximum(level[0] - best, 0.0), STDS * noise)
    stays = _least_ahead(level)[1:]
    above = stays > best + margin + np.finfo(np.float32).eps * np.abs(best)
    above[: FIRST - 1] = False
    above[len(above) - LEAST + 1 :] = False
    at = _first(above)
    # The median of nine sees a step of the loss where it is; the loss itself must be there, too.
    return None if at is None else at + 1


def _level(loss: np.ndarray) -> np.ndarray:
    half = LEVEL // 2
    padded = np.pad(loss, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, LEVEL), axis=1)


def _least_ahead(level: np.ndarray) -> np.ndarray:
    """The least of the next `STAYS`, or of what is left."""
    padded = np.append(level, np.full(STAYS - 1, np.inf))
    return np.lib.stride_tricks.sliding_window_view(padded, STAYS).min(axis=1)


def _median_so_far(x: np.ndarray) -> np.ndarray:
    """Of the entries up to each one: exact for the first hundred, then every hundredth anew."""
    ends = np.unique(np.append(np.arange(1, min(len(x), 100) + 1), np.arange(100, len(x) + 1, 100)))
    medians = np.array([np.median(x[:end]) for end in ends])
    return medians[np.searchsorted(ends, np.arange(1, len(x) + 1), side="right") - 1]
