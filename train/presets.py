"""Shapes of decoders: `Config`, Hugging Face's `config.json` in and out, and published sizes."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Llama3Rope(NamedTuple):
    """Llama 3.1's rotary scaling, by the names of `rope_scaling` in a `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Config:
    """Shape of a decoder; the fields are those of a Hugging Face Qwen2/Llama `config.json`.

    `attention_bias` is Qwen2's: on queries, keys and values, not on the output. `qk_norm` is
    Qwen3's RMSNorm of every query and key head. Layers from `max_window_layers` on see
    `sliding_window` tokens, their own included; None is all of them. Raises `ValueError` for
    shapes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    max_position_embeddings: int = 32_768
    rope_scaling: Llama3Rope | None = None
    sliding_window: int | None = None
    max_window_layers: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: a token sees at least itself")

    def window(self, layer: int) -> int | None:
        """How many tokens this layer sees, its own included; None: all of them."""
        return self.sliding_window if layer >= self.max_window_layers else None

    @classmethod
    def from_hf(cls, source: Any) -> "Config":
        """From a `config.json` (a mapping), or from a configuration object of `transformers`.

        Raises `ValueError` with one sentence for an architecture, or a feature of one, that the
        decoder does not have.

        >>> llama = dict(model_type="llama", vocab_size=32000, hidden_size=64, num_hidden_layers=2,
        ...              intermediate_size=96, num_attention_heads=4, rms_norm_eps=1e-5)
        >>> config = Config.from_hf(llama)
        >>> config.head_dim, config.num_key_value_heads, config.attention_bias
        (16, 4, False)
        """
        given = dict(source if isinstance(source, Mapping) else source.to_dict())
        _refuse_unknown(given)
        kind, heads = given["model_type"], given["num_attention_heads"]
        window, full_layers = _window(given)
        theta, scaling = _rope(given)
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim")
            or (128 if kind == "qwen3" else given["hidden_size"] // heads),
            rope_theta=theta,
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            attention_bias=kind == "qwen2",
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            max_position_embeddings=given.get(
                "max_position_embeddings", 2048 if kind == "llama" else 32_768
            ),
            rope_scaling=scaling,
            sliding_window=window,
            max_window_layers=full_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` with which `transformers` builds this decoder.

        Raises `ValueError` where none of its architectures is this one.

        >>> PRESETS["tiny"].to_hf()["architectures"]
        ['Qwen2ForCausalLM']
        """
        kind, architecture = _ARCHITECTURES.get((self.attention_bias, self.qk_norm), ("", ""))
        windowed = self.sliding_window is not None
        if not kind or (windowed and kind == "llama"):
            raise ValueError(
                f"no architecture of transformers has attention_bias={self.attention_bias}, "
                f"qk_norm={self.qk_norm} and sliding_window={self.sliding_window} together"
            )
        same = {name: getattr(self, name) for name in _SAME_IN_HF}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {"rope_type": "llama3", **self.rope_scaling._asdict()}
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        window = {
            "use_sliding_window": windowed,
            "sliding_window": self.sliding_window,
            "max_window_layers": self.max_window_layers,
        }
        return {
            "architectures": [architecture],
            "model_type": kind,
            "hidden_act": "silu",
            **same,
            "rope_theta": self.rope_theta,  # transformers 4 reads these two, 5 the third
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "rope_parameters": rope,
            **({} if kind == "llama" else window),
        }


_ARCHITECTURES = {
    (True, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, False): ("llama", "LlamaForCausalLM"),
    (False, True): ("qwen3", "Qwen3ForCausalLM"),
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


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    kind = given.get("model_type")
    if kind not in ("qwen2", "qwen3", "llama"):
        raise ValueError(f"model_type={kind!r} is none of the decoder's: qwen2, qwen3, llama")
    refused = {
        "hidden_act": given.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(given.get("mlp_bias")),
        "attention_bias": kind != "qwen2" and bool(given.get("attention_bias")),
        "quantization_config": given.get("quantization_config") is not None,
    }
    for name, present in refused.items():
        if present:
            raise ValueError(
                f"{name}={given[name]!r} of a {kind} model is nothing the decoder can do: "
                "take a checkpoint without it"
            )


def _window(given: Mapping[str, Any]) -> tuple[int | None, int]:
    """The sliding window, and the number of layers below it that see everything."""
    layers = given["num_hidden_layers"]
    if given["model_type"] == "llama" or not given.get("use_sliding_window"):
        return None, 0
    full = given.get("max_window_layers", 28)
    kinds = given.get("layer_types") or []
    expected = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    if kinds and kinds != expected:
        raise ValueError(
            "layer_types alternate between full and sliding attention; the decoder has full "
            "attention up to max_window_layers and a window from there on"
        )
    return (None, 0) if full >= layers else (given["sliding_window"], full)


def _rope(given: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or from the older two fields."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor")) or 1.0
    if kind not in ("default", "llama3") or partial != 1.0:
        raise ValueError(
            f"rotary embedding of type {kind!r} on {partial:.0%} of a head: the decoder has "
            "'default' and 'llama3' on all of it; a yarn scaling may be taken out of config.json "
            "where no sequence is longer than its original_max_position_embeddings"
        )
    if kind == "default":
        return float(theta), None
    return float(theta), Llama3Rope(*(rope[name] for name in Llama3Rope._fields))


def preset(name: str) -> Config:
    """The published shape of this name; the organisation and "-Instruct" may be left out.

    Raises `ValueError` for a name that is not known, with the near ones.

    >>> preset("Qwen2.5-7B-Instruct") == PRESETS["Qwen/Qwen2.5-7B"]
    True
    """
    known = {full.rpartition("/")[2].lower(): full for full in PRESETS}
    wanted = name.rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-base")
    if wanted not in known:
        raise ValueError(f"there is no preset {name!r}{near(name)}")
    return PRESETS[known[wanted]]


def near(name: str) -> str:
    """Which presets a misspelt name may have meant, as the rest of a sentence."""
    short = {full.rpartition("/")[2].lower(): full for full in PRESETS}
    wanted = name.rpartition("/")[2].lower()
    close = difflib.get_close_matches(wanted, short, n=3, cutoff=0.4) or sorted(short)
    return "; near are " + ", ".join(short[found] for found in close)


def _qwen2(hidden: int, mlp: int, layers: int, heads: int, shared: int, **other: Any) -> Config:
    vocab = 151_936 if hidden <= 2048 else 152_064
    return Config(vocab, hidden, mlp, layers, heads, shared, hidden // heads, 1e6, **other)


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> Config:
    return Config(
        *(151_936, hidden, mlp, layers, heads, 8, 128, 1e6),
        attention_bias=False,
        tie_word_embeddings=tied,
        qk_norm=True,
        max_position_embeddings=40_960,
    )


_TINYLLAMA = Config(
    *(32_000, 2048, 5632, 22, 32, 4, 64, 1e4, 1e-5),
    attention_bias=False,
    tie_word_embeddings=False,
    max_position_embeddings=2048,
)
_LARGE: dict[str, Any] = {"tie_word_embeddings": False, "max_position_embeddings": 131_072}

PRESETS = {
    "tiny": Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, max_position_embeddings=131_072),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11_008, 36, 16, 2),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18_944, 28, 28, 4, **_LARGE),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 13_824, 48, 40, 8, rms_norm_eps=1e-5, **_LARGE),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 27_648, 64, 40, 8, rms_norm_eps=1e-5, **_LARGE),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 29_568, 80, 64, 8, rms_norm_eps=1e-5, **_LARGE),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17_408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25_600, 64, 64, tied=False),
    "TinyLlama/TinyLlama_v1.1": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA,
}
"""Shapes by Hugging Face name; "tiny" is this project's own, for tests and the demo."""
