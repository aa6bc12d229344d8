"""What divergence is: one definition, for the classifier, its benchmark and their tests.

This reads the log of a run that is over, with NumPy; what a running guard goes by is in
:mod:`lbw_optax.law.divergence`.
"""

from typing import NamedTuple

import numpy as np

# The level of a loss is the median of the newest entries, so many of them.
LEVEL = 5
# It has risen by so many standard deviations of its noise,
STDS = 6.0
# and is there for so many entries, or to the end of the log, and then for so many at least.
STAYS, LEAST = 20, 2
# Of the first entries nothing is said: there is no level yet that the loss could leave.
FIRST = 5


class Divergence(NamedTuple):
    """Entries of a log, from 0.

    Attributes:
      begins: the first entry at which the level is up for good.
      stands: the entry at which that is known: this is when the run has diverged.
    """

    begins: int
    stands: int


def divergence(loss: np.ndarray, rollbacks: np.ndarray | None = None) -> Divergence | None:
    r"""When a run diverged, or None if it did not.

    A run has diverged when its loss is not finite, when it was rolled back, or when the level of
    its loss has been too high for twenty entries. With m_t the median of the five newest entries,
    the level is too high from t on if

    .. math::
      \min(m_t, \dots, m_{t+19}) > \max\big(\bar m_t,\ m^*_t + 6 \sigma_t\big), \qquad
      \bar m_t = \tfrac1t \sum_{i < t} m_i, \qquad m^*_t = \min_{i < t} m_i,

    so that more is lost than the run has won on average, and no noise explains it. σ is 1.05 times
    the median of |y_i - y_{i-1}| so far, the standard deviation of noise that is independent from
    entry to entry. A log that ends before twenty entries have passed needs two. Nothing is asked of
    the first five entries. The unit of the loss does not matter, nor what is added to it.

    Args:
      loss: float[n], an entry a step or every so many steps, none missing.
      rollbacks: bool[n], where one was made.

    Raises:
      ValueError: if the loss has more than one dimension, or none.

    Example:
      >>> import numpy as np
      >>> falling = 3 * 0.99 ** np.arange(200.0)
      >>> divergence(falling) is None
      True
      >>> divergence(np.append(falling, 3 * np.ones(50)))
      Divergence(begins=202, stands=221)
    """
    loss = np.asarray(loss, np.float64)
    if loss.ndim != 1:
        raise ValueError(f"The loss of one run is wanted, float[n], and it has shape {loss.shape}.")
    broken = _first(~np.isfinite(loss))
    found = [_rise(loss if broken is None else loss[:broken])]
    sudden = [broken, None if rollbacks is None else _first(np.asarray(rollbacks, bool))]
    found += [Divergence(at, at) for at in sudden if at is not None]
    return min((x for x in found if x is not None), key=lambda x: x.stands, default=None)


def _first(hits: np.ndarray) -> int | None:
    return int(hits.argmax()) if hits.any() else None


def _rise(loss: np.ndarray) -> Divergence | None:
    if len(loss) < FIRST + LEAST:
        return None
    level = _level(loss)
    mean = np.cumsum(level)[:-1] / np.arange(1, len(level))
    best = np.minimum.accumulate(level)[:-1]
    noise = 1.4826 / np.sqrt(2) * _median_so_far(np.abs(np.diff(loss)))
    limit = np.maximum(mean, best + STDS * noise) + np.finfo(np.float32).eps * np.abs(best)
    above = _least_ahead(level)[1:] > limit
    above[: FIRST - 1] = False
    above[len(above) - LEAST + 1 :] = False
    at = _first(above)
    return None if at is None else Divergence(at + 1, min(at + STAYS, len(loss) - 1))


def _level(loss: np.ndarray) -> np.ndarray:
    """The median of the newest five; of the first ones, of as many as there are."""
    first = np.array([np.median(loss[: i + 1]) for i in range(LEVEL - 1)])
    windows = np.lib.stride_tricks.sliding_window_view(loss, LEVEL) if len(loss) >= LEVEL else None
    whole = np.concatenate([first, np.median(windows, axis=1)]) if windows is not None else first
    return whole[: len(loss)]


def _least_ahead(level: np.ndarray) -> np.ndarray:
    """The least of the next `STAYS`, or of what is left."""
    padded = np.append(level, np.full(STAYS - 1, np.inf))
    return np.lib.stride_tricks.sliding_window_view(padded, STAYS).min(axis=1)


def _median_so_far(x: np.ndarray) -> np.ndarray:
    """Of the entries up to each one: exact for the first hundred, then every hundredth anew."""
    ends = np.unique(np.append(np.arange(1, min(len(x), 100) + 1), np.arange(100, len(x) + 1, 100)))
    medians = np.array([np.median(x[:end]) for end in ends])
    return medians[np.searchsorted(ends, np.arange(1, len(x) + 1), side="right") - 1]
