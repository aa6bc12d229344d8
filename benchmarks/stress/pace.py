"""How soon a run is as good as another one is in the end."""

import math
from collections.abc import Sequence

Curve = Sequence[float | None]
"""Losses at equal distances, the last at the end; None where it was not a number."""


def share_of_steps(curve: Curve, reference: Curve) -> float:
    """Steps until a run has the final loss of another, over the steps that the other takes to it.

    >>> share_of_steps([4.0, 2.0, 1.0], [5.0, 4.0, 3.0])
    0.5
    """
    target = reference[-1]
    if target is None:
        return math.nan
    return reached(curve, target) / reached(reference, target)


def reached(curve: Curve, target: float) -> float:
    """The point, counted from 1 and between points linear, where a curve first meets a target.

    >>> reached([5.0, 4.0, 3.0], 3.5), reached([5.0, 4.0], 3.0)
    (2.5, inf)
    """
    before = None
    for point, loss in enumerate(curve, start=1):
        if loss is not None and loss <= target:
            return point if before is None else point - (target - loss) / (before - loss)
        before = loss
    return math.inf
