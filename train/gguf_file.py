"""Models of GGUF files in: shape, weights (also quantised ones), and tokenizer."""

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.files import WeightsError
from train.model import frequencies
from train.presets import Config
from train.tensors import EMBEDDING, HEAD, Index


class GgufCheckpoint:
    """The tensors of a GGUF file under Hugging Face's names, each decoded when it is read.

    Attributes:
      shapes: of every tensor.
      problems: none, for a damaged file is refused at once.
      about: what a `config.json` would say.

    Raises:
      WeightsError: for a damaged file, an architecture other than llama, qwen2 and qwen3, and
        metadata that ask for what the decoder does not do.
      ImportError: without gguf.
    """

    def __init__(self, path: Path):
        self.origin, self.problems = str(path), list[str]()
        self._gguf = _gguf()
        fields, self._tensors = _read(path)
        names = {_hf_name(name): name for name in self._tensors}
        self._names = names
        self.shapes = {hf: _shape(self._tensors[name]) for hf, name in names.items()}
        self._permuted = False
        self.about = _about(path, fields, self.shapes)
        if _SCALING in self.shapes:
            self.about["rope_parameters"] = _llama3(
                path, self.about, self.read(_SCALING, (slice(None),))
            )
            del self.shapes[_SCALING]
        self._permuted = self.about["model_type"] == "llama"

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, float32."""
        tensor = self._tensors[self._names[name]]
        rows = np.arange(self.shapes[name][0])[index[0]]
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = _row_there(rows, Config.from_hf(self.about).head_dim)
        try:
            decoded = self._gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.origin} holds {name} as {tensor.tensor_type.name}, which gguf cannot "
                "decode: take another quantisation of the model"
            ) from error
        return decoded[(slice(None), *index[1:])]


def tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file, as `transformers` makes it of the metadata.

    Raises:
      WeightsError: for one that is not there, or that splits text in a way that is not known.
    """
    import transformers
    from tokenizers import decoders, pre_tokenizers

    fields, _ = _read(path)
    kind = fields.get("tokenizer.ggml.model")
    splits = fields.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and splits not in {*_SPLITS, *_OURS}):
        raise WeightsError(
            f"{path} has a tokenizer of the kind {kind!r} that splits text as {splits!r}: known "
            f"are llama, and gpt2 with {', '.join(sorted({*_SPLITS, *_OURS}))}; take the model's "
            "directory with safetensors"
        )
    found = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    if kind == "gpt2" and splits in _OURS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, levels])
    if kind == "llama" and fields.get("tokenizer.ggml.add_space_prefix") is False:
        # transformers does not read the field, and always puts a space before a text.
        spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
        found.backend_tokenizer.pre_tokenizer = spaces
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        found.backend_tokenizer.decoder = decoders.Sequence(steps)
    return found


_SPLITS = {"default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "qwen2", "deepseek-r1-qwen"}
"""What `transformers` makes of a file, by the name of the pre-tokenizer."""
_OURS = {"smollm"}
"""GPT-2's, with every digit alone."""
_SPACE = "▁"
"""As SentencePiece writes it."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, but for the vocabulary, and tensors as the file has them."""
    try:
        reader = _gguf().GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
        }
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise WeightsError(
            f"{path} is no GGUF file, or is cut off ({error}): get it anew"
        ) from error
    if fields.get("split.count", 1) > 1:
        raise WeightsError(
            f"{path} is one part of several: join them with llama-gguf-split --merge"
        )
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


# --- names and layouts -------------------------------------------------------------------------

_SCALING = "rope_freqs.weight"
_OUTSIDE = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; its own where there is none.

    >>> _hf_name("blk.3.attn_q.bias")
    'model.layers.3.self_attn.q_proj.bias'
    """
    block, _, rest = name.partition(".")
    if block != "blk":
        return _OUTSIDE.get(name, name)
    layer, _, inside = rest.partition(".")
    module, _, leaf = inside.rpartition(".")
    return f"model.layers.{layer}.{_INSIDE.get(module, module)}.{leaf}"


def _row_there(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where a row of q or k lies in a llama file, which has the halves of a head interleaved.

    >>> _row_there(np.arange(6), head_dim=6)
    array([0, 2, 4, 1, 3, 5])
    """
    head, within = np.divmod(rows, head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


# --- metadata ----------------------------------------------------------------------------------

_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
_CHECKED = {"attention.value_length", "rope.dimension_count"}
_SAYS_NOTHING = {"vocab_size", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"}
_SAYS_NOTHING |= {"rope.scaling.original_context_length", "rope.scaling.finetuned"}


def _about(
    path: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """A `config.json` of the metadata; every field of the architecture is understood or refused."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise WeightsError(
            f"{path} is of the architecture {kind!r}: llama, qwen2 and qwen3 are read"
        )
    own = {n.removeprefix(f"{kind}."): v for n, v in fields.items() if n.startswith(f"{kind}.")}
    about = {hf: own[name] for name, hf in _FIELDS.items() if name in own}
    if lacking := sorted({*_NEEDED} - about.keys()):
        raise WeightsError(f"{path} does not say {', '.join(lacking)}: get it anew")
    known = {*_FIELDS, *_CHECKED, *_SAYS_NOTHING}
    refused = {name: value for name, value in own.items() if value and name not in known}
    refused |= {name: own[name] for name in _FIELDS if name in own and not _is_one(own[name])}
    refused |= {name: own[name] for name, plain in _PLAIN.items() if own.get(name, plain) != plain}
    if not refused:
        about.setdefault("head_dim", about["hidden_size"] // about["num_attention_heads"])
        size = about["head_dim"]
        refused |= {name: own[name] for name in _CHECKED if own.get(name, size) != size}
    if refused:
        named = ", ".join(f"{kind}.{name}={value!r}" for name, value in sorted(refused.items()))
        raise WeightsError(f"{path} asks for {named}: this is not implemented")
    return {
        **about,
        **_ids(fields),
        "model_type": kind,
        "vocab_size": shapes.get(EMBEDDING, (0,))[0],
        "tie_word_embeddings": HEAD not in shapes,
        "rope_parameters": _rope(own),
    }


_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "rms_norm_eps",
)
_PLAIN = {"attention.causal": True}


def _is_one(value: Any) -> bool:
    """Whether it is one number for the whole model, and not one for each layer."""
    return isinstance(value, numbers.Real) and float(value) > 0


def _ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids; a text ends with the end of a text, and with the end of a turn."""
    found = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    ends = [found[name] for name in ("eos", "eot") if found[name] is not None]
    return {
        "bos_token_id": found["bos"],
        "eos_token_id": ends[0] if len({*ends}) == 1 else sorted({*ends}) or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _llama3(path: Path, about: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a file holds only by what it divides each frequency."""
    rope = about["rope_parameters"]
    scaled = {
        **rope,
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, found = (
        frequencies(Config.from_hf({**about, "rope_parameters": kind})) for kind in (rope, scaled)
    )
    if divisors.shape != plain.shape or not np.allclose(plain / found, divisors, rtol=1e-3):
        raise WeightsError(
            f"{path} scales rotary frequencies ({_SCALING}) otherwise than Llama 3.1 does: this is "
            "not implemented"
        )
    return scaled


def _rope(own: Mapping[str, Any]) -> dict[str, Any]:
    """As `config.json` has it; a scaling that the decoder has not is refused by `Config`."""
    # A factor without a type is that of a linear scaling, as llama.cpp reads it.
    plain = "linear" if own.get("rope.scaling.factor", 0) not in (0, 1) else "none"
    kind = own.get("rope.scaling.type", plain)
    return {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": own.get("rope.freq_base", 10_000.0),
    }


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need gguf: pip install --group gguf") from error
    return gguf
