"""What the health benchmark compares: a task's own optimizer, bare and under the guard."""

from typing import NamedTuple


class Method(NamedTuple):
    title: str
    guarded: bool = False
    rollback: bool = False
    nudged: bool = False


# By how much a nudged run's rate is higher: what comes of that is chance, since rounding amounts to
# as much.
NUDGE = 2.0**-20
BARE, NUDGED = "bare", "nudged"
METHODS = {
    BARE: Method("bare"),
    NUDGED: Method("bare, nudged", nudged=True),
    "guard": Method("guard", guarded=True),
    "guard-rollback": Method("guard + rollback", guarded=True, rollback=True),
}
