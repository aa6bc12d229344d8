"""Which leaves an optimizer never updates, as with ``set_to_zero`` inside ``partition``.

What is not updated does not count: a NaN in its gradient harms nothing, and its length is not what
a step is compared with. It is known before the first step, from the traced update: either the
update of such a leaf is a zero that depends on no input, or its gradient reaches nothing. But where
its gradient has a part in the updates of other leaves, as by `clip_by_global_norm`, it counts. Only
`optax.masked` and what is made of it (`partition`, `freeze`) treat leaves differently, so no other
optimizer is looked at.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Jaxpr, Literal

from lbw_optax.types import PyTree

_TREATS_LEAVES_DIFFERENTLY = (optax.MaskedState, optax.transforms.PartitionState)
# Operations that make zeros out of zeros.
_KEEP_ZERO = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "neg")


class Leaves(NamedTuple):
    """A bool for each leaf; empty lists where none is frozen."""

    frozen: list[bool]  # never updated
    harmless: list[bool]  # and nothing that is updated depends on its gradient


class Frozen:
    """Finds them once for each kind of tree, and leaves them out.

    Args:
      update: of the inner optimizer.
    """

    def __init__(self, update: Callable[..., tuple[Any, Any]]):
        self._update = update
        self._known: dict[Any, Leaves] = {}

    def zeroed(
        self, gradients: PyTree, inner_state: PyTree, params: PyTree, extra_args: Any
    ) -> list[Any]:
        """Gradients and params, with zeros for the leaves that do not count."""
        found = self._find(gradients, inner_state, params, extra_args)
        return [_zeroed(found.harmless, gradients), _zeroed(found.frozen, params)]

    def _find(
        self, gradients: PyTree, inner_state: PyTree, params: PyTree, extra_args: dict[str, Any]
    ) -> Leaves:
        kinds = _TREATS_LEAVES_DIFFERENTLY
        nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, kinds))
        if not any(isinstance(node, kinds) for node in nodes):
            return Leaves([], [])
        leaves, structure = jax.tree.flatten((gradients, params))
        key = structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if key not in self._known:
            given = gradients, inner_state, params
            self._known[key] = _never_updated(self._update, given, extra_args)
        return self._known[key]


def _zeroed(frozen: list[bool], tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    if not any(frozen) or len(leaves) != len(frozen):
        return tree
    changed = [jnp.zeros_like(x) if f else x for x, f in zip(leaves, frozen, strict=True)]
    return jax.tree.unflatten(structure, changed)


def _never_updated(
    update: Callable[..., tuple[Any, Any]], given: tuple[Any, ...], extra_args: dict[str, Any]
) -> Leaves:
    try:
        closed = jax.make_jaxpr(lambda *arrays: update(*arrays, **extra_args))(*given)
    except Exception:  # it branches on values, or lacks an argument that only `update` is given
        return Leaves([], [])
    jaxpr, leaves = closed.jaxpr, len(jax.tree.leaves(given[0]))
    gradients, updates = jaxpr.invars[:leaves], jaxpr.outvars[:leaves]
    is_zero, reaches = _zeros(jaxpr), _live(jaxpr, jaxpr.outvars)
    frozen = [
        is_zero(out) or gradient not in reaches
        for gradient, out in zip(gradients, updates, strict=True)
    ]
    # Where nothing is updated there is nothing that the rest could be kept apart from.
    if all(frozen):
        return Leaves([], [])
    counts = _live(jaxpr, [out for out, f in zip(updates, frozen, strict=True) if not f])
    harmless = [f and x not in counts for x, f in zip(gradients, frozen, strict=True)]
    return Leaves(frozen, harmless)


def _zeros(jaxpr: Jaxpr) -> Callable[[Any], bool]:
    """Whether a variable is zero whatever the inputs are, as long as they are finite."""
    made_by = {x: equation for equation in jaxpr.eqns for x in equation.outvars}

    def is_zero(x: Any) -> bool:
        if isinstance(x, Literal):
            return not np.any(np.asarray(x.val))
        equation = made_by.get(x)
        if equation is None:
            return False
        if equation.primitive.name == "mul":
            return any(is_zero(y) for y in equation.invars)
        return equation.primitive.name in _KEEP_ZERO and all(is_zero(y) for y in equation.invars)

    return is_zero


def _live(jaxpr: Jaxpr, outputs: list[Any]) -> set[Any]:
    """The variables that one of these outputs depends on."""
    live = {x for x in outputs if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        wanted = [x in live for x in equation.outvars]
        if any(wanted):
            live |= {x for x in _used(equation, wanted) if not isinstance(x, Literal)}
    return live


def _used(equation: Any, wanted: list[bool]) -> list[Any]:
    """What the wanted outputs of an equation depend on; of a jitted function not all of them do."""
    called = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
    if called is None:
        return list(equation.invars)
    inner = called.jaxpr
    live = _live(inner, [x for x, is_one in zip(inner.outvars, wanted, strict=True) if is_one])
    return [x for x, own in zip(equation.invars, inner.invars, strict=True) if own in live]
