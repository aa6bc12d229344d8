"""Inside `shard_map` a device may be given a part of the whole, or a loss of its own.

Then each device would judge by itself, and the guard's state, one for all, would be another one on
each. JAX knows over which mesh axes an array varies, unless it is told not to check
(``check_vma=False``, and `pmap`): there only the number of coordinates speaks.
"""

from typing import Any

import jax

from lbw_optax.types import Loss, PyTree

_PARAMETERS = (
    "the parameters that it governs are parts of the whole: govern them outside of shard_map, "
    "under jit with shardings, where it sees all of them"
)
_GRADIENTS = (
    "each device has gradients of its own: average them before update, jax.lax.pmean(grads, {axes})"
)
_ACTIVATIONS = (
    "each device has activations of its own: pass their largest values, "
    "jax.lax.pmax(activations, {axes})"
)
_LOSS = "each device has a loss of its own: pass value=jax.lax.pmean(loss, {axes})"


def refuse(
    state: PyTree, gradients: PyTree, params: PyTree, value: Loss, activations: PyTree = None
) -> None:
    """See that what varies from device to device is no more than the guard's own state does.

    Independent runs, one on each device, have a state each.

    Raises:
      ValueError: with what to do.
    """
    own = _varying(state.guard_steps)
    for given, advice in (
        (params, _PARAMETERS),
        (gradients, _GRADIENTS),
        (value, _LOSS),
        (activations, _ACTIVATIONS),
    ):
        axes = _varying(given) - own
        if axes:
            names = repr(next(iter(axes)) if len(axes) == 1 else tuple(sorted(axes)))
            raise ValueError(
                f"lbw_guard has one state for all devices of the mesh axis {names}, and "
                f"{advice.format(axes=names)}."
            )


def is_inside() -> bool:
    """Whether this is traced for one device of several, by `shard_map` or `pmap`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _varying(tree: PyTree) -> frozenset[Any]:
    traced = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer)]
    axes = [_axes(jax.typeof(x)) for x in traced]
    return frozenset[Any]().union(*axes)


def _axes(kind: Any) -> frozenset[Any]:
    """The mesh axes over which an array varies; JAX before 0.10 has another name for them."""
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)
