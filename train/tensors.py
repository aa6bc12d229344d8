"""Parameters under Hugging Face's names and in its layouts, a tensor at a time."""

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
_TRANSPOSED = ("kernel", "lora_A", "lora_B")  # (inputs, outputs) here, (outputs, inputs) there


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


def hf_name(path: Steps, layer: int | None = None) -> str:
    """The name there of a parameter, or of one layer of a stack."""
    *modules, leaf = [str(part) for part in path if part != "base"]
    if layer is not None:
        modules.insert(1, str(layer))
    below = [] if modules[0] == "lm_head" else ["model"]
    peft = ["base_model", "model"] if leaf.startswith("lora_") else []
    return ".".join([*peft, *below, *modules, _LEAVES[leaf]])


def is_stack(path: Steps) -> bool:
    """Whether a parameter is that of all layers, with a leading axis."""
    return path[0] == "layers" and not isinstance(path[1], int)


def steps(path: tuple[Any, ...]) -> Steps:
    """A path of `jax.tree_util` as plain names and numbers."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def tensors(
    params: Any, instead: Mapping[Steps, Callable[[Any], jax.Array]] | None = None
) -> Iterator[Tensor]:
    """All tensors of a tree; `instead` gives what a kernel is replaced with when it is read."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = steps(keys)
        layers: Any = range(leaf.shape[0]) if is_stack(path) else [None]
        for layer in layers:
            yield _tensor(path, leaf, layer, (instead or {}).get(path))


def _tensor(
    path: Steps, leaf: Any, layer: int | None, instead: Callable[[Any], jax.Array] | None
) -> Tensor:
    turned = path[-1] in _TRANSPOSED
    shape = leaf.shape if layer is None else leaf.shape[1:]
    form = jax.ShapeDtypeStruct(shape[::-1] if turned else shape, leaf.dtype)

    def read() -> np.ndarray:
        at = ... if layer is None else layer
        array = np.asarray(leaf[at] if instead is None else instead(at))
        return np.ascontiguousarray(array.T) if turned else array

    return Tensor(hf_name(path, layer), form, read)


def filled(wanted: Any, source: Tensors, mesh: Mesh | None) -> Any:
    """The tree of shapes `wanted` as arrays with the content of the source.

    Raises:
      WeightsError: with all in which the two differ.
    """
    _check(wanted, source)
    device = SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, wanted) if mesh is None else shardings(wanted, mesh)

    def array(path: Any, leaf: Any, place: Any) -> jax.Array:
        part = _reader(steps(path), leaf.shape, source)

        def typed(index: Any) -> np.ndarray:
            return part(index).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, place, typed)

    return jax.tree_util.tree_map_with_path(array, wanted, places)


def _reader(path: Steps, shape: tuple[int, ...], source: Tensors) -> Callable[[Index], np.ndarray]:
    """A function from an index into the parameter to that part of it."""
    turned = path[-1] in _TRANSPOSED

    def one(index: Index, layer: int | None = None) -> np.ndarray:
        found = source.read(hf_name(path, layer), index[::-1] if turned else index)
        return found.T if turned else found

    def stack(index: Index) -> np.ndarray:
        layers = range(*index[0].indices(shape[0]))
        return np.stack([one(index[1:], layer) for layer in layers])

    return stack if is_stack(path) else one


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
