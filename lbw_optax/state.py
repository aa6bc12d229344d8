"""The guard's state, and how to find it inside any nest of Optax states."""

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef

from lbw_optax import law
from lbw_optax.law import custom as customs
from lbw_optax.law import events, freezing, layers, telemetry
from lbw_optax.law.control import Bounds
from lbw_optax.law.custom import Custom, Watched
from lbw_optax.law.events import Ring
from lbw_optax.law.freezing import Freezing
from lbw_optax.law.layers import Layers
from lbw_optax.law.step import Law
from lbw_optax.law.telemetry import Probe, Telemetry
from lbw_optax.types import PyTree


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
      layers: what `update` was told of the model's activations; advice only.
      freezing: what is remembered of groups of leaves; () where none can be frozen.
      custom: what is remembered of a user's own signals; () where there are none.
    """

    inner_state: PyTree
    guard_steps: jax.Array
    mode: jax.Array
    telemetry: Telemetry
    probe: Probe
    law: Law
    events: Ring
    layers: Layers
    freezing: Freezing | tuple[()] = ()
    custom: Watched | tuple[()] = ()


def init(
    probe: Probe,
    bounds: Bounds,
    mode: str,
    groups: Sequence[str] | None = None,
    custom: Custom | None = None,
    *,
    adapts: bool = False,
) -> GuardState:
    """Before the first step, without an inner state; every leaf is an array of its own.

    Args:
      probe: before the first step.
      bounds: the user's.
      mode: one of `MODES`.
      groups: the names of those that may be frozen; None where nothing may.
      custom: the user's own signals.
      adapts: the classifier goes on learning in the run.
    """
    state = GuardState(
        inner_state=None,
        guard_steps=jnp.zeros([], jnp.int32),
        mode=jnp.asarray(MODES.index(mode), jnp.int32),
        telemetry=telemetry.init(),
        probe=probe,
        law=law.init(bounds, adapts=adapts),
        events=events.init(),
        layers=layers.init(),
        freezing=() if groups is None else freezing.init(groups),
        custom=customs.init(custom) if custom else (),
    )
    # A buffer that two leaves share cannot be donated.
    return jax.tree.map(jnp.copy, state)


def find(state: PyTree) -> GuardState:
    """The one guard in an optimizer state, of one run.

    Raises:
      ValueError: if the state holds no guard, or several, or several runs in one (``vmap``).
    """
    guards = find_all(state)
    if len(guards) > 1:
        raise ValueError(
            f"This optimizer state holds {len(guards)} guards: pass the part of it that holds the "
            "one you mean, for example state.inner_states['decoder']."
        )
    return of_one_run(guards[0])


def find_all(state: PyTree) -> list[GuardState]:
    """Every guard in an optimizer state, outermost only.

    Raises:
      ValueError: if the state holds no guard.
    """
    return list(find_named(state).values())


def find_named(state: PyTree) -> dict[str, GuardState]:
    """Every guard in an optimizer state, outermost only, by its path in it.

    Raises:
      ValueError: if the state holds no guard.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_guard)
    guards = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _plain(node)
        for path, node in nodes
        if _is_guard(node)
    }
    if not guards:
        raise ValueError(
            "This optimizer state holds no guard: build the optimizer with "
            "lbw_guard(inner), or pass the state that its update returned."
        )
    return guards


def of_one_run(guard: GuardState) -> GuardState:
    """The guard itself.

    Raises:
      ValueError: if it is several in one, as ``vmap`` and ``pmap`` make them.
    """
    if jnp.ndim(guard.guard_steps):
        raise ValueError(
            f"This optimizer state holds {jnp.size(guard.guard_steps)} runs in one, as vmap and "
            "pmap make it: pass one of them, jax.tree.map(lambda x: x[0], state)."
        )
    return guard


def map_guards(change: Callable[[GuardState], GuardState], state: PyTree) -> PyTree:
    """The optimizer state with every guard in it changed.

    Raises:
      ValueError: if the state holds no guard.
    """
    find_all(state)

    def visit(node: PyTree) -> PyTree:
        return _put(node, change(_plain(node))) if _is_guard(node) else node

    return jax.tree.map(visit, state, is_leaf=_is_guard)


def adopt(state: PyTree, bare: PyTree) -> PyTree:
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
    structure: PyTreeDef
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_guard)
    wanted: PyTreeDef = jax.tree.structure(strip(state))
    if wanted != found:
        raise ValueError(
            "The unguarded state is not what this optimizer holds without its guard: "
            f"it has {found}, and {wanted} is needed."
        )
    for mine, theirs in zip(jax.tree.leaves(strip(state)), bare_leaves, strict=True):
        kinds = [(jnp.shape(x), jnp.result_type(x)) for x in (mine, theirs)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "The unguarded state is of another model: a leaf is "
                f"{kinds[1][1]}{list(kinds[1][0])}, and {kinds[0][1]}{list(kinds[0][0])} is needed."
            )
    parts = structure.flatten_up_to(jax.tree.unflatten(wanted, bare_leaves))
    adopted = [
        _with_inner(node, part) if _is_guard(node) else part
        for node, part in zip(nodes, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, adopted)


def require(state: PyTree) -> None:
    """See that a guard's `update` was given a state of its own.

    Raises:
      ValueError: for the state of another optimizer, and for one that has become mappings.
    """
    if isinstance(state, Mapping) and _is_guard(state):
        raise ValueError(
            f"The guard was given a state of mappings ({type(state).__name__}), as a checkpoint is "
            "that was loaded without its types: load it with the shapes and types of "
            "tx.init(params), jax.eval_shape(tx.init, params)."
        )
    if not _is_guard(state):
        raise ValueError(
            f"The guard was given the state of another optimizer ({type(state).__name__}), not one "
            "that its own init made. For a run that began without the guard, pass "
            "lbw_optax.adopt(tx.init(params), state)."
        )


def as_arrays(guard: GuardState) -> GuardState:
    """With the guard's own parts as arrays, where a file gave NumPy's, or plain numbers.

    Those have no types that stay from step to step, and are no arrays where nothing is compiled.
    The inner state stays as it is: what the inner optimizer makes of it is its own.
    """
    own = guard._replace(inner_state=None)
    if all(isinstance(x, jax.Array) for x in jax.tree.leaves(own)):
        return guard
    probe = _skeleton().probe
    if guard.probe.parameters is None:
        probe = probe._replace(parameters=None)
    types = _skeleton()._replace(inner_state=None, probe=probe)
    if not guard.freezing:
        types = types._replace(freezing=())
    if not guard.custom:
        types = types._replace(custom=())
    if not guard.law.classifier.adapted:
        memory = types.law.classifier._replace(adapted=())
        types = types._replace(law=types.law._replace(classifier=memory))
    arrays = jax.tree.map(lambda x, kind: jnp.asarray(x, kind.dtype), own, types)
    return arrays._replace(inner_state=guard.inner_state)


def strip(state: PyTree) -> PyTree:
    """The optimizer state without its guards, as the unguarded optimizer has it.

    Raises:
      ValueError: if the state holds no guard.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> params, inner = jnp.ones(3), optax.adam(0.1)
      >>> type(lbw_optax.strip(lbw_optax.lbw_guard(inner).init(params))[0]).__name__
      'ScaleByAdamState'
    """
    if not any(map(_is_guard, jax.tree.leaves(state, is_leaf=_is_guard))):
        find_all(state)  # which says so; of a guard that another version made it reads nothing
    return jax.tree.map(
        lambda node: _child(node, "inner_state") if _is_guard(node) else node,
        state,
        is_leaf=_is_guard,
    )


# What a framework may make of a guard's state. Flax NNX keeps each leaf of an optimizer state in a
# variable of its own, and `nnx.split` makes mappings from field to part of all NamedTuples; a part
# without an array in it, as an empty inner state, is missing there.


def _is_guard(node: PyTree) -> bool:
    if isinstance(node, Mapping):
        missing = {"inner_state", *_OPTIONAL} & set(GuardState._fields)
        return set(node) | missing == set(GuardState._fields)
    return isinstance(node, GuardState)


def _plain(node: PyTree) -> GuardState:
    """The guard's own parts as bare arrays."""
    if isinstance(node, GuardState) and isinstance(node.guard_steps, jax.Array):
        return node  # as nearly always, and in every step of a loop
    return _rebuild(_skeleton(), node)._replace(inner_state=_child(node, "inner_state"))


def _rebuild(skeleton: PyTree, node: PyTree) -> PyTree:
    if skeleton is None:
        return None
    if not isinstance(skeleton, tuple):
        return next(iter(jax.tree.leaves(node)), None)
    names: tuple[str, ...] = skeleton._fields  # type: ignore[attr-defined]
    for name in names:
        # Parts that a guard may have without an array in them are missing in a sound state, too.
        if name not in _MAY_BE_EMPTY and _child(node, name) is None:
            raise ValueError(
                f"A guard in this optimizer state has no {name}: another version of lbw_optax made "
                "it. The optimizer's own state can be gone on with, "
                "lbw_optax.adopt(tx.init(params), lbw_optax.strip(state))."
            )
    return type(skeleton)(
        *[
            ()
            if n in _OPTIONAL and not _child(node, n)
            else _rebuild(getattr(skeleton, n), _child(node, n))
            for n in names
        ]
    )


# Parts of a guard that nobody may have asked for.
_OPTIONAL = ("freezing", "custom", "adapted")
_MAY_BE_EMPTY = ("inner_state", "parameters", *_OPTIONAL)


def _put(node: PyTree, guard: GuardState) -> PyTree:
    """The node with the guard's own parts in it, in whatever wrappers it has."""
    paths, structure = jax.tree_util.tree_flatten_with_path(node)
    return jax.tree.unflatten(structure, [_follow(guard, path, leaf) for path, leaf in paths])


def _follow(guard: GuardState, path: tuple[Any, ...], leaf: PyTree) -> PyTree:
    """The guard's array at this path; the inner state's leaves stay."""
    part: PyTree = guard
    for key in path:
        name = str(getattr(key, "name", getattr(key, "key", None)))
        if name == "inner_state":
            return leaf
        if not isinstance(part, tuple):  # inside of a wrapper
            break
        part = getattr(part, name)
    return part


def _with_inner(node: PyTree, inner_state: PyTree) -> PyTree:
    if isinstance(node, Mapping):
        return type(node)({**node, "inner_state": inner_state})  # type: ignore[call-arg]
    return node._replace(inner_state=inner_state)


def _child(node: PyTree, name: str) -> PyTree:
    if isinstance(node, Mapping):
        return node.get(name, optax.EmptyState() if name == "inner_state" else None)
    return getattr(node, name)


@functools.cache
def _skeleton() -> GuardState:
    nothing = jnp.zeros([0], jnp.float32)
    probe = Probe(nothing, nothing)
    return jax.eval_shape(
        lambda: init(probe, Bounds(), MODES[Mode.GOVERN], [""], Custom({}, {}, None), adapts=True)
    )
