"""Adapters in PEFT's format, in and out: LoRA, rsLoRA, DoRA, and modules saved whole."""

import collections
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from train import files, lora, peft_config
from train.files import Checkpoint, WeightsError
from train.lora import LoRALinear, WholeParam
from train.model import Decoder
from train.peft_config import Adapter
from train.tensors import EMBEDDING, HEAD, Steps, filled, hf_name, is_stack, tensors

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", peft_config.FILE
PREFIX = "base_model.model."
"""Of every name in PEFT's files."""


def load_adapter(model: Decoder, name: str | Path, *, mesh: Mesh | None = None) -> None:
    """Put the adapters of a PEFT directory (or name on the hub) onto `model`.

    Modules that the adapter holds whole (`modules_to_save`) take the place of the model's, and
    are trained with it. Where that, or an adapter, is for the head of a tied model alone, the
    head gets weights of its own.

    Raises:
      WeightsError: as `train.weights.load`; for a field of the config that asks for what
        `train.lora` does not do; for layers that differ within one stack; and for a model that
        has adapters already.
      ImportError: without safetensors.
    """
    folder = files.directory(name)
    asked = peft_config.understood(files.read_json(folder / ADAPTER_CONFIG))
    checkpoint = Checkpoint(folder, ADAPTER)
    checkpoint.rename({name: _below(name) for name in checkpoint.shapes if ".lora_" not in name})
    if lora.adapters(model):
        raise WeightsError("the model has adapters already: fold them in with lora.merge_lora")
    _own_head(model, asked, checkpoint)
    _adapt(model, asked)
    _mark_whole(model, asked)

    def is_filed(path: Steps, variable: Any) -> bool:
        if isinstance(variable, nnx.LoRAParam):
            return True
        return lora.is_base(path, variable) and not checkpoint.shapes.keys().isdisjoint(
            _names(model, path)
        )

    wanted = nnx.to_pure_dict(nnx.state(model, is_filed))
    nnx.update(model, nnx.State(filled(wanted, checkpoint, mesh)))


def _below(name: str) -> str:
    """The name that the model itself gives a tensor."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _own_head(model: Decoder, asked: Adapter, checkpoint: Checkpoint) -> None:
    """Untie a head that will not be the embedding; forget the head of a file that is."""
    if not model.config.tie_word_embeddings:
        return
    saved = asked.saves("lm_head") or asked.saves("model.embed_tokens")
    if asked.targets("lm_head") or (saved and not asked.ensure_weight_tying):
        model.untie()
    elif {EMBEDDING, HEAD} <= checkpoint.shapes.keys() and checkpoint.equal(EMBEDDING, HEAD):
        checkpoint.drop(HEAD)


def _adapt(model: Decoder, asked: Adapter) -> None:
    """Put a `LoRALinear` in every place that is asked for."""
    for path, parent, layer in list(_linears(model)):

        def kind(module: str) -> tuple[int, float] | None:
            return (asked.rank(module), asked.alpha(module)) if asked.targets(module) else None

        if (found := _alike(kind, _modules(model, path))) is not None:
            setattr(parent, path[-1], _adapted(layer, asked, *found))
    if not lora.adapters(model):
        known = ", ".join(sorted({path[-1] for path, _, _ in _linears(model)}))
        raise WeightsError(
            f"target_modules={asked.target_modules!r} of {ADAPTER_CONFIG} names no linear layer "
            f"of the model; there are: {known}"
        )


def _adapted(layer: nnx.Linear, asked: Adapter, rank: int, alpha: float) -> LoRALinear:
    kinds: dict[str, Any] = {
        "dropout": asked.lora_dropout,
        "rslora": asked.use_rslora,
        "dora": asked.use_dora,
    }
    try:
        return LoRALinear(layer, rank=rank, alpha=alpha, **kinds, rngs=nnx.Rngs(0))
    except ValueError as error:
        raise WeightsError(f"{ADAPTER_CONFIG} cannot be: {error}") from error


def _mark_whole(model: Decoder, asked: Adapter) -> None:
    """Let the parameters of modules that are saved whole be trained."""
    for path, module in list(nnx.iter_modules(model)):
        for leaf, variable in list(vars(module).items()):
            if not lora.is_base((leaf,), variable) or "base" in path:
                continue
            if _alike(asked.saves, _modules(model, path)):
                setattr(module, leaf, WholeParam(variable[...]))


def _alike(kind: Callable[[str], Any], modules: list[str]) -> Any:
    """What is asked for all of these, the layers of one stack."""
    kinds = {kind(module) for module in modules}
    if len(kinds) > 1:
        raise WeightsError(
            f"the adapter asks for different things in {modules[0]} and in other layers, which "
            "are one stack here: load the model with scan=False"
        )
    return kinds.pop()


def save_adapter(model: Decoder, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of `model` as `peft` loads them.

    `base` names the model below: on the hub, or a directory, which is written as an absolute
    path. An adapter that is there already is replaced when all is written.

    Raises:
      WeightsError: for a model without adapters, with adapters that differ in more than rank and
        alpha, and if it cannot be written.
      ImportError: without safetensors.
    """
    config = {**_described(model), "base_model_name_or_path": _lasting(base)}
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    every = {tensor.name: tensor.read() for tensor in tensors(state)}
    if config.get("ensure_weight_tying"):
        every[HEAD] = every[EMBEDDING]
    with files.replacing(Path(directory), [ADAPTER]) as draft:
        named = {name if name.startswith(PREFIX) else PREFIX + name: every[name] for name in every}
        files.write_json(draft / ADAPTER_CONFIG, config)
        files.write(draft / ADAPTER, named)


def _lasting(base: str | None) -> str | None:
    """The name of a model that means the same from wherever it is read."""
    if base is None or not Path(base).exists():
        return base
    return os.path.abspath(base)


def _described(model: Decoder) -> dict[str, Any]:
    """The `adapter_config.json` of the adapters of `model`."""
    layers: dict[str, LoRALinear] = {}
    whole: set[str] = set()
    every: set[str] = set()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            layers |= dict.fromkeys(_modules(model, path), module)
        elif "base" not in path and any(lora.is_base((n,), v) for n, v in vars(module).items()):
            every |= {*_modules(model, path)}
            if any(isinstance(value, WholeParam) for value in vars(module).values()):
                whole |= {*_modules(model, path)}
    rslora, dora, dropout = _only_kind(layers)
    rank = _usual(layer.rank for layer in layers.values())
    alpha = _usual(layer.alpha for layer in layers.values())
    stays_tied = "model.embed_tokens" in whole and model.config.tie_word_embeddings
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "rank_pattern": {n: layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {n: layer.alpha for n, layer in layers.items() if layer.alpha != alpha},
        "target_modules": _shortest({*layers}, every),
        "modules_to_save": _shortest(whole, every | {*layers}, end=str.endswith) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **({"ensure_weight_tying": True} if stays_tied else {}),  # older versions know it not
    }


def _only_kind(layers: dict[str, LoRALinear]) -> tuple[bool, bool, float]:
    kinds = {(layer.rslora, layer.dora, layer.dropout.rate) for layer in layers.values()}
    if len(kinds) != 1:
        raise WeightsError(
            f"the model has {len(kinds)} kinds of adapters, but an {ADAPTER_CONFIG} describes one "
            "(rsLoRA, DoRA, dropout): call train.lora.add_lora with the same for all"
        )
    return kinds.pop()


def _usual(values: Iterator[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _shortest(
    modules: Collection[str],
    others: Collection[str],
    end: Callable[[str, str], bool] = lambda module, name: f".{module}".endswith(f".{name}"),
) -> list[str]:
    """The last words of the names, where no other module has the same; else the whole names."""
    rest = {*others} - {*modules}
    short = {module.rpartition(".")[2] for module in modules}
    clear = {name for name in short if not any(end(module, name) for module in rest)}
    long = {module for module in modules if module.rpartition(".")[2] not in clear}
    return sorted(clear | long)


# --- modules by name ---------------------------------------------------------------------------


def _linears(model: Decoder) -> Iterator[tuple[Steps, nnx.Module, nnx.Linear]]:
    for path, parent in nnx.iter_modules(model):
        for attribute, layer in vars(parent).items():
            if isinstance(layer, nnx.Linear) and not isinstance(parent, LoRALinear):
                yield (*path, attribute), parent, layer


def _names(model: Decoder, path: Steps) -> list[str]:
    """Hugging Face's names of a parameter: one, or where it is a stack one a layer."""
    layers = range(model.config.num_hidden_layers)
    return [hf_name(path, (i,)) for i in layers] if is_stack(path) else [hf_name(path)]


def _modules(model: Decoder, path: Steps) -> list[str]:
    """Hugging Face's names of a module: one, or where it is a stack one a layer."""
    return [name.rpartition(".")[0] for name in _names(model, (*path, "kernel"))]
