"""The scalars of a state as a few vectors: Orbax spends as much on a number as on a matrix.

A guard alone has a hundred. Which scalar is which element, the checkpoint's own metadata says.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# The scalars of each vector, in order.
Names = Mapping[str, list[str]]
# What the name of a vector begins with; those of leaves begin with a digit.
_VECTOR = "scalars of "


def pack(leaves: dict[str, Any]) -> tuple[dict[str, Any], Names]:
    """All scalars of one dtype as one vector on the host, and the other leaves.

    It waits for the scalars, as Orbax does for every array before it goes on by itself.
    """
    names = defaultdict(list)
    for name, x in leaves.items():
        if x.ndim == 0 and not _is_of_one_process(x):
            names[f"{_VECTOR}{x.dtype}"].append(name)
    numbers = jax.device_get({n: leaves[n] for group in names.values() for n in group})
    vectors = {key: np.stack([numbers[n] for n in group]) for key, group in names.items()}
    return {n: x for n, x in leaves.items() if n not in numbers} | vectors, dict(names)


def described(arrays: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Shape and dtype of each leaf, by those of the arrays that were written.

    Raises an error of some kind if the names are not those of these vectors.
    """
    found = {name: (tuple(x.shape), x.dtype) for name, x in arrays.items()}
    for key, group in names.items():
        (count,), dtype = found.pop(key)
        found |= {name: ((), dtype) for name, _ in zip(group, range(count), strict=True)}
    if any(name.startswith(_VECTOR) for name in found):
        raise ValueError("the names of scalars are missing")
    return found


def abstract(leaves: dict[str, Any], names: Names) -> dict[str, Any]:
    """What is to be read, for these abstract leaves."""
    packed = {name for group in names.values() for name in group}
    vectors = {key: np.zeros(len(group), leaves[group[0]].dtype) for key, group in names.items()}
    return {name: x for name, x in leaves.items() if name not in packed} | vectors


def unpack(arrays: dict[str, Any], names: Names, like: dict[str, Any]) -> dict[str, Any]:
    """The leaves, each scalar placed as that of `like`."""
    leaves = dict(arrays)
    for key, group in names.items():
        vector = leaves.pop(key)
        leaves |= {name: _place(vector[i, ...], like[name]) for i, name in enumerate(group)}
    return leaves


def _place(x: np.ndarray, like: Any) -> Any:
    if isinstance(like, jax.Array):
        return jax.make_array_from_callback((), like.sharding, lambda _: x)
    return x


def _is_of_one_process(x: Any) -> bool:
    """Whether it is an array that the other processes do not see: Orbax refuses it."""
    return isinstance(x, jax.Array) and jax.process_count() > 1 and x.is_fully_addressable
