"""Which leaf is in which group, and what a decision on groups does to pytrees of their leaves.

A leaf of scan-stacked layers, with one slice for each layer, is in as many groups as it has slices.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lbw_optax.law.telemetry import wide_type
from lbw_optax.types import PyTree

Grouping = Callable[[str], str | None]
"""From the path of a leaf, its keys with "/" between them, to the name of its group, or None."""

STACKED = "[*]"
"""The end of a name of which each slice along a leaf's first axis is a group of its own."""


def by_layer(path: str, *, stacked: str | None = None) -> str:
    """The layer that a leaf belongs to, for ``lbw_guard(..., groups=by_layer)``.

    The path up to the first part, but the last, that ends in a number; of leaves outside of
    numbered layers the first part alone.

    Args:
      path: of the leaf, its keys with "/" between them.
      stacked: the name of the part under which the layers are stacked for a scan, one slice of each
        leaf's first axis a layer: ``functools.partial(by_layer, stacked="layers")``.

    Raises:
      ValueError: if it is given no path.

    Example:
      >>> from lbw_optax import by_layer
      >>> by_layer("layers/3/attn/q/kernel"), by_layer("embed/embedding")
      ('layers/3', 'embed')
      >>> by_layer("decoder/layers/attn/q/kernel", stacked="layers")
      'decoder/layers[*]'
    """
    require_path(path, "groups", "by_layer")
    parts = path.split("/")
    if stacked in parts:
        return "/".join(parts[: parts.index(stacked) + 1]) + STACKED
    numbered = (i for i, part in enumerate(parts[:-1]) if re.search(r"\d$", part))
    return "/".join(parts[: next(numbered, 0) + 1])


def require_path(path: Any, argument: str, function: str) -> None:
    """Refuse what is no path, as where Optax calls a function that it takes for a schedule."""
    if not isinstance(path, str):
        raise ValueError(
            f"{function} takes the path of a leaf, a str, got {type(path).__name__}: pass it as "
            f"{argument}={function}, and under optax.inject_hyperparams, which takes a function "
            f"for a schedule, with static_args=('{argument}',)."
        )


class Place(NamedTuple):
    """Of a leaf: the number of its group, or of its first slice's, and how many slices it has."""

    group: int
    slices: int = 0  # 0: the whole leaf is in the one group


class Groups(NamedTuple):
    """Of all leaves of a pytree, which groups they are in; nothing in it is an array."""

    names: list[str]
    places: list[Place | None]  # of each leaf; None: it is in no group
    paths: dict[tuple[Any, ...], int]  # from a leaf's path to its number


def find(grouping: Grouping, tree: PyTree) -> Groups:
    """The groups of a pytree, whose leaves may be abstract.

    Raises:
      ValueError: if a name is no str, a stacked leaf has no first axis, leaves of one stacked name
        have first axes of different lengths, or two groups have the same name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    slices: dict[str, int] = {}
    first: dict[str, int] = {}
    names: list[str] = []
    places: list[Place | None] = []
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        name = _name(grouping, where) if _counts(leaf) else None
        if name is None:
            places.append(None)
            continue
        count = _slices(name, where, leaf.shape if hasattr(leaf, "shape") else ())
        if slices.setdefault(name, count) != count:
            raise ValueError(
                f"The leaves of {name!r} are to have one slice for each layer, and the first axis "
                f"of {where!r} has {count} where others have {slices[name]}: give the leaves that "
                "are not stacked another name."
            )
        if name not in first:
            first[name] = len(names)
            stem = name.removesuffix(STACKED)
            names += [f"{stem}[{i}]" for i in range(count)] if count else [name]
        places.append(Place(first[name], count))
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(
            f"groups makes two groups with the name {twice!r}, one of a leaf and one of a slice of "
            "stacked leaves: give one of them another name."
        )
    return Groups(names, places, {path: i for i, (path, _) in enumerate(leaves)})


class Squares(NamedTuple):
    """Sums of squares of one pytree, each element read once for all that is made of them.

    A piece is a leaf, or one slice of stacked layers. Leaves that are empty, or of integers, have
    none.
    """

    pieces: jax.Array  # float32[P]
    groups: np.ndarray  # int[P], of each piece; the number of groups where it is in none
    leaves: np.ndarray  # int[P], which leaf it is of, among those that have one

    def of_groups(self, number: int) -> tuple[jax.Array, jax.Array]:
        """Of each group, float32[G], and of the leaves in none, a scalar."""
        total = _summed(self.pieces, self.groups, number + 1)
        return total[:-1], total[-1]

    def of_leaves(self) -> jax.Array:
        """Of each leaf, as `telemetry.squares` has them."""
        if self.pieces.size == len(set(self.leaves)):
            return self.pieces
        return _summed(self.pieces, self.leaves, self.leaves[-1] + 1)

    def held(self, frozen: jax.Array, log_scale: jax.Array | None = None) -> "Squares":
        """Of what `zeroed` or `held` makes of the pytree."""
        still = jnp.append(frozen, False)[self.groups]
        pieces = self.pieces
        if log_scale is not None:
            pieces = pieces * jnp.exp(2 * jnp.append(log_scale, 0.0)[self.groups])
        return self._replace(pieces=jnp.where(still, 0.0, pieces))


def squares(groups: Groups, tree: PyTree) -> Squares:
    """The sum of squares of each piece.

    Reduced in float32 at least; not finite where an element is none, or its square.
    """
    numbers: list[int] = []
    leaves: list[int] = []
    sums: list[jax.Array] = []
    for place, leaf in _placed(groups, tree):
        if not _counts(leaf) or not leaf.size:
            continue
        wide = jnp.asarray(leaf).astype(wide_type(leaf.dtype))
        square = jnp.real(wide * jnp.conj(wide))
        axes = tuple(range(1, square.ndim)) if place and place.slices else None
        own = _numbers(place) or [len(groups.names)]
        numbers += own
        leaves += [len(sums)] * len(own)
        sums.append(replicated(jnp.sum(square, axes).astype(jnp.float32).reshape(-1)))
    each = jnp.concatenate(sums) if sums else jnp.zeros([0], jnp.float32)
    # The barrier: see `telemetry.squares`.
    each = jax.lax.optimization_barrier(each)
    return Squares(each, np.array(numbers, int), np.array(leaves, int))


def _summed(pieces: jax.Array, numbers: np.ndarray, most: int) -> jax.Array:
    """The sum of the pieces with each number from 0 on, float32[most]; a NaN stays in its own."""
    own = numbers == np.arange(most)[:, None]
    return jnp.sum(jnp.where(own, pieces[None, :], 0.0), axis=1)


def held(groups: Groups, tree: PyTree, frozen: jax.Array, log_scale: jax.Array) -> PyTree:
    """Updates: zeros where their group is frozen, and else times its scale, in their own dtype.

    Args:
      groups: of the tree.
      tree: the updates.
      frozen: bool[G].
      log_scale: float32[G].
    """
    scale = jnp.exp(log_scale)

    def act(place: Place | None, x: Any) -> Any:
        if place is None or not _counts(x):
            return x
        wide = wide_type(x.dtype)
        factor, still = _spread(place, scale, x), _spread(place, frozen, x)
        y = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
        # As in `apply.scaled`: a factor of 1 leaves every float as it is, and -0.0 adds nothing.
        return jnp.where(still, jnp.full_like(x, -0.0), jnp.where(factor == 1, x, y))

    return _map(groups, act, tree)


def zeroed(groups: Groups, tree: PyTree, frozen: jax.Array) -> PyTree:
    """Gradients, with zeros where their group is frozen: they have no part in anything."""

    def act(place: Place | None, x: Any) -> Any:
        if place is None or not _counts(x):
            return x
        return jnp.where(_spread(place, frozen, x), jnp.zeros_like(x), x)

    return _map(groups, act, tree)


def kept(groups: Groups, old: PyTree, new: PyTree, like: PyTree, frozen: jax.Array) -> PyTree:
    """The new inner state, with the old one's share of the frozen groups.

    A leaf of the state belongs to that leaf of the parameters in whose path its own ends, as
    ``mu/layers/3/kernel`` does: so it is in what `jax.tree.map` makes of parameters, inside of
    `masked`, `partition` and `MultiSteps`, too. `optax.tree_map_params` would need an `init` that
    takes no parameters, and says nothing of a state with other shapes than theirs, as Adafactor's.
    What is no such leaf, as a count, goes on.

    Args:
      groups: of the parameters.
      old: inner state before the step.
      new: after it.
      like: gradients, for their shapes.
      frozen: bool[G].
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(like)]
    leaves, structure = jax.tree_util.tree_flatten_with_path(new)
    before = jax.tree.leaves(old)
    if len(before) != len(leaves):  # which the optimizer itself has changed: nothing to go by
        return new
    chosen = []
    for (path, x), was in zip(leaves, before, strict=True):
        place = _of_state(groups, path, jnp.shape(x), shapes)
        keeps = place is not None and jnp.shape(x) == jnp.shape(was)
        chosen.append(jnp.where(_spread(place, frozen, x), was, x) if keeps and place else x)
    return jax.tree.unflatten(structure, chosen)


def _of_state(
    groups: Groups, path: tuple[Any, ...], shape: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> Place | None:
    """The place of the parameter that a leaf of the inner state belongs to."""
    for begin in range(len(path) + 1):
        number = groups.paths.get(path[begin:])
        if number is None:
            continue
        place = groups.places[number]
        if shape == shapes[number]:
            return place
        # Of another shape, as a sum over columns: not a counter of the optimizer's own, and where
        # it is to be cut into slices it needs them.
        if place is None or not shape or not path[begin:]:
            return None
        has_slices = shape[0] == place.slices and len(shape) <= len(shapes[number])
        return place if not place.slices or has_slices else None
    return None


def _name(grouping: Grouping, path: str) -> str | None:
    name = grouping(path)
    if name is None or (isinstance(name, str) and name.removesuffix(STACKED) and _is_text(name)):
        return name
    raise ValueError(
        f"groups must give the name of a leaf's group, a str, or None for a leaf that is in none; "
        f"of {path!r} it gave {name!r}."
    )


def _is_text(name: str) -> bool:
    """Whether UTF-8 holds it, without the byte that names are filled up with."""
    return "\0" not in name and name.encode(errors="ignore").decode() == name


def _slices(name: str, path: str, shape: tuple[int, ...]) -> int:
    if not name.endswith(STACKED):
        return 0
    if not shape or not shape[0]:
        raise ValueError(
            f"{name!r} is to have a group for each slice of a leaf's first axis, and {path!r} has "
            f"shape {shape}: give it a name without {STACKED!r}, or None."
        )
    return shape[0]


def _counts(x: Any) -> bool:
    """Whether it is a leaf of numbers that train; `float0` and integers do not."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _numbers(place: Place | None) -> list[int]:
    """The groups of a leaf's slices, or of the whole."""
    return list(range(place.group, place.group + max(place.slices, 1))) if place else []


def _placed(groups: Groups, tree: PyTree) -> Iterator[tuple[Place | None, Any]]:
    leaves = jax.tree.leaves(tree)
    if len(leaves) != len(groups.places):
        raise ValueError(
            f"The updates have {len(leaves)} leaves and the gradients {len(groups.places)}: "
            "lbw_guard(..., groups=...) needs one for one."
        )
    return zip(groups.places, leaves, strict=True)


def _map(groups: Groups, act: Callable[[Place | None, Any], Any], tree: PyTree) -> PyTree:
    leaves = [act(place, x) for place, x in _placed(groups, tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _spread(place: Place, values: jax.Array, leaf: jax.Array) -> jax.Array:
    """What is said of a leaf's groups, as a scalar or in the shape of the leaf's slices."""
    if not place.slices:
        return values[place.group]
    own = values[place.group : place.group + place.slices]
    return broadcast(own.reshape((place.slices,) + (1,) * (leaf.ndim - 1)), leaf)


def broadcast(x: jax.Array, leaf: jax.Array) -> jax.Array:
    """An array with as many axes as a leaf, in its shape and on its devices."""
    return jax.lax.broadcast_in_dim(x, leaf.shape, range(leaf.ndim), out_sharding=_sharding(leaf))


def _sharding(x: jax.Array) -> NamedSharding | None:
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(x: jax.Array) -> jax.Array:
    """The whole of it on every device, where shardings are explicit; else as it is."""
    sharding = _sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
