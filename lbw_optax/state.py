"""The guard's state, and how to find it inside any nest of Optax states."""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax import law
from lbw_optax.law import events, telemetry
from lbw_optax.law.control import Bounds
from lbw_optax.law.events import Ring
from lbw_optax.law.step import Law
from lbw_optax.law.telemetry import Probe, Telemetry


class Mode(enum.IntEnum):
    """What the guard does with its decisions."""

    GOVERN = 0  # it applies them
    OBSERVE = 1  # it only reports them


MODES = tuple(mode.name.lower() for mode in Mode)


class GuardState(NamedTuple):
    """State of :func:`lbw_optax.lbw_guard`: scalars, a small probe, and the inner state.

    Attributes:
      inner_state: the governed optimizer's own state.
      guard_steps: int32, calls of `update`, skipped ones included.
      mode: int32, a `Mode`.
      telemetry: the newest step's signals.
      probe: the sampled coordinates remembered from the step before.
      law: what the law remembers: statistics, scale, budget, what speaks for a rollback.
      events: the last interventions.
    """

    inner_state: Any
    guard_steps: jax.Array
    mode: jax.Array
    telemetry: Telemetry
    probe: Probe
    law: Law
    events: Ring


def init(params: Any, probe: Probe, bounds: Bounds, mode: str) -> GuardState:
    """Before the first step, without an inner state; every leaf is an array of its own."""
    state = GuardState(
        inner_state=None,
        guard_steps=jnp.zeros([], jnp.int32),
        mode=jnp.asarray(MODES.index(mode), jnp.int32),
        telemetry=telemetry.init(params),
        probe=probe,
        law=law.init(bounds),
        events=events.init(),
    )
    # A buffer that two leaves share cannot be donated.
    return jax.tree.map(jnp.copy, state)


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
    own = jax.tree.leaves(guard._replace(inner_state=None))
    return jax.tree.unflatten(_structure(), own)._replace(inner_state=guard.inner_state)


@functools.cache
def _structure() -> Any:
    nothing = jnp.zeros([0], jnp.float32)
    probe = Probe(nothing, nothing, nothing)
    return jax.tree.structure(
        jax.eval_shape(lambda: init(None, probe, Bounds(), MODES[Mode.GOVERN]))
    )
