"""Shapes of decoders: `Config`, Hugging Face's `config.json` in and out, and published sizes."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train import architectures
from train.architectures import Experts, Llama3Rope


@dataclass(frozen=True)
class Config:
    """Shape of a decoder; the fields are those of a Hugging Face `config.json`, or switches.

    Attributes:
      attention_bias: Qwen2's: on queries, keys and values, not on the output.
      qk_norm: Qwen3's RMSNorm of every query and key head.
      joint_qk_norm: OLMo 2's: one RMSNorm over all heads of the queries, one over the keys'.
      sliding_window: tokens that layers from `max_window_layers` on see, their own included; None
        is all of them. With a `sliding_window_pattern` only every so-manyth layer sees all.
      rope_local_base_freq: Gemma 3's `rope_theta` of the layers with a window.
      norms: RMSNorms before attention and MLP, after them (OLMo 2), or both (Gemma 3).
      norm_offset: Gemma's norms multiply by ``1 + weight``.
      scaled_embedding: Gemma multiplies the embedding by ``sqrt(hidden_size)``.
      query_pre_attn_scalar: attention is scaled by one over its root; None: by the head's size.
      experts: a mixture in place of the MLP.

    Raises `ValueError` for shapes that do not fit together.
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
    sliding_window_pattern: int | None = None
    rope_local_base_freq: float | None = None
    joint_qk_norm: bool = False
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    scaled_embedding: bool = False
    query_pre_attn_scalar: float | None = None
    experts: Experts | None = None

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
        if self.experts is not None:
            count, chosen = self.experts.num_experts, self.experts.num_experts_per_tok
            if not 1 <= chosen <= count:
                raise ValueError(f"num_experts_per_tok={chosen} of num_experts={count}")

    def window(self, layer: int) -> int | None:
        """How many tokens this layer sees, its own included; None: all of them."""
        if self.sliding_window_pattern is not None:
            return self.sliding_window if (layer + 1) % self.sliding_window_pattern else None
        return self.sliding_window if layer >= self.max_window_layers else None

    @property
    def is_mixtral(self) -> bool:
        """Whether Mixtral's names are those of its mixture's weights."""
        return architectures.model_type(self) == "mixtral"

    @property
    def balance(self) -> float:
        """Weight of the load-balance loss: 0 where there is no mixture."""
        return 0.0 if self.experts is None else self.experts.router_aux_loss_coef

    @property
    def active_width(self) -> int:
        """Width of the MLP that a token goes through: of a mixture, of all its experts together."""
        if self.experts is None:
            return self.intermediate_size
        return self.experts.num_experts_per_tok * self.experts.moe_intermediate_size

    @property
    def rotations(self) -> tuple["Config", "Config"]:
        """Whose rotary angles layers that see everything have, and layers with a window."""
        if self.rope_local_base_freq is None:
            return self, self
        base = self.rope_local_base_freq
        return self, dataclasses.replace(self, rope_theta=base, rope_scaling=None)

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
        return cls(**architectures.fields(given))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` with which `transformers` builds this decoder.

        Raises `ValueError` where none of its architectures is this one.

        >>> PRESETS["tiny"].to_hf()["architectures"]
        ['Qwen2ForCausalLM']
        """
        return architectures.described(self)


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
    close = difflib.get_close_matches(wanted, short, n=3, cutoff=0.4)
    listed = ", ".join(short[found] for found in close or sorted(short))
    return f"; {'near' if close else 'there'} are {listed}"


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


def _qwen3_moe(hidden: int, mlp: int, layers: int, heads: int, width: int) -> Config:
    return dataclasses.replace(
        _qwen3(hidden, mlp, layers, heads, tied=False),
        num_key_value_heads=4,
        experts=Experts(128, 8, width),
    )


def _mixtral(hidden: int, mlp: int, layers: int, heads: int, positions: int, coef: float) -> Config:
    return Config(
        *(32_000, hidden, mlp, layers, heads, 8, 128, 1e6, 1e-5),
        attention_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=positions,
        experts=Experts(8, 2, mlp, router_aux_loss_coef=coef),
    )


def _olmo2(hidden: int, mlp: int, layers: int, heads: int) -> Config:
    return Config(
        *(100_352, hidden, mlp, layers, heads, heads, 128, 5e5),
        attention_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        joint_qk_norm=True,
        norms="after",
    )


_GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "norm_offset": True,
    "hidden_act": "gelu_pytorch_tanh",
    "scaled_embedding": True,
}


def _gemma(hidden: int, mlp: int, layers: int, heads: int, shared: int) -> Config:
    shape = (256_000, hidden, mlp, layers, heads, shared, 256)
    return Config(*shape, max_position_embeddings=8192, **_GEMMA)


def _gemma3(hidden: int, mlp: int, layers: int, window: int) -> Config:
    return Config(
        *(262_144, hidden, mlp, layers, 4, 1, 256, 1e6),
        max_position_embeddings=32_768,
        qk_norm=True,
        norms="both",
        sliding_window=window,
        sliding_window_pattern=6,
        rope_local_base_freq=1e4,
        query_pre_attn_scalar=256,
        **_GEMMA,
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
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 768),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 12_288, 94, 64, 1536),
    "mistralai/Mixtral-8x7B-v0.1": _mixtral(4096, 14_336, 32, 32, 32_768, 0.02),
    "mistralai/Mixtral-8x22B-v0.1": _mixtral(6144, 16_384, 56, 48, 65_536, 0.001),
    "allenai/OLMo-2-0425-1B": _olmo2(2048, 8192, 16, 16),
    "allenai/OLMo-2-1124-7B": _olmo2(4096, 11_008, 32, 32),
    "allenai/OLMo-2-1124-13B": _olmo2(5120, 13_824, 40, 40),
    "google/gemma-2b": _gemma(2048, 16_384, 18, 8, 1),
    "google/gemma-7b": _gemma(3072, 24_576, 28, 16, 16),
    "google/gemma-3-270m": _gemma3(640, 2048, 18, 512),
    "google/gemma-3-1b-pt": _gemma3(1152, 6912, 26, 512),
    "TinyLlama/TinyLlama_v1.1": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA,
}
"""Shapes by Hugging Face name; "tiny" is this project's own, for tests and the demo."""
