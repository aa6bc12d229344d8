"""The search for a learning rate that all benchmarks use."""

from collections.abc import Callable


def ladder(loss: Callable[[float], float], guess: float) -> float:
    """The rate on the ladder 1, 2, 5, 10, … whose neighbours are both worse, from a guess.

    >>> ladder(lambda lr: abs(lr - 0.04), guess=0.002)
    0.05
    """
    rungs = [round(digit * 10.0**power, 12) for power in range(-7, 3) for digit in (1, 2, 5)]
    best = rungs.index(guess)
    while True:
        lowest = min((best, best - 1, best + 1), key=lambda i: loss(rungs[i]))
        if lowest == best:
            return rungs[best]
        best = lowest
