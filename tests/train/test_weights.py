"""Files on disk: round trips to the bit, and every way in which a directory can be wrong."""

import dataclasses
import json
import resource
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train import files, lora, model, weights

safetensors = pytest.importorskip("safetensors.numpy", reason="needs lbw_optax[train]")

CONFIG = model.Config(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, attention_bias=False, qk_norm=True)


def decoder_of(config=CONFIG, **options):
    return model.Decoder(config, rngs=nnx.Rngs(0), **options)


def params_of(decoder):
    return model.split(decoder)[1]


def saved(directory, config=CONFIG):
    weights.save(decoder_of(config), directory)
    return directory


def change_file(directory, change):
    """Rewrite the tensors of a directory as `change` leaves them."""
    tensors = safetensors.load_file(directory / files.MODEL)
    change(tensors)
    safetensors.save_file(tensors, directory / files.MODEL)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("file_bytes", "dtype"), [(10**9, "bfloat16"), (2000, "float32")], ids=["one file", "several"]
)
def test_what_is_saved_is_loaded_to_the_bit(config, file_bytes, dtype, tmp_path):
    decoder = decoder_of(config, param_dtype=jnp.dtype(dtype))
    weights.save(decoder, tmp_path, file_bytes=file_bytes)
    loaded = weights.load(tmp_path, param_dtype=jnp.dtype(dtype))
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), params_of(decoder))
    written = list(tmp_path.glob("*.safetensors"))
    assert (len(written) > 1) == (file_bytes == 2000)
    assert all(path.stat().st_size < file_bytes + 2000 for path in written)  # and the header
    assert not list(tmp_path.glob("*.draft"))


def test_a_stack_of_layers_and_a_list_share_files(tmp_path):
    """Saved from a list, loaded as a stack, saved again: the same bytes."""
    saved(tmp_path / "list")
    stack = weights.load(tmp_path / "list", scan=True)
    assert params_of(stack)["layers"]["mlp"]["up_proj"]["kernel"].shape == (3, 8, 12)
    weights.save(stack, tmp_path / "stack")
    both = [safetensors.load_file(tmp_path / kind / files.MODEL) for kind in ("list", "stack")]
    assert both[0].keys() == both[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_options_of_the_decoder_are_kept(tmp_path):
    saved(tmp_path)
    decoder = weights.load(tmp_path, dtype=jnp.bfloat16, remat=True)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params_of(decoder))}
    assert (decoder.dtype, decoder.remat, kinds) == (jnp.bfloat16, True, {"float32"})


def test_loading_holds_one_parameter_at_a_time(tmp_path):
    """NumPy's memory stays at two of the largest parameter; the model has twenty times one."""
    config = dataclasses.replace(
        CONFIG, hidden_size=256, intermediate_size=1024, num_hidden_layers=7, vocab_size=64
    )
    saved(tmp_path, config)
    largest = 4 * 256 * 1024
    shapes = files.Checkpoint(tmp_path).shapes.values()
    assert sum(4 * int(np.prod(shape)) for shape in shapes) > 20 * largest
    tracemalloc.start()
    try:
        weights.load(tmp_path, param_dtype=jnp.bfloat16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * largest + 3_000_000  # Python's own objects are traced, too


# --- adapters ----------------------------------------------------------------------------------


def adapted(**options):
    decoder = decoder_of()
    settings = {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": ["q_proj", "up_proj"]} | options
    lora.add_lora(decoder, **settings, rngs=nnx.Rngs(1))
    state = nnx.state(decoder, nnx.LoRAParam)
    rng = np.random.default_rng(2)
    nnx.update(decoder, jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f"), state))
    return decoder


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_round_trip(scan, tmp_path):
    decoder = adapted()
    weights.save_adapter(decoder, tmp_path / "adapter", base="owner/base")
    config = json.loads((tmp_path / "adapter" / weights.ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert (config["base_model_name_or_path"], config["bias"]) == ("owner/base", "none")
    assert config["target_modules"] == ["q_proj", "up_proj"]
    other = weights.load(saved(tmp_path / "base"), scan=scan)
    weights.load_adapter(other, tmp_path / "adapter")
    assert {layer.scaling for _, _, layer in lora.adapters(other)} == {2.0}
    both = [weights.to_hf(model.split(m, nnx.LoRAParam)[1]) for m in (decoder, other)]
    assert both[0].keys() == both[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_other_adapters_are_refused(asked, named, tmp_path):
    weights.save_adapter(adapted(), tmp_path)
    path = tmp_path / weights.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    with pytest.raises(weights.WeightsError, match=f"{named}.*only plain LoRA"):
        weights.load_adapter(decoder_of(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    weights.save_adapter(adapted(), tmp_path)
    other = decoder_of(dataclasses.replace(CONFIG, num_hidden_layers=4, intermediate_size=10))
    with pytest.raises(weights.WeightsError) as raised:
        weights.load_adapter(other, tmp_path)
    told = str(raised.value)
    assert told.count("is missing") == 4
    assert "layers.3.self_attn.q_proj.lora_A.weight (2, 8) is missing" in told
    assert (
        "layers.0.mlp.up_proj.lora_B.weight has shape (12, 2), but the model needs (10, 2)" in told
    )


@pytest.mark.parametrize("kinds", [0, 2])
def test_adapters_that_one_config_cannot_describe_are_refused(kinds, tmp_path):
    decoder = adapted() if kinds else decoder_of()
    if kinds:
        lora.add_lora(decoder, rank=5, alpha=1, targets=["k_proj"], rngs=nnx.Rngs(2))
    with pytest.raises(weights.WeightsError, match=f"{kinds} kinds of adapters"):
        weights.save_adapter(decoder, tmp_path)


# --- what can be wrong -------------------------------------------------------------------------


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    saved(tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.embed_tokens.weight"] = np.zeros((18, 8), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((8, 12), np.float32)
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((12, 8), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    change_file(tmp_path, change)
    with pytest.raises(weights.WeightsError) as raised:
        weights.load(tmp_path)
    told = str(raised.value).split("\n  ")
    assert told[0].endswith("4 to mend:")
    assert sorted(told[1:]) == [
        "model.embed_tokens.weight has shape (18, 8), but the model needs (19, 8)",
        "model.layers.1.mlp.up_proj.weight has shape (8, 12), but the model needs (12, 8)",
        "model.layers.3.mlp.up_proj.weight (12, 8) is nothing the model has",
        "model.norm.weight (8,) is missing",
    ]


def test_a_head_beside_a_tied_embedding_is_not_needed(tmp_path):
    saved(tmp_path)
    change_file(tmp_path, lambda t: t.update({"lm_head.weight": np.zeros((19, 8), "f")}))
    weights.load(tmp_path)


@pytest.mark.parametrize("left", [4, 40, 3000, -1], ids=["length", "header", "middle", "last byte"])
def test_a_file_that_is_cut_off(left, tmp_path):
    saved(tmp_path)
    path = tmp_path / files.MODEL
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(
        weights.WeightsError, match=r"model.safetensors is cut off or damaged"
    ) as told:
        weights.load(tmp_path)
    assert "is missing" not in str(told.value)


def test_one_of_several_files_is_gone(tmp_path):
    weights.save(decoder_of(), tmp_path, file_bytes=2000)
    first, *_, last = sorted(tmp_path.glob("model-*"))
    first.unlink()
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(weights.WeightsError) as raised:
        weights.load(tmp_path)
    assert f"{first.name} is named in {files.INDEX} but missing" in str(raised.value)
    assert f"{last.name} is cut off or damaged" in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", '{"model_type": "qwen2"', "config.json is no JSON"),
        (files.MODEL, None, r"holds no model.safetensors \(it holds config.json\)"),
    ],
)
def test_a_directory_that_is_not_whole(file, content, named, tmp_path):
    saved(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(weights.WeightsError, match=named):
        weights.load(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2.5-1.5", "/nowhere/Qwen2.5-1.5B", "./Qwen2.5-1.5B"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(weights.WeightsError, match=r"no directory .*near are .*Qwen/Qwen2.5-1.5B"):
        weights.load(name)


def test_a_name_on_the_hub_without_a_network(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs lbw_optax[train]")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(weights.WeightsError, match=r"cannot get Qwen/Qwen2.5-05B .*Qwen2.5-0.5B"):
        weights.load("Qwen/Qwen2.5-05B")


def test_a_tokenizer_that_is_too_large():
    weights.check_vocabulary(19, CONFIG)
    with pytest.raises(weights.WeightsError, match=r"tokenizer has 20 tokens.*embeds 19"):
        weights.check_vocabulary(20, CONFIG)


def test_no_room_to_write(tmp_path):
    """A real limit of the operating system on the size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(weights.WeightsError, match=f"cannot write to {tmp_path}.*make room"):
            weights.save(decoder_of(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(weights.WeightsError, match="cannot write to"):
        weights.save(decoder_of(), tmp_path / "file")


def test_a_shape_that_transformers_does_not_have(tmp_path):
    config = dataclasses.replace(CONFIG, qk_norm=True)
    with pytest.raises(ValueError, match="no architecture of transformers has attention_bias=True"):
        weights.save(decoder_of(config), tmp_path)
