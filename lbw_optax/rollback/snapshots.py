"""Copies of a training state: any pytree of arrays, keys and numbers, with checksums.

A state is flattened to named leaves that every tier can hold: typed keys become their data,
Python and NumPy numbers become arrays. `like`, a state of the same kind, brings them back.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.rollback.agreement import largest
from lbw_optax.state import GuardState
from lbw_optax.types import PyTree

PINNED = "pinned_host"
# Arrays alike that one compiled program measures at a time.
TOGETHER = 32


class Snapshot(NamedTuple):
    """One state, copied: it outlives the donation of what it was taken from.

    Attributes:
      step: updates that the state has had.
      leaves: name to array.
      sums: uint32[n], a checksum of each leaf; None for a copy that stays in memory.
      has_nan: bool[k], whether this array holds a NaN.
      names: of these arrays, each with whether an optimizer that is guarded holds it.
    """

    step: int
    leaves: dict[str, Any]
    sums: jax.Array | None
    has_nan: jax.Array
    names: list[tuple[str, bool]]

    def nan_leaves(self) -> tuple[list[str], list[str]]:
        """Names of the leaves with a NaN: in the optimizer's state, and elsewhere. Waits."""
        found = [who for who, bad in zip(self.names, np.asarray(self.has_nan), strict=True) if bad]
        mine = [name for name, is_guarded in found if is_guarded]
        return mine, [name for name, is_guarded in found if not is_guarded]

    @property
    def nbytes(self) -> int:
        """Bytes of this process."""
        return sum(_nbytes(leaf) for leaf in self.leaves.values())


def take(step: int, tree: PyTree, *, for_disk: bool = False, on_device: bool = False) -> Snapshot:
    """Copy a state, to pinned host memory where the backend has it. Does not wait.

    Args:
      step: updates that it has had.
      tree: the state.
      for_disk: with checksums.
      on_device: to where it is instead.
    """
    leaves = flatten(tree)
    sums = checksums(leaves) if for_disk else None
    kind = PINNED if not on_device and any(map(_may_pin, leaves.values())) else None
    copies = _copy(leaves, dict.fromkeys(leaves, kind))
    return look(step, tree)._replace(leaves=copies, sums=sums)


def look(step: int, tree: PyTree) -> Snapshot:
    """What a snapshot knows of a state, without a copy of it: where a NaN is. Does not wait."""
    leaves = flatten(tree)
    floats = {name: x for name, x in leaves.items() if _may_be_nan(x)}
    has_nan = largest(_of_each(_has_nan, list(floats.values()))) if floats else jnp.zeros(0, bool)
    guarded = dict(zip(leaves, _are_guarded(tree), strict=True))
    return Snapshot(step, {}, None, has_nan, [(plain_name(name), guarded[name]) for name in floats])


def restore(snapshot: Snapshot, like: PyTree) -> PyTree:
    """The state once more, as fresh arrays: the snapshot stays whole when they are donated."""
    kinds = {name: _kind(x) for name, x in flatten(like).items()}
    return place(_copy(snapshot.leaves, kinds), like)


def reserve(tree: PyTree, copies: int) -> None:
    """Let the backend allocate pinned memory for so many copies of a state, and wait.

    To allocate it takes a hundred times as long as to write to it. The backend keeps what is freed,
    and the copies that are taken later get it.
    """
    leaves = flatten(tree)
    jax.block_until_ready([_copy(leaves, dict.fromkeys(leaves, PINNED)) for _ in range(copies)])


def nbytes(tree: PyTree) -> int:
    """Bytes of a state, on this process."""
    return sum(map(_nbytes, flatten(tree).values()))


def flatten(tree: PyTree) -> dict[str, Any]:
    """Name to array, for every leaf.

    Raises:
      TypeError: if a leaf is neither an array nor a number.
    """
    return {
        f"{i:05d} {jax.tree_util.keystr(path, simple=True, separator='.')}": _pack(path, leaf)
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree))
    }


def plain_name(name: str) -> str:
    """The path of a leaf, without its number."""
    return name.partition(" ")[2]


def place(leaves: dict[str, Any], like: PyTree) -> PyTree:
    """The state of the kind of `like` that these leaves make."""
    models, structure = jax.tree.flatten(like)
    parts = [_unpack(_unbind(x, m), m) for x, m in zip(leaves.values(), models, strict=True)]
    return jax.tree.unflatten(structure, parts)


def checksums(leaves: dict[str, Any]) -> jax.Array:
    """A checksum of each leaf, uint32[n].

    With b_i the bits of element i as an unsigned number, the sum of (2 i + 1) b_i modulo 2^32:
    it changes with any single bit, and does not depend on how the array is sharded.
    """
    words = [_as_32_bits(x) if isinstance(x, np.ndarray) else x for x in leaves.values()]
    return _of_each(_checksums, words)


def _of_each(measure: Callable[[list[Any]], jax.Array], arrays: list[Any]) -> jax.Array:
    """A number of each array, in their order.

    Arrays that are alike share a program, so that what is compiled grows with the kinds of arrays
    and not with their number.
    """
    alike = defaultdict(list)
    for i, x in enumerate(arrays):
        alike[x.shape, x.dtype, getattr(x, "sharding", None)].append(i)
    groups = [
        places[start : start + TOGETHER]
        for places in alike.values()
        for start in range(0, len(places), TOGETHER)
    ]
    numbers = [measure([arrays[i] for i in group]) for group in groups]
    return _in_order(numbers, np.argsort([i for group in groups for i in group]))


@jax.jit
def _in_order(numbers: list[jax.Array], order: np.ndarray) -> jax.Array:
    return jnp.concatenate(numbers)[order]


def _are_guarded(tree: PyTree) -> list[bool]:
    """Of each leaf, whether it belongs to an optimizer inside a guard."""
    are: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, GuardState)):
        inner = len(jax.tree.leaves(node.inner_state)) if isinstance(node, GuardState) else 0
        are += [True] * inner + [False] * (len(jax.tree.leaves(node)) - inner)
    return are


def _may_be_nan(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


@jax.jit
def _has_nan(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.any(jnp.isnan(x)) for x in _on_device(arrays)])


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(x) for x in _on_device(leaves)])


def _on_device(arrays: list[jax.Array]) -> list[jax.Array]:
    """To compute with: pinned host memory is moved out of, the rest stays free to join a mesh."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    return [jax.device_put(x, device) if jax.typeof(x).memory_space == host else x for x in arrays]


def _checksum(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _checksum(x.real) + 3 * _checksum(x.imag)
    bits = _bits(x)
    index, stride = jnp.zeros([], jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
        stride = stride * bits.shape[axis] % 2**32
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """As uint32; an element of eight bytes becomes two."""
    if x.dtype == bool or x.dtype.itemsize * 8 != jax.dtypes.itemsize_bits(x.dtype):
        return x.astype(jnp.int32).astype(jnp.uint32)
    size = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)


def _as_32_bits(x: np.ndarray) -> np.ndarray:
    """Eight-byte numbers of NumPy, which JAX would round, as pairs of four bytes."""
    if x.dtype.itemsize <= 4:
        return x
    return np.atleast_1d(np.ascontiguousarray(x)).view(np.uint32)


def _pack(path: Any, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf
    if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        array = np.array(leaf)  # a copy: NumPy arrays may be written to
        if array.dtype != object:
            return array.astype(array.dtype.newbyteorder("="))
    raise TypeError(
        f"The leaf {jax.tree_util.keystr(path)} of the training state is of type "
        f"{type(leaf).__name__}: pass a state of arrays, keys and numbers only."
    )


def _unbind(x: Any, like: PyTree) -> Any:
    """An array that was not bound to its device is not bound afterwards: nothing recompiles."""
    bound = isinstance(x, jax.Array) and x.committed
    return copy(np.asarray(x)) if bound and not getattr(like, "committed", True) else x


def _unpack(x: Any, like: PyTree) -> Any:
    if isinstance(like, jax.Array):
        is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key else x
    if isinstance(like, np.ndarray):
        return np.array(x, like.dtype)
    return type(like)(np.asarray(x)[()])


def _copy(leaves: dict[str, Any], kinds: dict[str, str | None]) -> dict[str, Any]:
    """Copies in these kinds of memory; None is where an array lies."""
    stay: dict[str, str | None] = {}
    move: dict[str, str | None] = {}
    for name, x in leaves.items():
        if isinstance(x, jax.Array):
            kind = kinds[name] or _kind(x)
            (stay if kind == _kind(x) != PINNED else move)[name] = kind
    places = {name: leaves[name].sharding.with_memory_kind(kind) for name, kind in move.items()}
    moved = jax.device_put({name: leaves[name] for name in move}, places, may_alias=False)
    copies = copy({name: leaves[name] for name in stay}) | moved
    return {name: copies[name] if name in copies else x.copy() for name, x in leaves.items()}


def _kind(x: Any) -> str | None:
    """Of the memory that an array lies in; None for NumPy's."""
    return x.sharding.memory_kind if isinstance(x, jax.Array) else None


@jax.jit
def copy(arrays: Any) -> Any:
    """Arrays of their own, placed and committed as these are."""
    return jax.tree.map(jnp.copy, arrays)


def _may_pin(x: Any) -> bool:
    """Whether this is an accelerator's array and there is pinned host memory beside it."""
    if not isinstance(x, jax.Array):
        return False
    device: Any = next(iter(x.sharding.device_set))
    return device.platform != "cpu" and PINNED in {m.kind for m in device.addressable_memories()}


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, jax.Array):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards)
    return leaf.nbytes
