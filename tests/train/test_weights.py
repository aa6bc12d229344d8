"""Files on disk: round trips to the bit, and every way in which a directory can be wrong."""

import dataclasses
import json
import os
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from support import no_room

from train import files, generation, lora, model, sharding, weights

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the group train")

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


def test_adapters_are_read_into_their_places_on_a_mesh(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=20)
    decoder = decoder_of(config)
    lora.add_lora(decoder, rank=2, alpha=4, dora=True, targets=["q_proj"], rngs=nnx.Rngs(1))
    decoder.embed_tokens.embedding = lora.WholeParam(decoder.embed_tokens.embedding[...] + 1)
    decoder.layers[1].self_attn.q_proj.lora_magnitude[...] *= 2
    weights.save_adapter(decoder, tmp_path / "adapter")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    other = weights.load(saved(tmp_path / "base", config), mesh=mesh, scan=True)
    weights.load_adapter(other, tmp_path / "adapter", mesh=mesh)
    found = model.split(other, nnx.LoRAParam)[1]
    magnitude = found["layers"]["self_attn"]["q_proj"]["lora_magnitude"]
    assert magnitude.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    both = [weights.to_hf(tree) for tree in (found, model.split(decoder, nnx.LoRAParam)[1])]
    assert both[0].keys() == both[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *both)


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


def test_adapters_of_several_ranks_and_alphas_round_trip(tmp_path):
    decoder = adapted()
    lora.add_lora(decoder, rank=5, alpha=1, dropout=0.1, targets=["k_proj"], rngs=nnx.Rngs(2))
    weights.save_adapter(decoder, tmp_path)
    other = decoder_of()
    weights.load_adapter(other, tmp_path)
    kinds = [
        {name: (layer.rank, layer.alpha) for _, name, layer in lora.adapters(found)}
        for found in (decoder, other)
    ]
    assert kinds[0] == kinds[1] == {"q_proj": (2, 4), "up_proj": (2, 4), "k_proj": (5, 1)}


@pytest.mark.parametrize("other", [None, {"dropout": 0.2}, {"rslora": True}, {"dora": True}])
def test_adapters_that_one_config_cannot_describe_are_refused(other, tmp_path):
    decoder = adapted() if other else decoder_of()
    if other:
        kind = {"rank": 2, "alpha": 4, "dropout": 0.1} | other
        lora.add_lora(decoder, **kind, targets=["k_proj"], rngs=nnx.Rngs(2))
    kinds = 2 if other else 0
    with pytest.raises(weights.WeightsError, match=f"{kinds} kinds of adapters"):
        weights.save_adapter(decoder, tmp_path)


@pytest.mark.parametrize("scan", [False, True])
def test_modules_that_are_saved_whole_round_trip(scan, tmp_path):
    """The norms of one layer among them, which their last word would not single out."""
    decoder = adapted()
    last = decoder.layers[2].input_layernorm
    last.scale = lora.WholeParam(last.scale[...] + 1)
    decoder.norm.scale = lora.WholeParam(decoder.norm.scale[...] + 2)
    weights.save_adapter(decoder, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / weights.ADAPTER_CONFIG).read_text())
    assert config["modules_to_save"] == ["model.layers.2.input_layernorm", "model.norm"]
    other = weights.load(saved(tmp_path / "base"), scan=scan)
    if scan:
        with pytest.raises(weights.WeightsError, match=r"different things in .*scan=False"):
            weights.load_adapter(other, tmp_path / "adapter")
        return
    weights.load_adapter(other, tmp_path / "adapter")
    both = [weights.to_hf(model.split(m, nnx.LoRAParam)[1]) for m in (decoder, other)]
    assert both[0].keys() == both[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_base_in_a_directory_is_named_from_anywhere(tmp_path, monkeypatch):
    """And one on the hub as the hub has it."""
    saved(tmp_path / "run" / "base")
    monkeypatch.chdir(tmp_path / "run")
    for base, named in (
        ("base", str(tmp_path / "run" / "base")),
        ("../run/base", str(tmp_path / "run" / "base")),
        ("owner/base", "owner/base"),
        (None, None),
    ):
        weights.save_adapter(adapted(), tmp_path / "adapter", base=base)
        config = json.loads((tmp_path / "adapter" / weights.ADAPTER_CONFIG).read_text())
        assert config["base_model_name_or_path"] == named


# --- saving over what is there -----------------------------------------------------------------

LAYOUTS = {"one file": 10**9, "few": 4000, "many": 2000}


def shifted(by):
    decoder = decoder_of()
    decoder.norm.scale[...] += by
    return decoder


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_what_was_saved_last_is_what_is_there(first, second, tmp_path):
    weights.save(shifted(1), tmp_path, file_bytes=LAYOUTS[first])
    weights.save(shifted(2), tmp_path, file_bytes=LAYOUTS[second])
    jax.tree.map(
        np.testing.assert_array_equal, params_of(weights.load(tmp_path)), params_of(shifted(2))
    )
    weights.save(shifted(2), tmp_path / "alone", file_bytes=LAYOUTS[second])
    alone = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} - {"alone"} == alone


def test_no_adapter_is_left_on_a_model_that_was_not_trained_with_it(tmp_path):
    """As transformers puts any that lies beside a model onto it."""
    weights.save_adapter(adapted(), tmp_path)
    weights.save(shifted(2), tmp_path)
    np.testing.assert_array_equal(weights.load(tmp_path).norm.scale[...], 3)
    weights.save(shifted(2), tmp_path / "alone")
    alone = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} - {"alone"} == alone

    weights.save_adapter(adapted(), tmp_path)
    with pytest.warns(UserWarning, match=f"{tmp_path} holds an adapter beside the model"):
        weights.load(tmp_path)


def test_only_the_model_that_was_there_is_replaced(tmp_path):
    """Not what lies beside it, nor files that only look like a part of it."""
    kept = ["notes.txt", "model-00001-of-00009.safetensors", "pytorch_model.bin", "tokenizer.json"]
    for name in kept:
        (tmp_path / name).write_text(name)
    weights.save(shifted(1), tmp_path, file_bytes=2000)
    weights.save(shifted(2), tmp_path)
    assert [(tmp_path / name).read_text() for name in kept] == kept


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers."""
    weights.save(shifted(1), tmp_path, file_bytes=2000)
    weights.save(shifted(2), tmp_path / "new")
    shutil.copy(tmp_path / "new" / files.MODEL, tmp_path)
    loaded = weights.load(tmp_path)
    np.testing.assert_array_equal(loaded.norm.scale[...], 3)


@pytest.mark.parametrize("which", [0, -1])
def test_a_save_that_fails_half_way_leaves_no_mixture(which, tmp_path):
    """A shard that cannot take its place, for there is a directory of its name."""
    weights.save(shifted(2), tmp_path / "alone", file_bytes=LAYOUTS["many"])
    name = sorted(path.name for path in (tmp_path / "alone").glob("model-*"))[which]
    weights.save(shifted(1), tmp_path / "out", file_bytes=LAYOUTS["few"])
    (tmp_path / "out" / name).mkdir()
    with pytest.raises(weights.WeightsError, match="cannot write to"):
        weights.save(shifted(2), tmp_path / "out", file_bytes=LAYOUTS["many"])
    with pytest.raises(weights.WeightsError, match=r"holds no model.safetensors \(it holds .draft"):
        weights.load(tmp_path / "out")
    (tmp_path / "out" / name).rmdir()
    weights.save(shifted(2), tmp_path / "out", file_bytes=LAYOUTS["many"])
    np.testing.assert_array_equal(weights.load(tmp_path / "out").norm.scale[...], 3)
    assert not (tmp_path / "out" / files.DRAFT).exists()


def test_no_room_leaves_the_old_model(tmp_path):
    weights.save(shifted(1), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with no_room(2000), pytest.raises(weights.WeightsError, match="cannot write to"):
        weights.save(shifted(2), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        weights.save(decoder_of(), tmp_path / "model", file_bytes=2000)
        weights.save_adapter(adapted(), tmp_path / "adapter")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_an_adapter_over_another(tmp_path):
    weights.save_adapter(adapted(), tmp_path)
    weights.save_adapter(adapted(rank=1, targets=["k_proj"]), tmp_path)
    decoder = decoder_of()
    weights.load_adapter(decoder, tmp_path)
    assert [(name, layer.rank) for _, name, layer in lora.adapters(decoder)] == [("k_proj", 1)] * 3
    assert {path.name for path in tmp_path.iterdir()} == {weights.ADAPTER, weights.ADAPTER_CONFIG}


# --- tokens and generation ---------------------------------------------------------------------

SETTINGS = {"eos_token_id": [3, 7], "temperature": 0.7, "do_sample": True, "top_p": 0.8}


@pytest.mark.parametrize(
    ("ids", "settings", "expected"),
    [
        ({"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}, SETTINGS, SETTINGS),
        ({"eos_token_id": [3, 7], "pad_token_id": 0}, None, {"eos_token_id": [3, 7]}),
        ({}, None, {"eos_token_id": None}),
    ],
)
def test_token_ids_and_settings_are_those_that_were_loaded(ids, settings, expected, tmp_path):
    place = saved(tmp_path / "base")
    path = place / "config.json"
    content = json.loads(path.read_text())
    for name in generation.IDS:
        del content[name]
    path.write_text(json.dumps(content | ids))
    (place / generation.FILE).unlink()
    if settings:
        (place / generation.FILE).write_text(json.dumps(settings))
    decoder = weights.load(place, scan=True)
    graphdef, params, frozen = model.split(decoder)
    again = nnx.merge(graphdef, params, frozen)  # as a run gives it back
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / generation.FILE).write_text('{"eos_token_id": 99}')  # of an older save
    weights.save(again, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {n: written[n] for n in generation.IDS} == dict.fromkeys(generation.IDS) | ids
    found = json.loads((tmp_path / "out" / generation.FILE).read_text())
    assert found.items() >= expected.items()
    assert settings is None or found == settings


def test_a_model_from_scratch_ends_where_it_is_told(tmp_path):
    weights.save(decoder_of(), tmp_path, end=5)
    for name in ("config.json", generation.FILE):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == 5


def test_llamas_own_ids_are_meant_where_none_are_written(tmp_path):
    """As transformers has them."""
    place = saved(tmp_path, dataclasses.replace(CONFIG, attention_bias=False))
    content = json.loads((place / "config.json").read_text())
    content = {n: v for n, v in content.items() if n not in generation.IDS}
    assert content["model_type"] == "llama"
    found = generation.read(tmp_path / "nowhere", content)
    assert json.loads(found.ids) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def test_a_damaged_generation_config_is_named(tmp_path):
    (saved(tmp_path) / generation.FILE).write_text('{"eos_token_id": 3')
    with pytest.raises(weights.WeightsError, match=r"generation_config.json is no JSON"):
        weights.load(tmp_path)


# --- a head and an embedding -------------------------------------------------------------------


def test_a_head_that_is_not_the_tied_embedding_is_kept(tmp_path):
    saved(tmp_path)
    head = np.random.default_rng(0).normal(size=(19, 8)).astype("f")
    change_file(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    with pytest.warns(UserWarning, match="tie_word_embeddings=true, but its lm_head.weight"):
        decoder = weights.load(tmp_path)
    np.testing.assert_array_equal(decoder.lm_head.kernel[...], head.T)
    weights.save(decoder, tmp_path / "out")
    again = weights.load(tmp_path / "out")
    assert not again.config.tie_word_embeddings
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(decoder))


def test_a_head_that_differs_in_its_last_row_alone(tmp_path):
    """Of more rows than are compared at once."""
    saved(tmp_path, dataclasses.replace(CONFIG, vocab_size=5000))

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    change_file(tmp_path, change)
    with pytest.warns(UserWarning, match="both are kept"):
        assert not weights.load(tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize("files_", ["the same head", "the head alone", "without the name of both"])
def test_a_tied_model_in_other_words(files_, tmp_path):
    saved(tmp_path)
    expected = params_of(weights.load(tmp_path))

    def change(tensors):
        if files_ == "without the name of both":  # as the model without its head is saved
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)
        else:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        if files_ == "the head alone":
            del tensors["model.embed_tokens.weight"]

    change_file(tmp_path, change)
    decoder = weights.load(tmp_path)
    assert decoder.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params_of(decoder), expected)


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    saved(tmp_path, UNTIED)
    change_file(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(weights.WeightsError, match=r"lm_head.weight \(19, 8\) is missing"):
        weights.load(tmp_path)


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
        (files.MODEL, None, r"holds no model.safetensors \(it holds config.json, gen.*save the"),
    ],
)
def test_a_directory_that_is_not_whole(file, content, named, tmp_path):
    saved(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(weights.WeightsError, match=named):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ("pytorch_model.bin", "pickled weights can run code .*save_pretrained"),
        ("consolidated.00.pth", "pickled weights can run code"),
        ("model-00001-of-00002.safetensors", "parts of a model without model.safetensors.index"),
        ("small.Q4_0.gguf", "give the path of the .gguf file itself"),
    ],
)
def test_weights_in_another_form(held, named, tmp_path):
    (saved(tmp_path) / files.MODEL).rename(tmp_path / held)
    with pytest.raises(weights.WeightsError, match=f"holds no model.safetensors .*{named}"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, [], {"weight_map": {}}, {"weight_map": {"x": 3}}, {"weight_map": {"x": "../y"}}]
)
def test_an_index_that_is_none(index, tmp_path):
    (saved(tmp_path) / files.MODEL).unlink()
    (tmp_path / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(weights.WeightsError, match=r"index.json has no weight_map"):
        weights.load(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2.5-1.5", "/nowhere/Qwen2.5-1.5B", "./Qwen2.5-1.5B"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(weights.WeightsError, match=r"no directory .*near are .*Qwen/Qwen2.5-1.5B"):
        weights.load(name)


def test_a_name_on_the_hub_without_a_network(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the group train")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(weights.WeightsError, match=r"cannot get Qwen/Qwen2.5-05B .*Qwen2.5-0.5B"):
        weights.load("Qwen/Qwen2.5-05B")


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (range(19), None),
        ([0, 18], None),  # fewer tokens than rows
        (range(20), "token 't19' has the id 19, .* up to 18"),
        ([0, 1, 19], "token 't19' has the id 19"),  # and fewer tokens, too
        ([0, 511], "token 't511' has the id 511"),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_every_id_of_a_tokenizer_has_a_row(ids, named, added, tmp_path):
    tokenizer = tokenizer_of(ids, added)
    assert tokenizer.encode(f"t{max(ids)}").ids == [max(ids)]
    if named is None:
        weights.check_vocabulary(tokenizer, CONFIG)
        return
    with pytest.raises(weights.WeightsError, match=named):
        weights.check_vocabulary(tokenizer, CONFIG)


def tokenizer_of(ids, added):
    """One word an id; the last one in the vocabulary, or `added` to it."""
    vocabulary = {f"t{i}": i for i in ids}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "t0"))
    content = json.loads(tokenizer.to_str())
    if added:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": max(ids), "content": f"t{max(ids)}", "special": True, **plain}
        content["added_tokens"].append(token)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def test_no_room_to_write(tmp_path):
    with (
        no_room(2000),
        pytest.raises(weights.WeightsError, match=f"cannot write to {tmp_path}.*make room"),
    ):
        weights.save(decoder_of(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_no_model(tmp_path):
    weights.save_adapter(adapted(), tmp_path, base="owner/base")
    for read in (weights.load, weights.read_config):
        with pytest.raises(weights.WeightsError, match=r"an adapter, not .* base \(owner/base\)"):
            read(tmp_path)


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(weights.WeightsError, match="cannot write to"):
        weights.save(decoder_of(), tmp_path / "file")


def test_a_shape_that_transformers_does_not_have(tmp_path):
    config = dataclasses.replace(CONFIG, qk_norm=True)
    with pytest.raises(ValueError, match="no architecture of transformers has attention_bias=True"):
        weights.save(decoder_of(config), tmp_path)
