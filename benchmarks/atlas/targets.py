"""The targets of the atlas: what must be reached, and what was measured on one half."""

import math

from benchmarks.atlas.grid import Grid, runs_on, spread
from benchmarks.atlas.methods import METHODS, OWN
from benchmarks.stress.targets import Target

ABOVE = (3, 10, 30, 100)
PEERS = [name for name, method in METHODS.items() if not method.guarded and name != OWN]


def targets(grid: Grid, half: str) -> list[Target]:
    tuned = spread(grid, grid.tasks(half), "guard", [1])
    above = spread(grid, grid.tasks(half), "guard", ABOVE)
    return [
        Target("tuned rate, median", 1.00, 0.99, tuned and tuned.median),
        Target("tuned rate, 95th percentile", 1.02, 1.01, tuned and tuned.high),
        Target("×3 … ×30 (fine-tuning ×100), median", 1.01, 0.99, above and above.median),
        Target("×3 … ×30 (fine-tuning ×100), 95th percentile", 1.05, 1.03, above and above.high),
        Target("×3 … ×30 (fine-tuning ×100), worst", 1.10, 1.05, above and above.worst),
        Target("worst task ÷ worst task of the best peer", 0.80, 0.50, to_peers(grid, half)),
    ]


def to_peers(grid: Grid, half: str) -> float | None:
    """The guard's worst cell above the tuned rate over a peer's, for the peer that is closest.

    Both on the tasks that the peer runs on. None while a peer is missing.
    """
    shares = []
    for peer in PEERS:
        on = [task for task in grid.tasks(half) if runs_on(peer, task)]
        own, other = spread(grid, on, "guard", ABOVE), spread(grid, on, peer, ABOVE)
        if own is None or other is None:
            return None
        if math.isfinite(other.worst) or math.isinf(own.worst):
            shares.append(own.worst / other.worst if math.isfinite(own.worst) else math.inf)
        else:
            shares.append(0.0)
    return max(shares, default=None)
