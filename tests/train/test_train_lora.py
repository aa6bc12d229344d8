"""LoRA: the base at init, the merged weights after training, and gradients for adapters alone."""

import jax
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


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rank": 0}, "rank=0"), ({"targets": ["q_proj", "query"]}, r"\['query'\].* q_proj")],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        adapted(**options)
