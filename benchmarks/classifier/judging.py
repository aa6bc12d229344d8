"""How good a score is: detection at a stated rate of false alarms, lead, ranking, calibration."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.classifier.examples import Examples, Runs

RATE = 10.0
"""False alarms in 100,000 healthy steps at which detection is compared."""
BEFORE = 50
"""An alarm belongs to a divergence from so many steps before it to its own step."""
CATCHABLE = 20
"""A run that diverges before this step was never sound: there is nothing to be told apart."""


class Judged(NamedTuple):
    threshold: float
    false_alarms: float  # steps in alarm, in 100,000 steps of healthy runs
    caught: float  # share of the divergences
    lead: float  # median steps from the first alarm to the divergence
    lead_to_rise: float  # and to the beginning of the rise; less than 0: after it
    divergences: int


def judge(sets: Sequence[tuple[Runs, np.ndarray]], threshold: float | None = None) -> Judged:
    """Of runs and their scores, at a threshold, or at the one with `RATE` false alarms."""
    healthy = np.concatenate([_known(s[~r.diverges])[r.given[~r.diverges]] for r, s in sets])
    if threshold is None:
        threshold = threshold_at(healthy, RATE)
    leads, rises = [], []
    for runs, scores in sets:
        fires = _known(scores) > threshold
        for run in np.flatnonzero(runs.diverges & (runs.ends >= CATCHABLE)):
            first, end = max(runs.ends[run] - BEFORE, 0), runs.ends[run]
            at = np.flatnonzero(fires[run, first : end + 1])
            leads.append(end - first - at[0] if len(at) else np.nan)
            rises.append(runs.begins[run] - first - at[0] if len(at) else np.nan)
    found, of_rise = np.array(leads or [np.nan]), np.array(rises or [np.nan])
    caught = np.isfinite(found)
    return Judged(
        float(threshold),
        1e5 * float((healthy > threshold).mean()) if len(healthy) else float("nan"),
        float(caught.mean()) if leads else float("nan"),
        float(np.median(found[caught])) if caught.any() else float("nan"),
        float(np.median(of_rise[caught])) if caught.any() else float("nan"),
        len(leads),
    )


def threshold_at(scores: np.ndarray, rate: float) -> float:
    """The lowest threshold that at most so many in 100,000 of these scores exceed.

    >>> threshold_at(np.arange(100_000), 10)
    99989.0
    """
    allowed = int(rate * len(scores) / 1e5)
    ordered = np.sort(scores)
    return float(ordered[-1 - allowed]) if len(ordered) else 0.0


def ranking(sets: Sequence[tuple[Examples, np.ndarray]], horizon: int) -> tuple[float, float]:
    """AUROC and average precision of "diverges within so many steps", over all steps asked."""
    scores, labels = _labelled(sets, horizon)
    return auroc(scores, labels), average_precision(scores, labels)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a positive and a negative that are in order; half for a tie.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    if labels.all() or not labels.any():
        return float("nan")
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    positives = labels.sum()
    total = rank[places][labels].sum() - positives * (positives + 1) / 2
    return float(total / (positives * (len(labels) - positives)))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean precision at each step of recall.

    >>> ap = average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1], bool))
    >>> round(ap, 4)
    0.8333
    """
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(labels[order])
    last = np.append(ordered[1:] != ordered[:-1], True)
    hits, ranks = hits[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / ranks) / labels.sum())


def calibration(
    sets: Sequence[tuple[Examples, np.ndarray]], horizon: int, bins: int = 10
) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error, and of each bin the mean probability, the share and the count."""
    scores, labels = _labelled(sets, horizon)
    place = np.minimum((scores * bins).astype(int), bins - 1)
    rows = [
        (
            float(scores[place == i].mean()),
            float(labels[place == i].mean()),
            int((place == i).sum()),
        )
        for i in range(bins)
        if (place == i).any()
    ]
    error = sum(n * abs(mean - share) for mean, share, n in rows) / len(scores)
    return float(error), rows


def _labelled(
    sets: Sequence[tuple[Examples, np.ndarray]], horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    scores = np.concatenate([_known(s)[x.asked] for x, s in sets])
    labels = np.concatenate([(x.until[x.asked] <= horizon) for x, _ in sets])
    return scores, labels


def _known(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scores), -np.inf, scores)
