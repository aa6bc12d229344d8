"""What the decoders show of their layers, under remat and scan, and that nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lbw_optax
from lbw_optax.activations import stacked
from lbw_optax.law import layers
from train import loop, lora, model

CONFIG = model.Config(
    vocab_size=23,
    hidden_size=64,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(3, 8)).astype(np.int32)
KINDS = {
    "list": {},
    "remat": {"remat": True},
    "scan": {"scan": True},
    "scan_remat": {"scan": True, "remat": True},
}
OUTLIER = 2  # the layer with one


@functools.cache
def decoder(kind="list", planted=True, **options):
    """With a channel of the MLP's output 300 times as large in one layer."""
    made = model.Decoder(CONFIG, rngs=nnx.Rngs(0), **KINDS[kind], **options)
    if planted and KINDS[kind].get("scan"):
        kernel = made.layers.mlp.down_proj.kernel
        kernel[...] = kernel[...].at[OUTLIER, :, 7].multiply(300)
    elif planted:
        kernel = made.layers[OUTLIER].mlp.down_proj.kernel
        kernel[...] = kernel[...].at[:, 7].multiply(300)
    return made


def found_by(made, batch=TOKENS):
    graphdef, params, frozen = model.split(made)
    watched = jax.value_and_grad(model.next_token_loss(graphdef, watched=True), has_aux=True)
    return jax.jit(watched)(params, frozen, batch)


@functools.cache
def found(kind):
    return found_by(decoder(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_with_a_planted_outlier_is_named(kind):
    (_, activations), _ = found(kind)
    peaks = np.asarray(activations["layers"].peak)
    assert peaks.argmax() == OUTLIER
    assert peaks[OUTLIER] > 1.5 * np.delete(peaks, OUTLIER).max()
    seen = layers.absorb(layers.init(), activations)
    assert int(seen.farthest) == OUTLIER
    assert 0 < float(seen.outlier_share) < 0.05
    assert float(seen.attention_logit) == float(activations["attention"].max())


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_layers_themselves(kind):
    """Against each layer by hand: what it adds to its input, and all of its logits."""
    (_, activations), _ = found(kind)
    seen, made = stacked(activations), decoder(kind)
    blocks = made.layers
    if made.scan:
        graphdef, stack = nnx.split(made.layers)
        of = range(CONFIG.num_hidden_layers)
        blocks = [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stack)) for i in of]
    tokens = jnp.asarray(TOKENS[:, :-1])
    angles = model.Angles(
        *(model.rotary_angles(jnp.arange(tokens.shape[1])[None], of) for of in CONFIG.rotations)
    )
    x = made.embed_tokens.embedding[...][tokens.reshape(-1)]
    for i, layer in enumerate(blocks):
        after, _ = layer(x, angles)
        added = np.asarray(after - x, np.float64)
        rms = np.sqrt(np.mean(added**2))
        np.testing.assert_allclose(seen.outliers.peak[i], np.abs(added).max() / rms, rtol=1e-3)
        share = np.mean(np.abs(added) > 6 * rms)
        np.testing.assert_allclose(seen.outliers.share[i], share, atol=1e-6)
        x = after
    assert seen.logits.shape == (CONFIG.num_hidden_layers,)


@pytest.mark.parametrize("kind", ["list", "scan_remat"])
def test_watching_changes_neither_loss_nor_gradient(kind):
    graphdef, params, frozen = model.split(decoder(kind))
    plain = jax.jit(jax.value_and_grad(model.next_token_loss(graphdef)))(params, frozen, TOKENS)
    (loss, _), grads = found(kind)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, (loss, grads), plain)


def test_a_step_tells_the_guard_and_of_microbatches_the_largest_counts():
    graphdef, params, frozen = model.split(decoder("scan"))
    loss_fn = model.next_token_loss(graphdef, watched=True)
    tx = lbw_optax.adamw(1e-3)
    batch = np.concatenate([TOKENS, TOKENS[::-1, ::-1]])
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    _, _, metrics = loop.train_step(loss_fn, tx.update, *carry, frozen, batch, 2)
    parts = [found_by(decoder("scan"), batch[i::2])[0][1] for i in range(2)]
    peaks = np.maximum(*(part["layers"].peak for part in parts))
    np.testing.assert_allclose(metrics["activation_peaks"], peaks, rtol=1e-5)
    logit = max(float(part["attention"].max()) for part in parts)
    assert float(metrics["attention_logit"]) == pytest.approx(logit, rel=1e-5)
    assert int(metrics["activation_layer"]) == OUTLIER


def test_adapters_are_watched_with_their_base():
    """Activations are those of the whole model; the guard is given what is trained alone."""
    made = model.Decoder(CONFIG, rngs=nnx.Rngs(0), scan=True)
    lora.add_lora(made, rank=2, alpha=4, rngs=nnx.Rngs(1))
    graphdef, params, frozen = model.split(made, nnx.LoRAParam)
    tx = lbw_optax.adamw(1e-3)
    loss_fn = model.next_token_loss(graphdef, watched=True)
    state = jax.eval_shape(tx.init, params)
    step = loop.train_step.eval_shape
    trained, _, metrics = step(loss_fn, tx.update, params, state, frozen, TOKENS)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert metrics["activation_peaks"].shape == (CONFIG.num_hidden_layers,)


def test_a_window_and_segments_are_seen_through():
    """The logits that an attention masks do not count."""
    rngs, size = nnx.Rngs(0), 12
    attention = model.Attention(CONFIG, 3, model.Dtypes(None, jnp.float32), rngs=rngs)
    random = np.random.default_rng(0)
    query, key = (
        jnp.asarray(random.normal(size=(2, size, heads, 6)), jnp.float32) for heads in (4, 2)
    )
    mask = (
        jnp.asarray(random.random((2, 1, size, size)) < 0.7) | jnp.eye(size, dtype=bool)[None, None]
    )
    logits = np.einsum("btnd,bsnd->bnts", query, np.repeat(key, 2, axis=2)) / np.sqrt(6)
    distance = np.arange(size)[:, None] - np.arange(size)
    seen = np.asarray(mask) & ((distance >= 0) & (distance < 3))
    found = attention._largest_logit(query, key, mask)
    expected = np.where(seen, logits, -np.inf).max(axis=(0, 2, 3))  # of each head
    np.testing.assert_allclose(found, expected, rtol=1e-5)
