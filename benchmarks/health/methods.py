"""What the health benchmark compares: a task's own optimizer, bare and under the guard."""

from typing import NamedTuple


class Method(NamedTuple):
    title: str
    guarded: bool = False
    rollback: bool = False
    warmed_up: bool = False


WARM_UP = 10
"""Steps over which the updates of a run that is warmed up grow to their full length."""
BARE, WARMED_UP = "bare", "warm-up"
METHODS = {
    BARE: Method("bare"),
    WARMED_UP: Method("bare, warmed up", warmed_up=True),
    "guard": Method("guard", guarded=True),
    "guard-rollback": Method("guard + rollback", guarded=True, rollback=True),
}
