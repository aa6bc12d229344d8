"""What a run with a fault is judged by, from what was seen of it step by step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lbw_optax import REGIMES

SURVIVED = 1.05
"""A run has survived if its final loss is at most this many times that without the fault."""
RECOVERED, WINDOW = 1.01, 10
"""It has recovered when the mean loss of so many steps is at most this many times the clean one."""


class Trace(NamedTuple):
    """A run by its clock: all steps that were done, those done again after a rollback too.

    Arrays with one entry a step.
    """

    step: Any  # int, which training step it was
    loss: Any  # held-out loss after it
    still: Any  # bool: no parameter moved
    nonfinite: Any  # bool: in parameters or optimizer state, after it
    guard: dict[str, Any]  # metrics, {} without a guard


def survived(final: float, clean: float) -> bool:
    """Not so if the final loss is not a number.

    >>> survived(4.1, 4.0), survived(4.3, 4.0), survived(float("nan"), 4.0)
    (True, False, False)
    """
    return bool(final <= SURVIVED * clean)


def ratio(trace: Trace, clean: np.ndarray, at: int, extra: int) -> np.ndarray:
    """Loss over that of the clean run at the same step; `extra` steps from `at` on do not count."""
    same = trace.step - np.clip(trace.step - at, 0, extra)
    with np.errstate(over="ignore"):
        return trace.loss / clean[same]


def recovery(over_clean: np.ndarray, still: np.ndarray, at: int) -> int | None:
    """Steps from the fault to the first from which on all is as without it; None if never.

    From there on, for `WINDOW` steps (at the end: for those left), the parameters move in every
    step and the mean of the loss over the clean one is within `RECOVERED`.

    >>> moving = np.zeros(24, bool)
    >>> recovery(np.array([1.0, 1.0, 1.5, 1.2, *[1.005] * 20]), moving, at=2)
    2
    >>> recovery(np.ones(24), moving, at=2)
    0
    """
    for start in range(at, len(over_clean) - WINDOW // 2):
        stretch = slice(start, start + WINDOW)
        healthy = over_clean[start] <= RECOVERED and over_clean[stretch].mean() <= RECOVERED
        if healthy and not still[stretch].any():
            return start - at
    return None


def lost_steps(trace: Trace) -> int:
    """Steps done in vain: those in which nothing moved, and those that a rollback undid.

    >>> step, still = np.array([0, 1, 2, 1, 2, 3]), np.array([0, 0, 0, 0, 1, 0], bool)
    >>> lost_steps(Trace(step, step, still, still, {}))
    3
    """
    last = {int(step): not still for step, still in zip(trace.step, trace.still, strict=True)}
    return len(trace.step) - sum(last.values())


def distances(trace: Trace) -> list[int]:
    """How far each rollback went, in steps.

    >>> distances(Trace(np.array([0, 1, 2, 1, 2]), *[np.zeros(5)] * 3, {}))
    [2]
    """
    back = trace.step[:-1] + 1 - trace.step[1:]
    return [int(steps) for steps in back if steps > 0]


def interventions(trace: Trace) -> int:
    """Skips, cuts, holds and rollbacks; of a method that is no guard, the steps it left out."""
    if not trace.guard:
        return int(trace.still.sum())
    reported = np.diff(trace.guard["events"], prepend=0) > 0
    good = trace.guard["regime"] == REGIMES.index("recovering")
    return int((reported & ~good).sum()) + len(distances(trace))


def judge(
    trace: Trace,
    clean: np.ndarray,
    final: float,
    clean_final: float,
    strikes: Sequence[int],
    extra: int = 0,
) -> dict[str, Any]:
    """All measures of one run; `strikes` are the first steps of its faults."""
    first = min(strikes, default=0)
    over_clean = ratio(trace, clean, first, extra)
    return {
        "ratio": round(final / clean_final, 5),
        "survived": survived(final, clean_final),
        "nonfinite": bool(trace.nonfinite.any()),
        "recovery": [recovery(over_clean, trace.still, at) for at in strikes],
        "lost": lost_steps(trace),
        "steps_done": int(trace.step[-1]) + 1,
        "interventions": interventions(trace),
        "rollbacks": distances(trace),
        "exhausted": bool(trace.guard and trace.guard["exhausted"][-1]),
        "curve": [round(float(x), 3) if np.isfinite(x) else None for x in over_clean[::5]],
    }
