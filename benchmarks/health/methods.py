"""What the health benchmark compares: a task's own optimizer, bare and under the guard."""

from typing import NamedTuple


class Method(NamedTuple):
    title: str
    guarded: bool = False
    rollback: bool = False


BARE = "bare"
METHODS = {
    BARE: Method("bare"),
    "guard": Method("guard", guarded=True),
    "guard-rollback": Method("guard + rollback", guarded=True, rollback=True),
}
