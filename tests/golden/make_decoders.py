"""Golden numbers of small decoders, from the torch code of `transformers`.

Run ``python tests/golden/make_decoders.py`` with the extra `parity` to write `decoders.npz`. Each
case holds its `config.json`, all weights, tokens and positions, and what torch makes of them:
logits, the mean next-token loss, and its gradient of every parameter, in float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("decoders.npz")
SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40_000,
    "initializer_range": 0.3,
    "pad_token_id": None,  # torch gives the embedding of padding no gradient
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 400,  # so that one frequency lies in between
}
LONG = {"rope_type": "default", "rope_theta": 1e6}
CASES: dict[str, dict[str, Any]] = {
    "qwen2-tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": LONG,
    },
    "qwen2-untied-window": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": LONG,
    },
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 4},
    "llama3-rope": {"model_type": "llama", "head_dim": 8, "rope_parameters": LLAMA3},
}
MIXTURE = {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        **MIXTURE,
    },
    "qwen3-moe-raw-weights": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        **MIXTURE,
        "num_experts_per_tok": 3,
    },
    "mixtral": {"model_type": "mixtral", "sliding_window": 5, **MIXTURE},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    "gemma": {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "sliding_window": 4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""Compared with torch where it is installed, and not stored."""


def build(case: str, seed: int = 0) -> Any:
    """The torch model of a case; biases and norms are random, too."""
    import torch
    import transformers

    settings = SMALL | (CASES | OTHERS)[case]
    config = transformers.AutoConfig.for_model(**settings, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.8, 0.3)
            if parameter.ndim == 3 or name.endswith("mlp.gate.weight"):  # experts, routers
                parameter.normal_(0.0, 0.3)
    return model


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of two sequences; those of the second lie far from each other.

    Only distances between positions matter, so that a frequency which is slightly wrong would not
    be seen in a sequence that merely starts late.
    """
    tokens = np.random.default_rng(seed).integers(SMALL["vocab_size"], size=(2, 12))
    positions = np.arange(12)[None] * np.array([[1], [2_917]])
    return tokens.astype(np.int32), positions.astype(np.int32)


def outcome(model: Any, tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """What torch makes of the batch: logits, loss, and gradients by parameter name.

    The loss of a mixture holds its load-balance loss, with the coefficient of its configuration.
    """
    import torch

    model.zero_grad()
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = _called(model, ids, positions).logits
    flat = logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
    if hasattr(model.config, "router_aux_loss_coef"):  # of the tokens that have a target
        routed = _called(model, ids[:, :-1], positions[:, :-1], output_router_logits=True)
        loss = loss + model.config.router_aux_loss_coef * routed.aux_loss
    loss.backward()
    gradients = {
        f"gradient/{part}": gradient
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for part, gradient in _as_filed(name, parameter.grad.numpy().copy())
    }
    logits, loss = logits.detach().numpy(), loss.detach().numpy()
    return {"logits": logits, "loss": loss, **gradients}


def _as_filed(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The experts of a layer are one parameter in torch's model, and one each in its files."""
    if ".experts." not in name:
        yield name, value
        return
    below, _, kind = name.rpartition(".")
    for expert, part in enumerate(value):
        gate_up = np.split(part, 2) if kind == "gate_up_proj" else [part]
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for own, matrix in zip(kinds, gate_up, strict=True):
            yield f"{below}.{expert}.{own}.weight", matrix


def logits(model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What torch makes of the batch, alone."""
    import torch

    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        return _called(model.eval(), ids, positions).logits.numpy()


def _called(model: Any, ids: Any, positions: np.ndarray, **other: Any) -> Any:
    import torch

    places = torch.tensor(positions, dtype=torch.long)
    # Without a mask, positions that jump would mean packed documents.
    mask = torch.ones_like(ids)
    return model(ids, position_ids=places, attention_mask=mask, **other)


def contents() -> dict[str, np.ndarray]:
    """All that the file holds, as "case/what"."""
    found: dict[str, np.ndarray] = {}
    for case in CASES:
        model = build(case)
        tokens, positions = batch()
        weights = {f"weight/{n}": p.detach().numpy() for n, p in model.named_parameters()}
        config = np.array(json.dumps(model.config.to_dict(), default=str))
        parts = {"config": config, "tokens": tokens, "positions": positions, **weights}
        parts |= outcome(model, tokens, positions)
        found |= {f"{case}/{name}": value for name, value in parts.items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **contents())
    print(f"{FILE}: {FILE.stat().st_size / 1000:.0f} kB")
