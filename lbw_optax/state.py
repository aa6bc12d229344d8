"""The guard's state, and how to find it inside any nest of Optax states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lbw_optax.control import Control
from lbw_optax.ring import Ring
from lbw_optax.statistics import Running, Statistics
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
    leaves = jax.tree.leaves(state, is_leaf=_is_guard)
    guards = [_plain(leaf) for leaf in leaves if _is_guard(leaf)]
    if not guards:
        raise ValueError(
            "This optimizer state holds no guard: build the optimizer with "
            "lbw_guard(inner), or pass the state that its update returned."
        )
    return guards


def map_guards(change: Callable[[GuardState], GuardState], state: Any) -> Any:
    """The optimizer state with every guard in it changed.

    Raises:
      ValueError: if the state holds no guard.
    """
    find_all(state)

    def visit(node: Any) -> Any:
        if not _is_guard(node):
            return node
        changed = change(_plain(node))._replace(inner_state=node.inner_state)
        return jax.tree.unflatten(jax.tree.structure(node), jax.tree.leaves(changed))

    return jax.tree.map(visit, state, is_leaf=_is_guard)


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _plain(guard: GuardState) -> GuardState:
    """The guard's own parts as bare arrays, out of any wrapper that a framework put around them.

    Flax NNX keeps each leaf of an optimizer state in a variable of its own.
    """

    def unwrap(kind: Any, part: Any) -> Any:
        return kind(*jax.tree.leaves(part))

    running = [unwrap(Running, part) for part in guard.statistics]
    return guard._replace(
        guard_steps=jax.tree.leaves(guard.guard_steps)[0],
        mode=jax.tree.leaves(guard.mode)[0],
        telemetry=unwrap(Telemetry, guard.telemetry),
        probe=unwrap(Probe, guard.probe),
        statistics=Statistics(*running),
        control=unwrap(Control, guard.control),
        ring=unwrap(Ring, guard.ring),
    )
