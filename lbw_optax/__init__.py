"""A guard above any Optax optimizer that keeps a training run alive and productive."""

from typing import TYPE_CHECKING, Any

from lbw_optax.activations import activation_outliers, attention_logit_max, stable_rank
from lbw_optax.attention import by_attention, qk_clip
from lbw_optax.audit import (
    AuditLog,
    GuardExhausted,
    check,
    events,
    explain,
    frozen_groups,
    metrics,
    override,
    reset,
)
from lbw_optax.groups import by_layer
from lbw_optax.guard import adamw, chain, lbw_guard
from lbw_optax.law.control import REGIMES
from lbw_optax.law.events import Event
from lbw_optax.state import GuardState, adopt, strip

if TYPE_CHECKING:
    from lbw_optax.report.diagnosis import diagnose as diagnose
    from lbw_optax.rollback.manager import RollbackManager as RollbackManager

    __version__: str

# Without `RollbackManager`, so that `from lbw_optax import *` works where Orbax is missing.
__all__ = [
    "REGIMES",
    "AuditLog",
    "Event",
    "GuardExhausted",
    "GuardState",
    "activation_outliers",
    "adamw",
    "adopt",
    "attention_logit_max",
    "by_attention",
    "by_layer",
    "chain",
    "check",
    "diagnose",
    "events",
    "explain",
    "frozen_groups",
    "lbw_guard",
    "metrics",
    "override",
    "qk_clip",
    "reset",
    "stable_rank",
    "strip",
]


def __getattr__(name: str) -> Any:
    """What is made when it is asked for: `RollbackManager` needs Orbax, an extra.

    Without Orbax this raises the ImportError that says so, also under ``hasattr``: of an
    AttributeError ``from lbw_optax import RollbackManager`` would keep no word, and no exception
    can be both.

    `diagnose` is for those who look at a log, and no training run should import it.
    """
    if name == "RollbackManager":
        from lbw_optax.rollback.manager import RollbackManager

        return RollbackManager
    if name == "diagnose":
        from lbw_optax.report.diagnosis import diagnose

        return diagnose
    if name == "__version__":
        from importlib import metadata

        return metadata.version("lbw_optax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "RollbackManager", "__version__", "diagnose"])
