"""The decoder against a plain NumPy implementation of the Qwen2, Qwen3 and Llama block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
        n = norm(layer["input_layernorm"], x, config)
        x = x + attention(layer["self_attn"], config, n, config.window(i) or tokens.shape[1])
        n = norm(layer["post_attention_layernorm"], x, config)
        gate, up = n @ layer["mlp"]["gate_proj"]["kernel"], n @ layer["mlp"]["up_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    x = norm(params["norm"], x, config)
    if config.tie_word_embeddings:
        return x @ params["embed_tokens"]["embedding"].T
    return x @ params["lm_head"]["kernel"]


def norm(layer: dict, x: np.ndarray, config: model.Config) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * layer["scale"]


def attention(layer: dict, config: model.Config, x: np.ndarray, window: int) -> np.ndarray:
    batch, length, _ = x.shape
    size, heads = config.head_dim, config.num_attention_heads
    projected = {
        name: x @ layer[name]["kernel"] + layer[name].get("bias", 0.0)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    mixed = np.zeros((batch, length, heads * size))
    for head in range(heads):
        shared = head * config.num_key_value_heads // heads
        q = projected["q_proj"][..., head * size : (head + 1) * size]
        k = projected["k_proj"][..., shared * size : (shared + 1) * size]
        if config.qk_norm:
            q, k = norm(layer["q_norm"], q, config), norm(layer["k_norm"], k, config)
        q, k = rope(q, config), rope(k, config)
        v = projected["v_proj"][..., shared * size : (shared + 1) * size]
        for t in range(length):
            seen = slice(max(t + 1 - window, 0), t + 1)
            scores = np.einsum("bd,bsd->bs", q[:, t], k[:, seen]) / np.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed[:, t, head * size : (head + 1) * size] = np.einsum(
                "bs,bsd->bd", weights, v[:, seen]
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


def random_model(config: model.Config, seed: int = 0, **options: Any) -> tuple[model.Decoder, dict]:
    """A decoder whose every parameter, also bias and norm scale, is large and random."""
    decoder = model.Decoder(config, rngs=nnx.Rngs(seed), **options)
    rng = np.random.default_rng(seed)
    _, params, _ = model.split(decoder)
    params = jax.tree.map(lambda p: rng.normal(0.5, 0.4, p.shape).astype(np.float32), params)
    nnx.update(decoder, nnx.State(params))
    return decoder, jax.tree.map(lambda p: p.astype(np.float64), params)


@pytest.mark.parametrize(
    ("bias", "tied", "groups"),
    [(True, True, 2), (True, False, 1), (False, True, 4), (False, False, 2)],
)
def test_logits_equal_numpy(bias, tied, groups):
    config = dataclasses.replace(
        SMALL, attention_bias=bias, tie_word_embeddings=tied, num_key_value_heads=groups
    )
    decoder, params = random_model(config)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(3, 7))
    logits = nnx.jit(lambda m: m(jnp.asarray(tokens)))(decoder)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference(params, config, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True, "attention_bias": False},
        {"sliding_window": 3},
        {"sliding_window": 2, "max_window_layers": 1},
    ],
    ids=["qk_norm", "window", "window in the last layer"],
)
def test_variants_equal_numpy(change):
    config = dataclasses.replace(SMALL, **change)
    decoder, params = random_model(config)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(2, 7))
    logits = nnx.jit(lambda m: m(jnp.asarray(tokens)))(decoder)
    np.testing.assert_allclose(logits, reference(params, config, tokens), rtol=1e-4, atol=1e-4)


def stacked(params: dict) -> dict:
    """The parameters of `scan=True` from those of a list of layers."""
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *params["layers"].values())
    return {**params, "layers": layers}


RNG = np.random.default_rng(3)
BATCH = model.Batch(
    RNG.integers(SMALL.vocab_size, size=(2, 9)).astype(np.int32),
    np.repeat([[0, 0, 0, 1, 1, 1, 2, 2, 2]], 2, axis=0),
)


def outcome(params, **options):
    """Loss and gradients of packed documents under other options of the decoder."""
    graphdef, fresh, frozen = model.split(model.Decoder(SMALL, rngs=nnx.Rngs(0), **options))
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    return jax.jit(jax.value_and_grad(model.next_token_loss(graphdef)))(params, frozen, BATCH)


@pytest.fixture(scope="module")
def plain():
    """Parameters, and what they give without any option."""
    params = model.split(random_model(SMALL)[0])[1]
    return params, *outcome(params)


@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_change_nothing(scan, plain):
    params, loss, gradients = plain
    form = stacked if scan else lambda tree: tree
    other_loss, other = outcome(form(params), scan=scan, remat=True)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    expected = form(gradients)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), other, expected
    )


def test_layers_that_differ_cannot_be_a_stack():
    config = dataclasses.replace(SMALL, sliding_window=2, max_window_layers=1)
    with pytest.raises(ValueError, match="max_window_layers=1 makes layers differ"):
        model.Decoder(config, rngs=nnx.Rngs(0), scan=True)


def test_more_tokens_than_positions_are_refused():
    config = dataclasses.replace(SMALL, max_position_embeddings=4)
    decoder = model.Decoder(config, rngs=nnx.Rngs(0))
    jax.eval_shape(lambda: decoder(jnp.zeros((1, 4), jnp.int32)))
    with pytest.raises(ValueError, match=r"5 tokens in a sequence.*max_position_embeddings=4"):
        decoder(jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_computes_near_float32(param_dtype, plain):
    """Gradients have the type of the parameters, the loss is float32."""
    params, loss, gradients = plain
    rounded = jax.tree.map(lambda p: jnp.asarray(p, param_dtype), params)
    half_loss, half = outcome(rounded, dtype=jnp.bfloat16, param_dtype=param_dtype)
    assert half_loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(param_dtype)}
    assert float(half_loss) == pytest.approx(float(loss), rel=0.02)
    both = jax.tree.map(lambda near, exact: np.asarray(near, "f") - exact, half, gradients)
    assert optax.tree.norm(both) < 0.05 * optax.tree.norm(gradients)


def test_bfloat16_activations_are_not_float32_products():
    """The products of the blocks take 16-bit operands, that of the head gives float32."""
    decoder = model.Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(decoder)(jnp.zeros((2, 5), jnp.int32))
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 7 * SMALL.num_hidden_layers + 1
    assert {str(v.aval.dtype) for e in products for v in e.invars} == {"bfloat16"}
    assert products[-1].outvars[0].aval.dtype == jnp.float32


# --- packing -----------------------------------------------------------------------------------

LENGTHS = (3, 4, 2)
SEGMENTS = np.repeat(np.arange(3), LENGTHS)[None].astype(np.int32)


@pytest.mark.parametrize(
    "change", [{}, {"qk_norm": True, "sliding_window": 2}], ids=["plain", "qk_norm and window"]
)
def test_packed_documents_are_as_if_alone(change):
    """Near what each gives alone, and to the bit whatever the others are."""
    decoder, _ = random_model(dataclasses.replace(SMALL, **change))
    packed = nnx.jit(lambda m, tokens: m(tokens, jnp.asarray(SEGMENTS)))
    tokens = np.random.default_rng(5).integers(SMALL.vocab_size, size=(1, 9)).astype(np.int32)
    rows = np.zeros((3, 9), np.int32)  # one document each; what comes after it does not matter
    for number, length in enumerate(LENGTHS):
        rows[number, :length] = tokens[number == SEGMENTS]
    alone = np.asarray(nnx.jit(lambda m: m(rows))(decoder))
    together = np.asarray(packed(decoder, tokens))[0]
    for number, length in enumerate(LENGTHS):
        own = number == SEGMENTS[0]
        np.testing.assert_allclose(together[own], alone[number, :length], rtol=1e-4, atol=1e-4)
        others = np.where(own, tokens, (tokens + 7) % SMALL.vocab_size)
        changed = np.asarray(packed(decoder, others))[0]
        np.testing.assert_array_equal(changed[own], together[own])
        assert np.all(np.abs(changed - together)[~own].max(-1) > 0)


def test_the_loss_of_packed_documents_is_the_mean_of_their_own():
    """Weighted with their targets; the first token of a document is nobody's target."""
    decoder, _ = random_model(SMALL)
    graphdef, params, frozen = model.split(decoder)
    loss_fn = jax.jit(model.next_token_loss(graphdef))
    tokens = np.random.default_rng(7).integers(SMALL.vocab_size, size=(1, 9)).astype(np.int32)
    starts = np.cumsum((0, *LENGTHS[:-1]))
    rows = np.full((3, 1, 9), model.IGNORED, np.int32)
    for row, start, length in zip(rows, starts, LENGTHS, strict=True):
        row[0, :length] = tokens[0, start : start + length]
    own = [loss_fn(params, frozen, row) for row in rows]
    expected = np.average(own, weights=np.array(LENGTHS) - 1)
    loss = loss_fn(params, frozen, model.Batch(tokens, SEGMENTS))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_positions_begin_again_with_every_document():
    given = np.array([[0, 0, 0, 5, 5, 2, 2, 2, 2]])
    found = model._positions(9, jnp.asarray(given), SMALL)
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


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
    logits = nnx.jit(lambda m, tokens: m(tokens))
    moved = np.abs(np.asarray(logits(decoder, tokens) - logits(decoder, changed))).max(-1)[0]
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
    step = jax.jit(jax.value_and_grad(model.next_token_loss(graphdef)))
    loss, grads = step(params, frozen, padding)
    assert loss == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_key_value_heads": 3}, "num_key_value_heads=3"), ({"head_dim": 7}, "head_dim=7")],
)
def test_impossible_shapes_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SMALL, **change)
