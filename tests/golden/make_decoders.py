"""Golden numbers of small decoders, from the torch code of `transformers`.

Run ``python tests/golden/make_decoders.py`` with the extra `parity` to write `decoders.npz`. Each
case holds its `config.json`, all weights, tokens and positions, and what torch makes of them:
logits, the mean next-token loss, and its gradient of every parameter, in float32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("decoders.npz")
SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40_000,
    "initializer_range": 0.3,
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


def build(case: str, seed: int = 0) -> Any:
    """The torch model of a case; biases and norms are random, too."""
    import torch
    import transformers

    settings = SMALL | CASES[case]
    config = transformers.AutoConfig.for_model(**settings, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.8, 0.3)
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
    """What torch makes of the batch: logits, loss, and gradients by parameter name."""
    import torch

    model.zero_grad()
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = _logits(model, ids, positions)
    flat = logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
    loss.backward()
    gradients = {
        f"gradient/{name}": parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    logits, loss = logits.detach().numpy(), loss.detach().numpy()
    return {"logits": logits, "loss": loss, **gradients}


def logits(model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What torch makes of the batch, alone."""
    import torch

    with torch.no_grad():
        return _logits(model.eval(), torch.tensor(tokens, dtype=torch.long), positions).numpy()


def _logits(model: Any, ids: Any, positions: np.ndarray) -> Any:
    import torch

    places = torch.tensor(positions, dtype=torch.long)
    # Without a mask, positions that jump would mean packed documents.
    return model(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits


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
