"""The guard's state, and how to find it inside any nest of Optax states."""

from typing import Any, NamedTuple

import jax

from lbw_optax.control import Control
from lbw_optax.ring import Ring
from lbw_optax.statistics import Statistics
from lbw_optax.telemetry import Probe, Telemetry

MODES = ("govern", "observe")


class GuardState(NamedTuple):
    """State of :func:`lbw_optax.lbw_guard`: scalars, a small probe, and the inner state.

    Attributes:
      inner_state: the governed optimizer's own state.
      guard_steps: int32, calls of `update`, skipped ones included.
      mode: int32, index into `MODES`.
      telemetry: the newest step's signals.
      probe: the sampled coordinates remembered from the step before.
      statistics: running statistics of this run.
      control: scale, regime and budget.
      ring: the last interventions.
    """

    inner_state: Any
    guard_steps: jax.Array
    mode: jax.Array
    telemetry: Telemetry
    probe: Probe
    statistics: Statistics
    control: Control
    ring: Ring


def find(state: Any) -> GuardState:
    """The one guard in an optimizer state.

    Raises:
      ValueError: if the state holds no guard, or several.
    """
    guards = find_all(state)
    if len(guards) > 1:
        raise ValueError(
            f"This optimizer state holds {len(guards)} guards: pass the part of it that holds the "
            "one you mean, for example state.inner_states['decoder']."
        )
    return guards[0]


def find_all(state: Any) -> list[GuardState]:
    """Every guard in an optimizer state, outermost only.

    Raises:
      ValueError: if the state holds no guard.
    """
    leaves = jax.tree.leaves(state, is_leaf=is_guard)
    guards = [leaf for leaf in leaves if is_guard(leaf)]
    if not guards:
        raise ValueError(
            "This optimizer state holds no guard: build the optimizer with "
            "lbw_guard(inner), or pass the state that its update returned."
        )
    return guards


def is_guard(node: Any) -> bool:
    """Whether a node of an optimizer state is a guard's."""
    return isinstance(node, GuardState)
