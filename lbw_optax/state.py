"""The guard's state, and how to find it inside any nest of Optax states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lbw_optax.law.control import Control
from lbw_optax.law.divergence import Distress
from lbw_optax.law.events import Ring
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Probe, Telemetry

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
      distress: what speaks for a rollback.
      ring: the last interventions.
    """

    inner_state: Any
    guard_steps: jax.Array
    mode: jax.Array
    telemetry: Telemetry
    probe: Probe
    statistics: Statistics
    control: Control
    distress: Distress
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


def adopt(state: Any, bare: Any) -> Any:
    """A guarded optimizer state that goes on where an unguarded one is.

    Args:
      state: of the guarded optimizer, freshly made by its ``init``.
      bare: of the same optimizer without the guard, for example from an old checkpoint.

    Returns:
      `state` with `bare` inside its guards; statistics and scale start anew.

    Raises:
      ValueError: if `state` holds no guard, or `bare` is not what it holds without one.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> params, inner = jnp.ones(3), optax.sgd(0.1, momentum=0.9)
      >>> old = optax.tree.set(inner.init(params), trace=jnp.full(3, 7.0))
      >>> state = lbw_optax.adopt(lbw_optax.lbw_guard(inner).init(params), old)
      >>> optax.tree.get(state, "trace").tolist()
      [7.0, 7.0, 7.0]
    """
    find_all(state)
    bare_leaves, found = jax.tree.flatten(bare)
    structure: Any
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_guard)
    wanted: Any = jax.tree.structure(strip(state))
    if wanted != found:
        raise ValueError(
            "The unguarded state is not what this optimizer holds without its guard: "
            f"it has {found}, and {wanted} is needed."
        )
    parts = structure.flatten_up_to(jax.tree.unflatten(wanted, bare_leaves))
    adopted = [
        node._replace(inner_state=part) if _is_guard(node) else part
        for node, part in zip(nodes, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, adopted)


def require(state: Any) -> None:
    """See that a guard's `update` was given a state of its own.

    Raises:
      ValueError: for the state of another optimizer.
    """
    if not _is_guard(state):
        raise ValueError(
            f"The guard was given the state of another optimizer ({type(state).__name__}), not one "
            "that its own init made. For a run that began without the guard, pass "
            "lbw_optax.adopt(tx.init(params), state)."
        )


def strip(state: Any) -> Any:
    """The optimizer state without its guards, as the unguarded optimizer has it.

    Raises:
      ValueError: if the state holds no guard.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> params, inner = jnp.ones(3), optax.adam(0.1)
      >>> type(lbw_optax.strip(lbw_optax.lbw_guard(inner).init(params))[0]).__name__
      'ScaleByAdamState'
    """
    find_all(state)
    return jax.tree.map(
        lambda node: node.inner_state if _is_guard(node) else node, state, is_leaf=_is_guard
    )


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _plain(guard: GuardState) -> GuardState:
    """The guard's own parts as bare arrays, out of any wrapper that a framework put around them.

    Flax NNX keeps each leaf of an optimizer state in a variable of its own.
    """

    def unwrap(kind: Any, part: Any) -> Any:
        return kind(*jax.tree.leaves(part))

    running = [unwrap(Running, part) for part in guard.statistics]
    distress = Distress(*[jax.tree.leaves(part)[0] for part in guard.distress])
    return guard._replace(
        guard_steps=jax.tree.leaves(guard.guard_steps)[0],
        mode=jax.tree.leaves(guard.mode)[0],
        telemetry=unwrap(Telemetry, guard.telemetry),
        probe=unwrap(Probe, guard.probe),
        statistics=Statistics(*running),
        control=unwrap(Control, guard.control),
        distress=distress._replace(
            level=unwrap(Running, guard.distress.level),
            surprise=unwrap(Running, guard.distress.surprise),
        ),
        ring=unwrap(Ring, guard.ring),
    )
