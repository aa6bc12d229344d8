"""A guard above any Optax optimizer that keeps a training run alive and productive."""

from lbw_optax.alias import adamw
from lbw_optax.audit import AuditLog, GuardExhausted, check, events, metrics, override
from lbw_optax.control import REGIMES
from lbw_optax.guard import lbw_guard
from lbw_optax.ring import Event
from lbw_optax.state import GuardState, adopt, strip

__all__ = [
    "REGIMES",
    "AuditLog",
    "Event",
    "GuardExhausted",
    "GuardState",
    "adamw",
    "adopt",
    "check",
    "events",
    "lbw_guard",
    "metrics",
    "override",
    "strip",
]
