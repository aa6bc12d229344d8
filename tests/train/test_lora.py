"""LoRA: the base at init, the merged weights after training, and gradients for adapters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train import loop, lora, model

CONFIG = model.Config(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 6)).astype(np.int32)


def adapted(**options) -> model.Decoder:
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0))
    lora.add_lora(decoder, **{"rank": 3, "alpha": 6.0, "rngs": nnx.Rngs(1)} | options)
    return decoder


def with_random_adapters(decoder: model.Decoder) -> model.Decoder:
    rng = np.random.default_rng(2)
    _, params, _ = model.split(decoder, nnx.LoRAParam)
    random = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    nnx.update(decoder, nnx.State(random))
    return decoder


def test_adapters_start_as_the_base():
    base = model.Decoder(CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapted()(TOKENS), base(TOKENS))


def test_one_layer_is_the_equation():
    linear = nnx.Linear(5, 4, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    layer = lora.LoRALinear(linear, rank=2, alpha=3.0, rngs=nnx.Rngs(1))
    layer.lora_B[...] = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    a, b = np.asarray(layer.lora_A[...]), np.asarray(layer.lora_B[...])
    expected = x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...]) + 1.5 * x @ a @ b
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(a).max() <= 5**-0.5
    assert np.abs(a).min() > 0


def dora_layer(bias=True, column_of_zeros=False):
    linear = nnx.Linear(
        *(5, 4), use_bias=bias, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0)
    )
    if column_of_zeros:
        linear.kernel[...] = linear.kernel[...].at[:, 2].set(0)
    return lora.LoRALinear(linear, rank=2, alpha=3.0, rslora=True, dora=True, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_dora_is_the_equation(bias, shape):
    """Columns of W + alpha / sqrt(rank) A B, each brought to a length of its own."""
    layer, rng = dora_layer(bias), np.random.default_rng(0)
    layer.lora_B[...] = rng.normal(size=(2, 4)).astype(np.float32)
    layer.lora_magnitude[...] = rng.uniform(1, 2, size=4).astype(np.float32)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = np.asarray(layer.base.kernel[...], np.float64)
    a, b = (np.asarray(p[...], np.float64) for p in (layer.lora_A, layer.lora_B))
    full = kernel + 3 / 2**0.5 * a @ b
    full *= np.asarray(layer.lora_magnitude[...]) / np.linalg.norm(full, axis=0)
    expected = x @ full + (np.asarray(layer.base.bias[...]) if bias else 0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.merged(), full, rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_stays_one():
    layer = dora_layer(column_of_zeros=True)
    x = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(layer(x), layer.base(x), rtol=1e-5, atol=1e-6)
    assert (np.asarray(layer.merged())[:, 2] == 0).all()


@pytest.mark.parametrize("scan", [False, True])
def test_dora_of_a_bfloat16_model_starts_as_the_base_and_merges(scan):
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "scan": scan}
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0), **kinds)
    expected = np.asarray(decoder(TOKENS))
    lora.add_lora(decoder, rank=3, alpha=6.0, dora=True, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(decoder(TOKENS), expected, atol=0.01 * np.abs(expected).max())
    kinds = {leaf.dtype for leaf in jax.tree.leaves(model.split(decoder, nnx.LoRAParam)[1])}
    assert kinds == {jnp.dtype("float32")}
    layer = decoder.layers.mlp.up_proj if scan else decoder.layers[1].mlp.up_proj
    layer.lora_magnitude[...] *= 2
    doubled = 2 * np.asarray(layer.base.kernel[...], np.float32)
    lora.merge_lora(decoder)
    merged = (decoder.layers if scan else decoder.layers[1]).mlp.up_proj.kernel[...]
    np.testing.assert_allclose(np.asarray(merged, np.float32), doubled, rtol=0.01)


def test_merged_weights_give_the_adapted_model():
    decoder = with_random_adapters(adapted())
    expected = np.asarray(decoder(TOKENS))
    base = model.Decoder(CONFIG, rngs=nnx.Rngs(0))
    lora.merge_lora(decoder)
    np.testing.assert_allclose(decoder(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(base(TOKENS), expected, atol=1e-3)
    merged = model.split(decoder)
    assert jax.tree.structure(merged[1]) == jax.tree.structure(model.split(base)[1])


def test_only_adapters_are_trained():
    graphdef, params, frozen = model.split(adapted(), nnx.LoRAParam)
    names = {str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {"lora_A", "lora_B"}
    before = jax.tree.map(np.array, frozen)
    run = loop.fit(
        model.next_token_loss(graphdef), params, optax.adam(0.1), lambda _: TOKENS, 3, frozen=frozen
    )
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    changed = jax.tree.map(lambda new, old: bool(np.any(new != old)), run.params, params)
    assert all(jax.tree.leaves(changed))
    assert run.history["loss"][-1] < run.history["loss"][0]


@pytest.mark.parametrize(
    ("targets", "adapters"), [(("q_proj",), 1), (lora.ATTENTION, 4), (lora.MLP, 3)]
)
def test_targets_by_name(targets, adapters):
    _, params, _ = model.split(adapted(targets=targets), nnx.LoRAParam)
    assert len(jax.tree.leaves(params)) == 2 * adapters * CONFIG.num_hidden_layers


def test_adapters_of_a_stack_are_those_of_its_layers():
    """The same shapes per layer, the same bound of A, and a merge that gives the adapted model."""
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0), scan=True)
    lora.add_lora(decoder, rank=3, alpha=6.0, dropout=0.5, rngs=nnx.Rngs(1))
    layer = decoder.layers.mlp.down_proj
    assert layer.lora_A.shape == (2, 12, 3)
    assert 0.8 * 12**-0.5 < np.abs(layer.lora_A[...]).max() <= 12**-0.5
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in layer.key[...]}) == 2
    with_random_adapters(decoder)
    expected = np.asarray(decoder(TOKENS))
    lora.merge_lora(decoder)
    np.testing.assert_allclose(decoder(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert not lora.adapters(decoder)


def test_adapters_of_a_bfloat16_base_stay_float32():
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    lora.add_lora(decoder, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    graphdef, params, frozen = model.split(decoder, nnx.LoRAParam)
    loss_fn = model.next_token_loss(graphdef)
    grads = jax.eval_shape(jax.grad(loss_fn), params, frozen, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    lora.merge_lora(decoder)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(decoder))} == {jnp.dtype("bfloat16")}


# --- dropout -----------------------------------------------------------------------------------


def dropped_layer(rate: float) -> lora.LoRALinear:
    """A base of zero, A and B identities: what comes out is what dropout lets through."""
    linear = nnx.Linear(50, 50, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.zeros((50, 50))
    layer = lora.LoRALinear(linear, rank=50, alpha=50.0, dropout=rate, rngs=nnx.Rngs(1))
    layer.lora_A[...] = layer.lora_B[...] = jnp.eye(50)
    layer.deterministic = False
    return layer


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    x = np.ones((400, 50), np.float32)
    out = np.asarray(dropped_layer(0.3)(x))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-5)
    share = np.mean(out == 0)  # 20,000 draws: five standard deviations are 0.016
    assert abs(share - 0.3) < 0.017


def outcome(batch, **options):
    """Loss and gradients with dropout 0.4."""
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0), **options)
    lora.add_lora(decoder, rank=3, alpha=6.0, dropout=0.4, rngs=nnx.Rngs(1))
    graphdef, params, frozen = model.split(with_random_adapters(decoder), nnx.LoRAParam)
    step = jax.jit(jax.value_and_grad(model.next_token_loss(graphdef)))
    return [jax.device_get(step(params, frozen, one)) for one in batch]


@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": True}], ids=["loop", "scan"])
def test_dropout_is_a_function_of_the_step_alone(options):
    steps = [model.Batch(TOKENS, step=np.uint32(step)) for step in (3, 4, 3)]
    first, second, again = outcome(steps, **options)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert second[0] != first[0]


def test_dropout_is_off_without_a_step():
    off, no_segments = outcome([TOKENS, model.Batch(TOKENS)])
    decoder = adapted()
    graphdef, params, frozen = model.split(with_random_adapters(decoder), nnx.LoRAParam)
    expected = jax.jit(model.next_token_loss(graphdef))(params, frozen, TOKENS)
    assert off[0] == no_segments[0]
    np.testing.assert_allclose(off[0], expected, rtol=1e-6)


def test_every_adapter_drops_by_a_key_of_its_own():
    decoder = adapted(dropout=0.1)
    keys = [jax.random.key_data(layer.key[...]).tolist() for _, _, layer in lora.adapters(decoder)]
    assert len({tuple(key) for key in keys}) == len(keys) == 7 * CONFIG.num_hidden_layers


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": ["q_proj", "query"]}, r"\['query'\].* q_proj"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        adapted(**options)
