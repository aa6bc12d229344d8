"""Published sizes, counted from shapes alone, and `config.json` in and out."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lbw_optax
from train import loop, lora, model, presets

# Totals of the published safetensors; of a tied head, the embedding counts once.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
}
# As published; what the decoder does not read is left out.
QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
TINYLLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def test_every_preset_is_counted():
    assert set(PUBLISHED) == set(model.PRESETS) - {"tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    def make():
        alike = model.PRESETS[name].sliding_window_pattern is None
        return model.Decoder(model.PRESETS[name], rngs=nnx.Rngs(0), scan=alike)

    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))
    assert sum(leaf.size for leaf in shapes) == PUBLISHED[name]


def test_a_step_of_a_large_preset_can_be_traced():
    """From shapes alone: LoRA on a bfloat16 base, in the way that 7B are trained."""

    def make():
        bfloat16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        config = model.PRESETS["Qwen/Qwen2.5-7B"]
        decoder = model.Decoder(config, rngs=nnx.Rngs(0), scan=True, remat=True, **bfloat16)
        lora.add_lora(decoder, rank=16, alpha=32, rngs=nnx.Rngs(1))
        return decoder

    graphdef, params, frozen = model.split(nnx.eval_shape(make), nnx.LoRAParam)
    step = jax.value_and_grad(model.next_token_loss(graphdef, chunk=256))
    loss, gradients = jax.eval_shape(step, params, frozen, np.zeros((2, 2049), np.int32))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(gradients)) == 40_370_176
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B"])
def test_a_full_parameter_step_above_2e31_parameters_has_its_shapes(name):
    """The whole of it, guard included, from shapes alone: no parameter is made."""
    config = model.PRESETS[name]
    bfloat16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

    def make():
        return model.Decoder(config, rngs=nnx.Rngs(0), scan=True, remat=True, **bfloat16)

    graphdef, params, frozen = model.split(nnx.eval_shape(make))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name] > 2**31
    tx = lbw_optax.adamw(1e-5)
    state = jax.eval_shape(tx.init, params)
    loss_fn = model.next_token_loss(graphdef, chunk=256, balance=config.balance)
    batch = np.zeros((2, 1025), np.int32)
    found = loop.train_step.eval_shape(loss_fn, tx.update, params, state, frozen, batch, 2)
    forms = [
        jax.tree.map(lambda x: (x.shape, x.dtype), trees) for trees in (found, (params, state))
    ]
    assert forms[0][:2] == forms[1]
    assert (found[2]["loss"].shape, found[2]["loss"].dtype) == ((), jnp.float32)


@pytest.mark.parametrize(
    ("published", "name"),
    [(QWEN, "Qwen/Qwen2.5-7B"), (TINYLLAMA, "TinyLlama/TinyLlama_v1.1")],
    ids=["qwen", "tinyllama"],
)
def test_a_published_config_is_its_preset(published, name):
    assert model.Config.from_hf(published) == model.PRESETS[name]


@pytest.mark.parametrize("name", model.PRESETS)
def test_a_config_comes_back_from_its_json(name):
    config = model.PRESETS[name]
    written = config.to_hf()
    assert model.Config.from_hf(json.loads(json.dumps(written))) == config
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert model.Config.from_hf(old) == config


def test_scaling_and_window_come_back_from_their_json():
    scaled = model.Llama3Rope(**LLAMA3)
    llama = dataclasses.replace(model.PRESETS["TinyLlama/TinyLlama_v1.1"], rope_scaling=scaled)
    written = llama.to_hf()
    assert model.Config.from_hf(json.loads(json.dumps(written))) == llama
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert model.Config.from_hf(old) == llama
    windowed = dataclasses.replace(model.PRESETS["tiny"], sliding_window=7, max_window_layers=2)
    assert model.Config.from_hf(json.loads(json.dumps(windowed.to_hf()))) == windowed
    assert [windowed.window(layer) for layer in range(3)] == [None, None, 7]


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2'.* qwen2, qwen3, llama, qwen3_moe, mixtral, olmo2, gemma",
        ),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn'.*'llama3'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "on 50% of a head"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' without low_freq_factor"),
        ({"rope_scaling": SCALED | {"factor": "8"}}, "'llama3' without factor: get it anew"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rotary embeddings of several kinds, full_attention",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' in config.json must be an object"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 in config.json must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 in config.json must be a whole"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 in config.json must be a whole"),
        ({"hidden_size": "2048"}, "hidden_size='2048' in config.json must be a whole number"),
        ({"vocab_size": True}, "vocab_size=True in config.json must be a whole number"),
        ({"intermediate_size": None}, "intermediate_size=None in config.json must be a whole"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None in config.json must be a finite number"),
        ({"rope_theta": math.inf}, "rope_theta=inf in config.json must be a finite number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' in config.json must be true"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        model.Config.from_hf(TINYLLAMA | change)


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size", "num_attention_heads"])
def test_what_a_config_lacks_is_named(name):
    with pytest.raises(ValueError, match=f"config.json does not say {name}: get it anew"):
        model.Config.from_hf({key: TINYLLAMA[key] for key in TINYLLAMA if key != name})


@pytest.mark.parametrize(
    ("change", "theta", "original"),
    [
        ({"rope_scaling": SCALED, "rope_theta": 7.0}, 7, 2048),
        ({"rope_scaling": SCALED | {"original_max_position_embeddings": 64}}, 1e4, 64),
        ({"rope_parameters": SCALED | {"rope_theta": 5.0}, "rope_theta": 7.0}, 5, 2048),
        ({"rope_scaling": SCALED, "rope_parameters": {"rope_theta": 5.0}}, 1e4, 2048),
        ({"rope_scaling": {"rope_theta": 3.0}, "rope_parameters": SCALED}, 3, None),
        ({"rope_scaling": SCALED, "original_max_position_embeddings": 32}, 1e4, 32),
    ],
)
def test_where_scalings_stand_in_two_places_it_is_that_of_transformers(change, theta, original):
    """Seen in transformers 5.24: `rope_scaling` before `rope_parameters`, and not a mixture."""
    given = {key: TINYLLAMA[key] for key in TINYLLAMA if not key.startswith("rope")} | change
    config = model.Config.from_hf(given)
    assert config.rope_theta == theta
    found = config.rope_scaling and config.rope_scaling.original_max_position_embeddings
    assert found == original


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("google/gemma-3-1b-pt", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("google/gemma-3-1b-pt", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("google/gemma-3-1b-pt", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("google/gemma-3-1b-pt", {"layer_types": ["full_attention"] * 25}, "follow no pattern"),
        ("google/gemma-3-1b-pt", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("Qwen/Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("Qwen/Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("Qwen/Qwen3-30B-A3B", {"num_experts_per_tok": 200}, "num_experts_per_tok=200 of"),
        ("mistralai/Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("Qwen/Qwen3-30B-A3B", {"num_experts": 0}, "num_experts=0 in config.json must be"),
        ("Qwen/Qwen3-30B-A3B", {"router_aux_loss_coef": None}, "router_aux_loss_coef=None in"),
        ("google/gemma-3-1b-pt", {"sliding_window": None}, "sliding_window=None of gemma3_text"),
        ("google/gemma-3-1b-pt", {"sliding_window_pattern": 0}, "sliding_window_pattern=0 in"),
        ("google/gemma-3-1b-pt", {"rope_parameters": {"rope_theta": 3.0}}, "and there are neither"),
        ("Qwen/Qwen3-8B", {"layer_types": ["sliding_attention"] * 36}, "one is wrong"),
        ("allenai/OLMo-2-1124-7B", {"attention_bias": True}, "attention_bias=True of olmo2"),
    ],
)
def test_what_the_decoder_cannot_do_of_the_others_is_named(name, change, named):
    with pytest.raises(ValueError, match=named):
        model.Config.from_hf(model.PRESETS[name].to_hf() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"norms": "after"},
        {"joint_qk_norm": True},
        {"experts": presets.Experts(4, 2, 8)},
        {"rope_local_base_freq": 1e4},
        {"attention_bias": False, "experts": presets.Experts(4, 2, 384, norm_topk_prob=False)},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_shape_that_transformers_has_not_is_refused(change):
    with pytest.raises(ValueError, match="no architecture of transformers has"):
        dataclasses.replace(model.PRESETS["tiny"], **change).to_hf()


def test_the_first_gemma_says_gelu_and_means_its_approximation():
    given = model.PRESETS["google/gemma-2b"].to_hf() | {"hidden_act": "gelu"}
    assert model.Config.from_hf(given) == model.PRESETS["google/gemma-2b"]


def test_windows_that_alternate_are_refused():
    alternating = {
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 14,
    }
    with pytest.raises(ValueError, match="layer_types alternate"):
        model.Config.from_hf(QWEN | alternating)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B"),
        ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("tiny", "tiny"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ],
)
def test_presets_by_name(name, found):
    assert presets.preset(name) == model.PRESETS[found]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("Qwen2.5-6B", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-14", "Qwen/Qwen2.5-14B"),
        ("tinylama", "TinyLlama"),
    ],
)
def test_an_unknown_name_comes_with_the_near_ones(name, close):
    with pytest.raises(ValueError, match=f"no preset '{name}'; near are .*{close}"):
        presets.preset(name)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_sees_at_least_the_token_itself(window):
    with pytest.raises(ValueError, match=f"sliding_window={window}"):
        dataclasses.replace(model.PRESETS["tiny"], sliding_window=window)
