"""Published rules as scores of a run: the larger, the worse; each fires above its own threshold.

All read what was logged up to the step itself. A score is NaN where a rule says nothing yet.

Not here, for what they read is in no log: RMS_t of StableAdamW (arXiv 2304.13013), which needs the
second moments, and the kurtosis of activations.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.classifier.examples import Examples, Runs

WINDOW = 128
"""Of OLMo, Levanter, MaxText and llm.c."""
MEMORY, WARM = 0.97, 25
"""Of ZClip (arXiv 2504.02507): decay of its means, and the steps before it says anything."""


class Rule(NamedTuple):
    title: str
    score: Callable[[Runs, Examples], np.ndarray]
    threshold: float  # as published, or as the law has it


def window_z(x: np.ndarray, least: int) -> np.ndarray:
    """(x_t - m) / s over the last 128 values before t, once there are `least` of them.

    >>> steady = np.append(np.tile([0.0, 1.0], 64), 10.0)[None]
    >>> round(float(window_z(steady, 128)[0, -1]), 2)
    18.93
    """
    fine = np.isfinite(x)
    given = np.where(fine, np.clip(x, -1e18, 1e18), 0.0).astype(np.float64)
    sums = [_window(a) for a in (fine.astype(float), given, np.square(given))]
    count = np.maximum(sums[0], 1)
    mean = sums[1] / count
    variance = np.maximum(sums[2] / count - mean**2, 0.0) * count / np.maximum(count - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (given - mean) / np.sqrt(variance)
    z = np.where(fine, np.nan_to_num(z, nan=0.0), np.inf)
    return np.where(sums[0] >= least, z, np.nan)


def memory_z(x: np.ndarray) -> np.ndarray:
    """ZClip's z of a norm: over exponential means of it and of its variance, from step 25 on."""
    z = np.full(x.shape, np.nan)
    mean = np.where(np.isfinite(x[:, :WARM]), x[:, :WARM], 0.0).mean(1)
    variance = np.where(np.isfinite(x[:, :WARM]), x[:, :WARM], 0.0).var(1)
    for t in range(WARM, x.shape[1]):
        now = x[:, t]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            z[:, t] = np.where(np.isfinite(now), (now - mean) / np.sqrt(variance), np.inf)
        # What is an outlier enters as its threshold has it.
        kept = np.where(np.isfinite(now), np.minimum(now, mean + 2.5 * np.sqrt(variance)), mean)
        mean = MEMORY * mean + (1 - MEMORY) * kept
        variance = MEMORY * variance + (1 - MEMORY) * np.square(kept - mean)
    return z


def _window(x: np.ndarray) -> np.ndarray:
    total = np.cumsum(np.pad(x, [(0, 0), (1, 0)]), axis=1)
    before = total[:, :-1]
    start = np.pad(total, [(0, 0), (WINDOW, 0)])[:, : before.shape[1]]
    return before - start


def _nothing(runs: Runs) -> np.ndarray:
    return np.full(runs.logged.shape, np.nan)


RULES = {
    "window": Rule(
        "skip-step, μ + 6σ over 128 losses (OLMo, Levanter, MaxText)",
        lambda runs, _: window_z(runs.logged, 2),
        6.0,
    ),
    "llm.c": Rule(
        "z of the loss over a full window of 128 (llm.c)",
        lambda runs, _: window_z(runs.logged, WINDOW),
        3.0,
    ),
    "zclip": Rule(
        "ZClip, z of the gradient norm", lambda runs, _: memory_z(runs.seen["gradient_norm"]), 2.5
    ),
    "cusum": Rule("CUSUM of the loss, as the law has it", lambda _, x: x.excess, 6.999),
    "overshoot": Rule(
        "overshoot alone",
        lambda runs, x: x.overshoot if "overshoot" in runs.seen else _nothing(runs),
        2.0,
    ),
    "update-norm": Rule(
        "z of the update norm alone",
        lambda runs, _: (
            memory_z(runs.seen["update_norm"]) if "update_norm" in runs.seen else _nothing(runs)
        ),
        2.5,
    ),
}
