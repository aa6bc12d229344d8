"""Hugging Face checkpoints in and out: the weights of models."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from train import files, generation, lora
from train.adapters import ADAPTER, ADAPTER_CONFIG, load_adapter, save_adapter
from train.files import GGUF, Checkpoint, WeightsError
from train.gguf_file import GgufCheckpoint
from train.model import Decoder, split
from train.presets import Config
from train.tensors import EMBEDDING, HEAD, Tensor, Tensors, filled, tensors

FILE_BYTES = 5_000_000_000
"""A model file is at most so large, unless one tensor is larger."""

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
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
    """The decoder of a local directory, a name on the Hugging Face hub, or a GGUF file.

    Reads `config.json` and safetensors (one file, or several with an index). Each parameter goes
    from the file to its place, with its `param_dtype` and its part of the `mesh`
    (`train.sharding`), before the next is read: no second copy of the model is ever in memory.
    Where the configuration ties head and embedding and the files hold two that differ, both are
    kept, the configuration is mended, and a warning says so. The other arguments are those of
    `Decoder`.

    Raises:
      WeightsError: with every tensor that is missing, left over, or of the wrong shape, and every
        file that is missing or damaged.
      ValueError: for an architecture that the decoder does not have.
      ImportError: without safetensors, or gguf for such a file.

    Example:
      >>> import tempfile
      >>> from train.model import PRESETS
      >>> directory = tempfile.mkdtemp()
      >>> save(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)), directory)
      >>> load(directory, param_dtype=jnp.bfloat16).config == PRESETS["tiny"]
      True
    """
    place = files.directory(name)
    about, source = _opened(place)
    config = Config.from_hf(about)
    if isinstance(source, Checkpoint):
        config = _as_it_is_filed(config, source)

    def make() -> Decoder:
        types = {"dtype": dtype, "param_dtype": param_dtype}
        return Decoder(config, rngs=nnx.Rngs(0), scan=scan, remat=remat, **types)

    graphdef, wanted, _ = split(nnx.eval_shape(make))
    decoder = nnx.merge(graphdef, filled(wanted, source, mesh))
    decoder.generation = generation.read(place, about)
    return decoder


def _opened(place: Path) -> tuple[dict[str, Any], Tensors]:
    """The `config.json` of a directory, or what stands for it in a GGUF file, and the tensors."""
    if place.suffix == GGUF:
        found = GgufCheckpoint(place)
        return found.about, found
    return _configuration(place), Checkpoint(place)


def _configuration(folder: Path) -> dict[str, Any]:
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if has_adapter and not (folder / "config.json").is_file():
        base = files.read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise WeightsError(
            f"{folder} holds an adapter, not a model: load its base ({base}), then the adapter "
            "with train.weights.load_adapter"
        )
    if has_adapter:
        warnings.warn(
            f"{folder} holds an adapter beside the model, which transformers would put onto it: "
            "here train.weights.load_adapter does",
            stacklevel=4,
        )
    return files.read_json(folder / "config.json")


def _as_it_is_filed(config: Config, checkpoint: Checkpoint) -> Config:
    """The configuration that the files bear out; tensors get the names that the decoder gives."""
    if "embed_tokens.weight" in checkpoint.shapes:  # saved without the head, and the name of both
        checkpoint.rename({name: f"model.{name}" for name in checkpoint.shapes if name != HEAD})
    names = {name: _ours(name, config) for name in checkpoint.shapes}
    checkpoint.rename({old: new for old, new in names.items() if new != old})
    if not config.tie_word_embeddings or HEAD not in checkpoint.shapes:
        return config
    if EMBEDDING not in checkpoint.shapes:
        checkpoint.rename({HEAD: EMBEDDING})
    elif checkpoint.equal(HEAD, EMBEDDING):
        checkpoint.drop(HEAD)
    else:
        warnings.warn(
            f"{checkpoint.origin} says tie_word_embeddings=true, but its {HEAD} is not its "
            f"{EMBEDDING}: both are kept, and the model is not tied",
            stacklevel=3,
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _ours(name: str, config: Config) -> str:
    """Mixtral's names of a mixture as Qwen's; all others as they are."""
    for mixtral, own in _MIXTRAL if config.is_mixtral else ():
        name = name.replace(mixtral, own)
    return name


def _filed(name: str, config: Config) -> str:
    """The opposite."""
    for mixtral, own in _MIXTRAL if config.is_mixtral and ".mlp." in name else ():
        name = name.replace(own, mixtral)
    return name


_MIXTRAL = [
    (".block_sparse_moe.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
]


def save(
    model: Decoder,
    directory: str | Path,
    *,
    end: int | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write `model.safetensors` (several with an index above `file_bytes`) and configurations.

    `transformers` loads the directory. Parameters keep their type; adapters are merged into what
    is written, not into `model`. The tensors of one file at a time are in the host's memory.
    `config.json` and `generation_config.json` have the token ids and settings with which the
    model was loaded; where it was not, `end` is the id at which a text ends. A model that is
    there already is replaced when all is written (`train.files.replacing`), and so is an adapter,
    which `transformers` would put onto the new model.

    Raises:
      WeightsError: if it cannot be written.
      ValueError: for a shape that is none of `transformers`' architectures.
      ImportError: without safetensors.
    """
    config, folder = model.config.to_hf(), Path(directory)
    every = [t._replace(name=_filed(t.name, model.config)) for t in _merged(model)]
    tokens = model.generation or generation.of({"eos_token_id": end})
    plan = _planned(every, file_bytes)
    entries = [files.MODEL, files.INDEX]
    stale = [*files.shards(folder), ADAPTER_CONFIG, ADAPTER]
    with files.replacing(folder, entries, stale=stale) as draft:
        dtype = str(every[0].form.dtype)
        ids = json.loads(tokens.ids)
        files.write_json(draft / "config.json", {**config, **ids, "torch_dtype": dtype})
        files.write_json(draft / generation.FILE, json.loads(tokens.settings))
        for file, part in plan.items():
            files.write(draft / file, {tensor.name: tensor.read() for tensor in part})
        if len(plan) > 1:
            where = {tensor.name: file for file, part in plan.items() for tensor in part}
            size = {"total_size": sum(tensor.bytes for tensor in every)}
            files.write_json(draft / files.INDEX, {"metadata": size, "weight_map": where})


def _merged(model: Decoder) -> Iterator[Tensor]:
    """The model without adapters, each in place of its kernel when that is read."""
    instead = {
        (*path, "base", "kernel"): module.merged
        for path, module in nnx.iter_modules(model)
        if isinstance(module, lora.LoRALinear)
    }
    return tensors(nnx.to_pure_dict(nnx.state(model, lora.is_base)), instead)


def _planned(every: list[Tensor], limit: int) -> dict[str, list[Tensor]]:
    """File names and their tensors, in order, each file within the limit."""
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in every:
        size += tensor.bytes
        if parts[-1] and size > limit:
            parts.append([])
            size = tensor.bytes
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {files.MODEL: parts[0]}
    count = len(parts)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts, 1)}


def read_config(directory: str | Path) -> Config:
    """The shape that a directory's `config.json`, or a GGUF file, describes. Raises as `load`."""
    if Path(directory).suffix == GGUF:
        return Config.from_hf(GgufCheckpoint(Path(directory)).about)
    return Config.from_hf(_configuration(Path(directory)))


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raise `WeightsError` for a tokenizer with an id for which the embedding has no row.

    Ids may have gaps: the largest one counts, not the number of tokens.

    >>> from tokenizers import models
    >>> from train.model import PRESETS
    >>> check_vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 511}, "a")), PRESETS["tiny"])
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= config.vocab_size:
        raise WeightsError(
            f"the tokenizer's token {token!r} has the id {vocabulary[token]}, but the model embeds "
            f"ids up to {config.vocab_size - 1}: take the model's own tokenizer, or a model with a "
            "larger vocabulary"
        )


def to_hf(params: Any) -> dict[str, np.ndarray]:
    """Parameters (`train.model.split`) by the names, and in the layout, of transformers and PEFT.

    A gradient or anything else of the same tree will do.

    >>> from train.model import PRESETS
    >>> _, params, _ = split(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)))
    >>> to_hf(params)["model.layers.2.mlp.down_proj.weight"].shape
    (128, 384)
    """
    return {tensor.name: tensor.read() for tensor in tensors(params)}
