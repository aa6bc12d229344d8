"""A guard above any Optax optimizer that keeps a training run alive and productive."""

from typing import TYPE_CHECKING, Any

from lbw_optax.audit import (
    AuditLog,
    GuardExhausted,
    check,
    events,
    explain,
    metrics,
    override,
    reset,
)
from lbw_optax.guard import adamw, chain, lbw_guard
from lbw_optax.law.control import REGIMES
from lbw_optax.law.events import Event
from lbw_optax.state import GuardState, adopt, strip

if TYPE_CHECKING:
    from lbw_optax.rollback.manager import RollbackManager

__all__ = [
    "REGIMES",
    "AuditLog",
    "Event",
    "GuardExhausted",
    "GuardState",
    "RollbackManager",
    "adamw",
    "adopt",
    "chain",
    "check",
    "events",
    "explain",
    "lbw_guard",
    "metrics",
    "override",
    "reset",
    "strip",
]


def __getattr__(name: str) -> Any:
    """`RollbackManager` needs Orbax, an extra: it is imported when it is asked for."""
    if name != "RollbackManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lbw_optax.rollback.manager import RollbackManager

    return RollbackManager
