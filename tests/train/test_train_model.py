"""The decoder against a plain NumPy implementation of the Qwen2/Llama block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train import model

SMALL = model.Config(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
)


def reference(params: dict, config: model.Config, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64, one head and one position at a time."""
    x = params["embed_tokens"]["embedding"][tokens]
    for i in range(config.num_hidden_layers):
        layer = params["layers"][i]
        x = x + attention(layer["self_attn"], config, norm(layer["input_layernorm"], x, config))
        n = norm(layer["post_attention_layernorm"], x, config)
        gate, up = n @ layer["mlp"]["gate_proj"]["kernel"], n @ layer["mlp"]["up_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    x = norm(params["norm"], x, config)
    if config.tie_word_embeddings:
        return x @ params["embed_tokens"]["embedding"].T
    return x @ params["lm_head"]["kernel"]


def norm(layer: dict, x: np.ndarray, config: model.Config) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * layer["scale"]


def attention(layer: dict, config: model.Config, x: np.ndarray) -> np.ndarray:
    batch, length, _ = x.shape
    size, heads = config.head_dim, config.num_attention_heads
    projected = {
        name: x @ layer[name]["kernel"] + layer[name].get("bias", 0.0)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    mixed = np.zeros((batch, length, heads * size))
    for head in range(heads):
        shared = head * config.num_key_value_heads // heads
        q = rope(projected["q_proj"][..., head * size : (head + 1) * size], config)
        k = rope(projected["k_proj"][..., shared * size : (shared + 1) * size], config)
        v = projected["v_proj"][..., shared * size : (shared + 1) * size]
        for t in range(length):
            scores = np.einsum("bd,bsd->bs", q[:, t], k[:, : t + 1]) / np.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed[:, t, head * size : (head + 1) * size] = np.einsum(
                "bs,bsd->bd", weights, v[:, : t + 1]
            )
    return mixed @ layer["o_proj"]["kernel"]


def rope(x: np.ndarray, config: model.Config) -> np.ndarray:
    """Each pair (i, i + size/2) as a complex number, turned by position * theta^(-2i/size)."""
    half = config.head_dim // 2
    speed = config.rope_theta ** (-2 * np.arange(half) / config.head_dim)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.arange(x.shape[1])[:, None] * speed
    )
    return np.concatenate((turned.real, turned.imag), axis=-1)


def random_model(config: model.Config, seed: int = 0) -> tuple[model.Decoder, dict]:
    """A decoder whose every parameter, also bias and norm scale, is large and random."""
    decoder = model.Decoder(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    _, params, _ = model.split(decoder)
    params = jax.tree.map(lambda p: rng.normal(0.5, 0.4, p.shape).astype(np.float32), params)
    nnx.update(decoder, nnx.State(params))
    return decoder, jax.tree.map(lambda p: p.astype(np.float64), params)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_logits_equal_numpy(bias, tied, groups):
    config = dataclasses.replace(
        SMALL, attention_bias=bias, tie_word_embeddings=tied, num_key_value_heads=groups
    )
    decoder, params = random_model(config)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(3, 7))
    logits = decoder(jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference(params, config, tokens), rtol=1e-4, atol=1e-4)


def test_parameters_are_those_of_the_config():
    _, params, frozen = model.split(model.Decoder(SMALL, rngs=nnx.Rngs(0)))
    attention = params["layers"][0]["self_attn"]
    assert {name: p["kernel"].shape for name, p in attention.items()} == {
        "q_proj": (12, 24),
        "k_proj": (12, 12),
        "v_proj": (12, 12),
        "o_proj": (24, 12),
    }
    assert {name for name, p in attention.items() if "bias" in p} == {"q_proj", "k_proj", "v_proj"}
    assert "lm_head" not in params
    assert jax.tree.leaves(frozen) == []


def test_matrices_start_normal_with_deviation_002():
    _, params, _ = model.split(model.Decoder(model.PRESETS["tiny"], rngs=nnx.Rngs(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim == 2:
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.03), path
            assert abs(float(leaf.mean())) < 0.001, path


def test_a_token_changes_only_what_comes_after():
    decoder, _ = random_model(SMALL)
    tokens = np.random.default_rng(2).integers(SMALL.vocab_size, size=(1, 8))
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % SMALL.vocab_size
    moved = np.abs(np.asarray(decoder(tokens) - decoder(changed))).max(-1)[0]
    assert np.all(moved[:5] == 0)
    assert np.all(moved[5:] > 0)


def test_cross_entropy_counts_only_real_targets():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
    targets = np.array([[1, 0, model.IGNORED, 4], [model.IGNORED] * 3 + [2]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = [(b, t, k) for (b, t), k in np.ndenumerate(targets) if k != model.IGNORED]
    expected = -np.mean([np.log(probabilities[place]) for place in kept])
    assert float(model.cross_entropy(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
    graphdef, params, frozen = model.split(model.Decoder(SMALL, rngs=nnx.Rngs(0)))
    padding = jnp.full((2, 5), model.IGNORED)
    loss, grads = jax.value_and_grad(model.next_token_loss(graphdef))(params, frozen, padding)
    assert loss == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_key_value_heads": 3}, "num_key_value_heads=3"), ({"head_dim": 7}, "head_dim=7")],
)
def test_impossible_shapes_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SMALL, **change)
