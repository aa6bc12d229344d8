"""Parameters under Hugging Face's names and in its layouts, a tensor at a time."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from train.files import WeightsError
from train.sharding import shardings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Steps = tuple[Any, ...]
"""Of a parameter: attribute names, and the numbers of layers that are no stack."""
Index = tuple[slice, ...]

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_LEAVES |= {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_LEAVES |= {"lora_magnitude": "lora_magnitude_vector"}
_EXPERTS = [("experts", name) for name in ("gate_proj", "up_proj", "down_proj")]
_TRANSPOSED = ("kernel", "lora_A", "lora_B", "gate_proj", "up_proj", "down_proj")
"""(inputs, outputs) here, (outputs, inputs) there."""


class Tensors(Protocol):
    """Where tensors come from: `train.files.Checkpoint`, `train.gguf_file.GgufCheckpoint`."""

    shapes: dict[str, tuple[int, ...]]
    problems: list[str]

    @property
    def origin(self) -> str: ...

    def read(self, name: str, index: Index) -> np.ndarray: ...


class Tensor(NamedTuple):
    """One tensor of Hugging Face: name, shape and type there, and its content on demand."""

    name: str
    form: jax.ShapeDtypeStruct
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.form.shape) * self.form.dtype.itemsize


def hf_name(path: Steps, at: tuple[int, ...] = ()) -> str:
    """The name there of a parameter, or of that of one layer or expert of a stack."""
    *modules, leaf = [str(part) for part in path if part != "base"]
    if is_stack(path) and at:
        modules.insert(1, str(at[0]))
    if is_of_experts(path):
        modules, leaf = [*modules, str(at[-1]), leaf], "kernel"
    below = [] if modules[0] == "lm_head" else ["model"]
    peft = ["base_model", "model"] if leaf.startswith("lora_") else []
    return ".".join([*peft, *below, *modules, _LEAVES[leaf]])


def is_stack(path: Steps) -> bool:
    """Whether a parameter is that of all layers, with a leading axis."""
    return path[0] == "layers" and not isinstance(path[1], int)


def is_of_experts(path: Steps) -> bool:
    """Whether a parameter is that of all experts of a layer, with an axis before the last two."""
    return path[-2:] in _EXPERTS


def places(path: Steps, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where in a stack each tensor of Hugging Face lies; of what is none, one empty place."""
    return itertools.product(*map(range, shape[: is_stack(path) + is_of_experts(path)]))


def steps(path: tuple[Any, ...]) -> Steps:
    """A path of `jax.tree_util` as plain names and numbers."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def tensors(
    params: Any, instead: Mapping[Steps, Callable[[Any], jax.Array]] | None = None
) -> Iterator[Tensor]:
    """All tensors of a tree; `instead` gives what a kernel is replaced with when it is read."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = steps(keys)
        for at in places(path, leaf.shape):
            yield _tensor(path, leaf, at, (instead or {}).get(path))


def _tensor(
    path: Steps, leaf: Any, at: tuple[int, ...], instead: Callable[[Any], jax.Array] | None
) -> Tensor:
    turned, shape = path[-1] in _TRANSPOSED, leaf.shape[len(at) :]
    form = jax.ShapeDtypeStruct(shape[::-1] if turned else shape, leaf.dtype)

    def read() -> np.ndarray:
        where = at or ...
        array = np.asarray(leaf[where] if instead is None else instead(where))
        return np.ascontiguousarray(array.T) if turned else array

    return Tensor(hf_name(path, at), form, read)


def filled(wanted: Any, source: Tensors, mesh: Mesh | None) -> Any:
    """The tree of shapes `wanted` as arrays with the content of the source.

    Raises:
      WeightsError: with all in which the two differ.
    """
    _check(wanted, source)
    device = SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, wanted) if mesh is None else shardings(wanted, mesh)

    def array(path: Any, leaf: Any, place: Any) -> jax.Array:
        read: Callable[[Any], np.ndarray] = _reader(steps(path), leaf, source)
        return jax.make_array_from_callback(leaf.shape, place, read)

    return jax.tree_util.tree_map_with_path(array, wanted, places)


def _reader(path: Steps, wanted: Any, source: Tensors) -> Callable[[Index], np.ndarray]:
    """A function from an index into the parameter to that part of it."""
    turned, depth = path[-1] in _TRANSPOSED, is_stack(path) + is_of_experts(path)

    def one(index: Index, at: tuple[int, ...] = ()) -> np.ndarray:
        found = source.read(hf_name(path, at), index[::-1] if turned else index)
        return (found.T if turned else found).astype(wanted.dtype, copy=False)

    def stack(index: Index) -> np.ndarray:
        ranges = [
            range(*part.indices(size)) for part, size in zip(index, wanted.shape, strict=True)
        ]
        # Filled part by part: a list of them, put together, would be in memory twice.
        whole = np.empty([len(part) for part in ranges], wanted.dtype)
        for to in np.ndindex(whole.shape[:depth]):
            at = tuple(part[i] for part, i in zip(ranges, to, strict=False))
            whole[to] = one(index[depth:], at)
        return whole

    return stack if depth else one


def _check(wanted: Any, source: Tensors) -> None:
    """Raise one error that lists all in which the source and the model differ."""
    expected = {tensor.name: tensor.form.shape for tensor in tensors(wanted)}
    found, problems = source.shapes, list(source.problems)
    if not problems:  # a damaged file would make all its tensors look missing
        problems += [f"{n} {s} is missing" for n, s in expected.items() if n not in found]
    for name, shape in found.items():
        if name not in expected and not name.endswith("inv_freq"):
            problems.append(f"{name} {shape} is nothing the model has")
        elif shape != expected.get(name, shape):
            problems.append(f"{name} has shape {shape}, but the model needs {expected[name]}")
    if problems:
        raise WeightsError(
            f"{source.origin} does not fit the model, take the files that belong to its "
            f"config.json; {len(problems)} to mend:\n  " + "\n  ".join(problems)
        )
