"""Architectures of `transformers`: what each of them fixes, and its `config.json` in and out."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from train.presets import Config


class Llama3Rope(NamedTuple):
    """Llama 3.1's rotary scaling, by the names of `rope_scaling` in a `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Experts(NamedTuple):
    """A mixture of experts in every layer, by the names of Qwen3-MoE's `config.json`.

    Attributes:
      num_experts: MLPs of a layer, and `num_experts_per_tok` those that a token is sent to.
      moe_intermediate_size: width of one of them.
      norm_topk_prob: whether the weights of a token's experts sum to 1.
      router_aux_loss_coef: weight of the load-balance loss.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001


class Architecture(NamedTuple):
    """Name of the class, the switches of `Config` that are on, and what no field stands for."""

    name: str
    switches: dict[str, Any] = {}  # noqa: RUF012
    defaults: dict[str, Any] = {}  # noqa: RUF012
    has_experts: bool = False


_GEMMA: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_offset": True,
    "scaled_embedding": True,
}
_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
ARCHITECTURES = {
    "qwen2": Architecture("Qwen2ForCausalLM", {"attention_bias": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", {"qk_norm": True}, {"head_dim": 128}),
    "llama": Architecture("LlamaForCausalLM", {}, {"max_position_embeddings": 2048}),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", {"qk_norm": True}, has_experts=True),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        defaults={"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        has_experts=True,
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        {"joint_qk_norm": True, "norms": "after"},
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "gemma": Architecture(
        "GemmaForCausalLM", _GEMMA, {"max_position_embeddings": 8192, **_GEMMA_DEFAULTS}
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        {"qk_norm": True, "norms": "both", **_GEMMA},
        {"max_position_embeddings": 131_072, "rope_theta": 1e6, **_GEMMA_DEFAULTS},
    ),
}
"""By `model_type`."""

_OFF = {
    "attention_bias": False,
    "qk_norm": False,
    "joint_qk_norm": False,
    "norms": "before",
    "hidden_act": "silu",
    "norm_offset": False,
    "scaled_embedding": False,
}
_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_SAME_IN_HF = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)


# --- in ----------------------------------------------------------------------------------------


def fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Config` that a `config.json` asks for.

    Raises:
      ValueError: with one sentence for an architecture, or a feature of one, that the decoder
        does not have.
    """
    kind = given.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type={kind!r} is none of the decoder's: {known}")
    _refuse_malformed(given)
    _refuse_unknown(given, kind)
    known_of = {**_DEFAULTS, **ARCHITECTURES[kind].defaults}
    heads = given["num_attention_heads"]
    return {
        **_OFF,
        **ARCHITECTURES[kind].switches,
        **{name: given.get(name, value) for name, value in known_of.items()},
        **{name: given[name] for name in _SAME_IN_HF[:5]},
        "num_key_value_heads": given.get("num_key_value_heads") or heads,
        "head_dim": given.get("head_dim")
        or known_of.get("head_dim", given["hidden_size"] // heads),
        "query_pre_attn_scalar": given.get("query_pre_attn_scalar", 256)
        if kind == "gemma3_text"
        else None,
        "experts": _experts(given, kind),
        **_window(given, kind),
        **_rotation(given, kind, known_of["rope_theta"]),
    }


def _refuse_malformed(given: Mapping[str, Any]) -> None:
    """Raise for a field that is missing, or can be nothing of its kind."""
    if lacking := [name for name in _SAME_IN_HF[:5] if name not in given]:
        raise ValueError(f"config.json does not say {', '.join(lacking)}: get it anew")
    for names, words, holds in _KINDS:
        for name in names:
            value = given.get(name)
            is_set = value is not None or (name in given and name not in _MAY_BE_NULL)
            if is_set and not holds(value):
                raise ValueError(f"{name}={value!r} in config.json must be {words}: get it anew")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


_KINDS: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (
        (
            *(*_SAME_IN_HF[:7], "max_position_embeddings", "sliding_window"),
            *("sliding_window_pattern", "moe_intermediate_size"),
            *("num_experts", "num_local_experts", "num_experts_per_tok"),
        ),
        "a whole number from 1 on",
        lambda value: _is_whole(value) and value >= 1,
    ),
    (
        ("max_window_layers",),
        "a whole number from 0 on",
        lambda value: _is_whole(value) and value >= 0,
    ),
    (
        ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
        "a finite number above 0",
        _is_positive,
    ),
    (
        ("router_aux_loss_coef",),
        "a finite number, 0 or above",
        lambda value: value == 0 or _is_positive(value),
    ),
    (
        ("tie_word_embeddings", "use_sliding_window", "norm_topk_prob"),
        "true or false",
        lambda value: isinstance(value, bool),
    ),
    (
        ("rope_scaling", "rope_parameters"),
        "an object",
        lambda value: isinstance(value, Mapping),
    ),
]
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window"}
_MAY_BE_NULL |= {"rope_scaling", "rope_parameters"}


def _refuse_unknown(given: Mapping[str, Any], kind: str) -> None:
    wanted = {**_OFF, **ARCHITECTURES[kind].switches}["hidden_act"]
    # Gemma's first files say "gelu" and mean its tanh approximation, as transformers knows.
    activations = (None, wanted, "gelu") if kind == "gemma" else (None, wanted)
    refused = {
        "hidden_act": given.get("hidden_act") not in activations,
        "hidden_activation": given.get("hidden_activation") not in (None, wanted),
        "mlp_bias": bool(given.get("mlp_bias")),
        "attention_bias": kind != "qwen2" and bool(given.get("attention_bias")),
        "quantization_config": given.get("quantization_config") is not None,
        "attn_logit_softcapping": given.get("attn_logit_softcapping") is not None,
        "final_logit_softcapping": given.get("final_logit_softcapping") is not None,
        "use_bidirectional_attention": bool(given.get("use_bidirectional_attention")),
        "mlp_only_layers": bool(given.get("mlp_only_layers")),
        "decoder_sparse_step": given.get("decoder_sparse_step", 1) != 1,
        "router_jitter_noise": bool(given.get("router_jitter_noise")),
    }
    for name, present in refused.items():
        if present:
            raise ValueError(
                f"{name}={given[name]!r} of {kind} is nothing the decoder can do: "
                "take a checkpoint without it"
            )


def _experts(given: Mapping[str, Any], kind: str) -> Experts | None:
    """Of Mixtral the MLP's width is that of an expert, and weights always sum to 1."""
    if not ARCHITECTURES[kind].has_experts:
        return None
    mixtral = kind == "mixtral"
    count = given.get("num_experts", given.get("num_local_experts", 8 if mixtral else 128))
    return Experts(
        num_experts=count,
        num_experts_per_tok=given.get("num_experts_per_tok", 2 if mixtral else 8),
        moe_intermediate_size=given["intermediate_size"]
        if mixtral
        else given.get("moe_intermediate_size", 768),
        norm_topk_prob=mixtral or given.get("norm_topk_prob", False),
        router_aux_loss_coef=given.get("router_aux_loss_coef", 0.001),
    )


def _window(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The sliding window, and which layers see everything."""
    if kind == "gemma3_text":
        window, every = given.get("sliding_window", 4096), _full_every(given)
        if window is None:
            raise ValueError("sliding_window=None of gemma3_text: most of its layers have one")
        return {"sliding_window": window, "sliding_window_pattern": every}
    if kind == "mixtral":
        return {"sliding_window": given.get("sliding_window"), "max_window_layers": 0}
    if not kind.startswith("qwen"):
        return {"sliding_window": None, "max_window_layers": 0}
    if not given.get("use_sliding_window"):
        if "sliding_attention" in (given.get("layer_types") or []):
            raise ValueError(
                "layer_types name sliding attention, and use_sliding_window=false: one is wrong"
            )
        return {"sliding_window": None, "max_window_layers": 0}
    layers = given["num_hidden_layers"]
    # Mixtures have no layers below a window: transformers puts it on all of them.
    full = 0 if kind == "qwen3_moe" else given.get("max_window_layers", 28)
    kinds = given.get("layer_types") or []
    expected = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    if kinds and kinds != expected:
        raise ValueError(
            "layer_types alternate between full and sliding attention; the decoder has full "
            "attention up to max_window_layers and a window from there on"
        )
    if full >= layers:
        return {"sliding_window": None, "max_window_layers": 0}
    return {"sliding_window": given.get("sliding_window", 4096), "max_window_layers": full}


def _full_every(given: Mapping[str, Any]) -> int:
    """Of Gemma 3: every so-manyth layer sees everything."""
    layers = given["num_hidden_layers"]
    every = given.get("sliding_window_pattern", 6)
    kinds = given.get("layer_types") or _layer_types(layers, every)
    if "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
    if kinds != _layer_types(layers, every):
        raise ValueError(
            "layer_types follow no pattern; of Gemma 3 the decoder has full attention in every "
            "so-manyth layer and a window in the others"
        )
    return every


def _layer_types(layers: int, every: int) -> list[str]:
    return [
        "sliding_attention" if layer % every else "full_attention" for layer in range(1, layers + 1)
    ]


def _rotation(given: Mapping[str, Any], kind: str, theta: float) -> dict[str, Any]:
    """Bases and scaling, from transformers 5's `rope_parameters` or from the older fields.

    Where both are there, the older `rope_scaling` is what transformers takes.
    """
    old, new = given.get("rope_scaling") or {}, given.get("rope_parameters") or {}
    rope, near = old or new, dict[str, Any]()
    if kind == "gemma3_text":
        if new and not {"full_attention", "sliding_attention"} & new.keys():
            raise ValueError(
                "rope_parameters of gemma3_text are those of full_attention and of "
                "sliding_attention, and there are neither: get config.json anew"
            )
        local = new.get("sliding_attention") or {}
        base = local.get("rope_theta", given.get("rope_local_base_freq", 10_000.0))
        _scaling(local, given)
        near = {"rope_local_base_freq": float(base)}
        rope = {**(new.get("full_attention") or {}), **old}
    far = rope.get("rope_theta", given.get("rope_theta", theta))
    return {"rope_theta": float(far), "rope_scaling": _scaling(rope, given), **near}


def _scaling(rope: Mapping[str, Any], given: Mapping[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor")) or 1.0
    if kind not in ("default", "llama3") or partial != 1.0:
        raise ValueError(
            f"rotary embedding of type {kind!r} on {partial:.0%} of a head: the decoder has "
            "'default' and 'llama3' on all of it; a yarn scaling may be taken out of config.json "
            "where no sequence is longer than its original_max_position_embeddings"
        )
    if several := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rotary embeddings of several kinds, {', '.join(several)}: one is known")
    if kind == "default":
        return None
    # As in transformers: a length beside goes before one inside, and the model's own comes last.
    length = "original_max_position_embeddings"
    known = {length: given.get("max_position_embeddings"), **rope}
    known |= {length: given[length]} if length in given else {}
    if odd := [name for name in Llama3Rope._fields if not _is_positive(known.get(name))]:
        raise ValueError(f"rotary embedding of type 'llama3' without {', '.join(odd)}: get it anew")
    return Llama3Rope(*(known[name] for name in Llama3Rope._fields))


# --- out ---------------------------------------------------------------------------------------


def described(config: "Config") -> dict[str, Any]:
    """The `config.json` with which `transformers` builds this decoder.

    Raises:
      ValueError: where none of its architectures is this one.
    """
    kind = _kind(config)
    same = {name: getattr(config, name) for name in _SAME_IN_HF}
    activation = "hidden_activation" if kind == "gemma3_text" else "hidden_act"
    return {
        "architectures": [ARCHITECTURES[kind].name],
        "model_type": kind,
        activation: config.hidden_act,
        **same,
        **_rotation_described(config, kind),
        **_window_described(config, kind),
        **_experts_described(config, kind),
    }


def model_type(config: "Config") -> str | None:
    """The architecture of this name has the switches of `config`; None: there is none."""
    for kind, architecture in ARCHITECTURES.items():
        switches = {**_OFF, **architecture.switches}
        same = all(getattr(config, name) == value for name, value in switches.items())
        if same and architecture.has_experts == (config.experts is not None):
            return kind
    return None


def _kind(config: "Config") -> str:
    kind = model_type(config)
    windowed, patterned = config.sliding_window is not None, config.sliding_window_pattern
    odd = {
        "sliding_window": windowed and kind in ("llama", "olmo2", "gemma"),
        "max_window_layers": bool(config.max_window_layers) and kind not in ("qwen2", "qwen3"),
        "sliding_window_pattern": (patterned is not None) != (kind == "gemma3_text"),
        "rope_local_base_freq": (config.rope_local_base_freq is not None)
        != (kind == "gemma3_text"),
        "query_pre_attn_scalar": (config.query_pre_attn_scalar is not None)
        != (kind == "gemma3_text"),
        "experts": kind == "mixtral" and _is_no_mixtral(config),
    }
    if kind is None or any(odd.values()):
        names = [*_OFF, *(name for name, is_odd in odd.items() if is_odd)]
        together = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        raise ValueError(f"no architecture of transformers has {together} together")
    return kind


def _is_no_mixtral(config: "Config") -> bool:
    experts = config.experts
    width = config.intermediate_size
    return experts is None or not experts.norm_topk_prob or experts.moe_intermediate_size != width


def _experts_described(config: "Config", kind: str) -> dict[str, Any]:
    if config.experts is None:
        return {}
    given = config.experts._asdict()
    if kind == "mixtral":
        given["num_local_experts"] = given.pop("num_experts")
        del given["moe_intermediate_size"], given["norm_topk_prob"]
        return given
    return {**given, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _window_described(config: "Config", kind: str) -> dict[str, Any]:
    window = {"sliding_window": config.sliding_window}
    if kind == "gemma3_text" and config.sliding_window_pattern is not None:
        every = config.sliding_window_pattern
        return {
            **window,
            "sliding_window_pattern": every,
            "layer_types": _layer_types(config.num_hidden_layers, every),
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
    if kind == "mixtral":
        return window
    if not kind.startswith("qwen"):
        return {}
    windowed = {"use_sliding_window": config.sliding_window is not None, **window}
    return {**windowed, "max_window_layers": config.max_window_layers}


def _rotation_described(config: "Config", kind: str) -> dict[str, Any]:
    """transformers 4 reads the first fields, 5 the last."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **config.rope_scaling._asdict()}
    parameters: dict[str, Any] = {**scaling, "rope_theta": config.rope_theta}
    old = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else scaling,
    }
    if kind == "gemma3_text":
        local = config.rope_local_base_freq
        old["rope_local_base_freq"] = local
        near = {"rope_type": "default", "rope_theta": local}
        parameters = {"full_attention": parameters, "sliding_attention": near}
    return {**old, "rope_parameters": parameters}
