"""Hugging Face checkpoints in and out: safetensors of models, and of adapters in PEFT's format."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from train import files, lora
from train.files import Checkpoint, WeightsError
from train.model import Decoder, split
from train.presets import Config
from train.sharding import shardings

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILE_BYTES = 5_000_000_000
"""A model file is at most so large, unless one tensor is larger."""

__all__ = [
    "WeightsError",
    "check_vocabulary",
    "load",
    "load_adapter",
    "read_config",
    "save",
    "save_adapter",
    "to_hf",
]


def load(
    name: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    scan: bool = False,
    remat: bool = False,
) -> Decoder:
    """The decoder of a local directory, or of a name on the Hugging Face hub, with its weights.

    Reads `config.json` and safetensors (one file, or several with an index). Each parameter goes
    from the file to its place, with its `param_dtype` and its part of the `mesh`
    (`train.sharding`), before the next is read: no second copy of the model is ever in memory.
    The other arguments are those of `Decoder`.

    Raises:
      WeightsError: with every tensor that is missing, left over, or of the wrong shape, and every
        file that is missing or damaged.
      ValueError: for an architecture that the decoder does not have.
      ImportError: without safetensors.

    Example:
      >>> import tempfile
      >>> from train.model import PRESETS
      >>> directory = tempfile.mkdtemp()
      >>> save(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)), directory)
      >>> load(directory, param_dtype=jnp.bfloat16).config == PRESETS["tiny"]
      True
    """
    folder = files.directory(name)
    config = read_config(folder)

    def make() -> Decoder:
        types = {"dtype": dtype, "param_dtype": param_dtype}
        return Decoder(config, rngs=nnx.Rngs(0), scan=scan, remat=remat, **types)

    graphdef, wanted, _ = split(nnx.eval_shape(make))
    unused = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return nnx.merge(graphdef, _filled(wanted, Checkpoint(folder), mesh, unused))


def save(model: Decoder, directory: str | Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Write `model.safetensors` (several with an index above `file_bytes`) and `config.json`.

    `transformers` loads the directory. Parameters keep their type; adapters are merged into what
    is written, not into `model`. The tensors of one file at a time are in the host's memory.

    Raises:
      WeightsError: if it cannot be written.
      ValueError: for a shape that is none of `transformers`' architectures.
      ImportError: without safetensors.
    """
    config, folder, tensors = model.config.to_hf(), Path(directory), list(_merged(model))
    plan = _planned(tensors, file_bytes)
    with files.writing(folder):
        for file, part in plan.items():
            files.write(folder / file, {tensor.name: tensor.read() for tensor in part})
        if len(plan) > 1:
            where = {tensor.name: file for file, part in plan.items() for tensor in part}
            size = {"total_size": sum(_bytes(tensor.form) for tensor in tensors)}
            files.write_json(folder / files.INDEX, {"metadata": size, "weight_map": where})
        dtype = str(tensors[0].form.dtype)
        files.write_json(folder / "config.json", {**config, "torch_dtype": dtype})


def load_adapter(model: Decoder, name: str | Path, *, mesh: Mesh | None = None) -> None:
    """Put the adapters of a PEFT directory (or name on the hub) onto `model`.

    Raises:
      WeightsError: as in `load`, and for what PEFT has and `train.lora` has not.
      ImportError: without safetensors.
    """
    folder = files.directory(name)
    config = files.read_json(folder / ADAPTER_CONFIG)
    _refuse_other_than_lora(config)
    checkpoint = Checkpoint(folder, ADAPTER)
    lora.add_lora(
        model,
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets={name.split(".")[-3] for name in checkpoint.shapes if ".lora_" in name},
        rngs=nnx.Rngs(0),
    )
    wanted = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, nnx.State(_filled(wanted, checkpoint, mesh, set())))


def save_adapter(model: Decoder, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of `model` as `peft` loads them; `base` is the name of the model below.

    Raises:
      WeightsError: for a model without adapters, with adapters that differ in rank, alpha or
        dropout, and if it cannot be written.
      ImportError: without safetensors.
    """
    layers = lora.adapters(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout.rate) for _, _, layer in layers}
    if len(kinds) != 1:
        raise WeightsError(
            f"the model has {len(kinds)} kinds of adapters, but an {ADAPTER_CONFIG} describes one "
            "rank, alpha and dropout: call train.lora.add_lora once"
        )
    ((rank, alpha, dropout),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name for _, name, _ in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder, state = Path(directory), nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    with files.writing(folder):
        files.write(folder / ADAPTER, to_hf(state))
        files.write_json(folder / ADAPTER_CONFIG, config)


def read_config(directory: str | Path) -> Config:
    """The shape that a directory's `config.json` describes. Raises as `load` does."""
    return Config.from_hf(files.read_json(Path(directory) / "config.json"))


def check_vocabulary(tokens: int, config: Config) -> None:
    """Raise `WeightsError` for a tokenizer with more tokens than the embedding has rows.

    >>> from train.model import PRESETS
    >>> check_vocabulary(500, PRESETS["tiny"])
    """
    if tokens > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {tokens} tokens, but the model embeds {config.vocab_size}: take "
            "the model's own tokenizer, or a model with a larger vocabulary"
        )


def to_hf(params: Any) -> dict[str, np.ndarray]:
    """Parameters (`train.model.split`) by the names, and in the layout, of transformers and PEFT.

    A gradient or anything else of the same tree will do.

    >>> from train.model import PRESETS
    >>> _, params, _ = split(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)))
    >>> to_hf(params)["model.layers.2.mlp.down_proj.weight"].shape
    (128, 384)
    """
    return {tensor.name: tensor.read() for tensor in _tensors(params)}


# --- names and layouts -------------------------------------------------------------------------

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_LEAVES |= {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_TRANSPOSED = ("kernel", "lora_A", "lora_B")  # (inputs, outputs) here, (outputs, inputs) there

Steps = tuple[Any, ...]
"""Of a parameter: attribute names, and the numbers of layers that are no stack."""


class _Tensor(NamedTuple):
    """One tensor of Hugging Face: name, shape and type there, and its content on demand."""

    name: str
    form: jax.ShapeDtypeStruct
    read: Callable[[], np.ndarray]


def _hf_name(path: Steps, layer: int | None = None) -> str:
    """The name there of a parameter, or of one layer of a stack."""
    *modules, leaf = [str(part) for part in path if part != "base"]
    if layer is not None:
        modules.insert(1, str(layer))
    below = [] if modules[0] == "lm_head" else ["model"]
    peft = ["base_model", "model"] if leaf.startswith("lora_") else []
    return ".".join([*peft, *below, *modules, _LEAVES[leaf]])


def _is_stack(path: Steps) -> bool:
    return path[0] == "layers" and not isinstance(path[1], int)


def _steps(path: tuple[Any, ...]) -> Steps:
    """A path of `jax.tree_util` as plain names and numbers."""
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def _tensors(
    params: Any, change: Mapping[Steps, Callable[[Any], jax.Array]] | None = None
) -> Iterator[_Tensor]:
    """All tensors of a tree; `change` gives what is to be added to a kernel."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = _steps(keys)
        layers: Any = range(leaf.shape[0]) if _is_stack(path) else [None]
        for layer in layers:
            yield _tensor(path, leaf, layer, (change or {}).get(path))


def _tensor(
    path: Steps, leaf: Any, layer: int | None, change: Callable[[Any], jax.Array] | None
) -> _Tensor:
    turned = path[-1] in _TRANSPOSED
    shape = leaf.shape if layer is None else leaf.shape[1:]
    form = jax.ShapeDtypeStruct(shape[::-1] if turned else shape, leaf.dtype)

    def read() -> np.ndarray:
        at = ... if layer is None else layer
        part = leaf[at] if change is None else (leaf[at] + change(at)).astype(leaf.dtype)
        array = np.asarray(part)
        return np.ascontiguousarray(array.T) if turned else array

    return _Tensor(_hf_name(path, layer), form, read)


def _merged(model: Decoder) -> Iterator[_Tensor]:
    """The model without adapters, whose change is added to a kernel when it is read."""
    change = {
        (*path, "base", "kernel"): module.change
        for path, module in nnx.iter_modules(model)
        if isinstance(module, lora.LoRALinear)
    }
    params = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    return _tensors(nnx.to_pure_dict(params), change)


# --- from files to parameters, and to files ----------------------------------------------------


def _filled(wanted: Any, checkpoint: Checkpoint, mesh: Mesh | None, unused: set[str]) -> Any:
    """The tree of shapes `wanted` as arrays with the content of the checkpoint."""
    _check(wanted, checkpoint, unused)
    device = SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, wanted) if mesh is None else shardings(wanted, mesh)

    def array(path: Any, leaf: Any, place: Any) -> jax.Array:
        part = _reader(_steps(path), leaf.shape, checkpoint)

        def typed(index: Any) -> np.ndarray:
            return part(index).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, place, typed)

    return jax.tree_util.tree_map_with_path(array, wanted, places)


def _reader(
    path: Steps, shape: tuple[int, ...], checkpoint: Checkpoint
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index into the parameter to that part of it."""
    turned = path[-1] in _TRANSPOSED

    def one(index: tuple[slice, ...], layer: int | None = None) -> np.ndarray:
        found = checkpoint.read(_hf_name(path, layer), index[::-1] if turned else index)
        return found.T if turned else found

    def stack(index: tuple[slice, ...]) -> np.ndarray:
        layers = range(*index[0].indices(shape[0]))
        return np.stack([one(index[1:], layer) for layer in layers])

    return stack if _is_stack(path) else one


def _check(wanted: Any, checkpoint: Checkpoint, unused: set[str]) -> None:
    """Raise one error that lists all in which the checkpoint and the model differ."""
    expected = {tensor.name: tensor.form.shape for tensor in _tensors(wanted)}
    found, problems = checkpoint.shapes, list(checkpoint.problems)
    if not problems:  # a damaged file would make all its tensors look missing
        problems += [f"{n} {s} is missing" for n, s in expected.items() if n not in found]
    for name, shape in found.items():
        if name not in expected and name not in unused and not name.endswith("inv_freq"):
            problems.append(f"{name} {shape} is nothing the model has")
        elif shape != expected.get(name, shape):
            problems.append(f"{name} has shape {shape}, but the model needs {expected[name]}")
    if problems:
        raise WeightsError(
            f"{checkpoint.folder} does not fit the model, take the files that belong to its "
            f"config.json; {len(problems)} to mend:\n  " + "\n  ".join(problems)
        )


def _refuse_other_than_lora(config: Mapping[str, Any]) -> None:
    """Raise for what changes an adapter's meaning and is nothing that `train.lora` does."""
    refused = [f"{name}={config[name]!r}" for name in _NOT_HERE if config.get(name)]
    for name, plain in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(name, plain) != plain:
            refused.append(f"{name}={config[name]!r}")
    if refused:
        raise WeightsError(
            f"{ADAPTER_CONFIG} asks for {', '.join(refused)}: only plain LoRA is implemented, "
            "merge such an adapter with peft and load the merged model"
        )


_NOT_HERE = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("fan_in_fan_out", "layer_replication", "trainable_token_indices", "lora_bias"),
)


def _planned(tensors: list[_Tensor], limit: int) -> dict[str, list[_Tensor]]:
    """File names and their tensors, in order, each file within the limit."""
    parts: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        size += _bytes(tensor.form)
        if parts[-1] and size > limit:
            parts.append([])
            size = _bytes(tensor.form)
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {files.MODEL: parts[0]}
    count = len(parts)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _bytes(form: jax.ShapeDtypeStruct) -> int:
    return math.prod(form.shape) * form.dtype.itemsize
