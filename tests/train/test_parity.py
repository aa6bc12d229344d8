"""The decoder, its files and its adapters against torch: `transformers`' models and `peft`."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import make_decoders

from train import lora, model, presets, weights

NEEDED = ("torch", "transformers", "peft", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs the group parity: no {missing}"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks it
]
over_cases = pytest.mark.parametrize("case", make_decoders.CASES)
over_all_cases = pytest.mark.parametrize("case", [*make_decoders.CASES, *make_decoders.OTHERS])
SMALL = model.Config(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=1e6,
)
GEMMA = {
    "attention_bias": False,
    "norm_offset": True,
    "hidden_act": "gelu_pytorch_tanh",
    "scaled_embedding": True,
}
ARCHITECTURES = {
    "qwen2": {},
    "qwen2-window": {"sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"attention_bias": False, "qk_norm": True, "tie_word_embeddings": False},
    "llama": {"attention_bias": False, "rms_norm_eps": 1e-5},
    "llama3-rope": {
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_scaling": model.Llama3Rope(8.0, 1.0, 4.0, 480),
        "max_position_embeddings": 512,
    },
    "qwen3-moe": {
        "attention_bias": False,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "experts": presets.Experts(3, 2, 12, norm_topk_prob=False),
    },
    "mixtral": {
        "attention_bias": False,
        "tie_word_embeddings": False,
        "experts": presets.Experts(3, 1, 20, router_aux_loss_coef=0.02),
    },
    "olmo2": {
        "attention_bias": False,
        "joint_qk_norm": True,
        "norms": "after",
        "tie_word_embeddings": False,
    },
    "gemma": {**GEMMA},
    "gemma3": {
        **GEMMA,
        "qk_norm": True,
        "norms": "both",
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 7,
    },
}
SCANNED = ("llama", "qwen3", "qwen3-moe")
TOKENS = np.random.default_rng(3).integers(37, size=(2, 10)).astype(np.int32)


def assert_close(actual, expected, what=""):
    """Within 1e-4 of the largest number that is expected."""
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol, err_msg=what)


def logits_of(decoder, tokens=TOKENS, **inputs):
    return np.asarray(nnx.jit(lambda m: m(jnp.asarray(tokens), **inputs))(decoder))


def torch_logits(network, tokens=TOKENS, **inputs):
    import torch

    with torch.no_grad():
        return network.eval()(torch.tensor(tokens, dtype=torch.long), **inputs).logits.numpy()


def random_decoder(config, **options):
    """Every parameter random, also biases and norms."""
    decoder = model.Decoder(config, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda p: rng.normal(0.1, 0.3, p.shape).astype("f"), nnx.state(decoder))
    nnx.update(decoder, state)
    return decoder


def adapted(decoder):
    lora.add_lora(decoder, rank=3, alpha=5.0, targets=["q_proj", "down_proj"], rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    state = nnx.state(decoder, nnx.LoRAParam)
    nnx.update(decoder, jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f"), state))
    return decoder


# --- models ------------------------------------------------------------------------------------


@over_all_cases
def test_logits_loss_and_every_gradient_equal_torch(case, tmp_path):
    """The loss of a mixture holds its load-balance loss."""
    network = make_decoders.build(case, seed=1)
    network.save_pretrained(tmp_path)
    tokens, positions = make_decoders.batch(seed=1)
    expected = make_decoders.outcome(network, tokens, positions)
    decoder = weights.load(tmp_path)
    graphdef, params, frozen = model.split(decoder)
    loss_fn = model.next_token_loss(graphdef, balance=decoder.config.balance)

    @jax.jit
    def outcome(params, frozen, batch):
        logits = nnx.merge(graphdef, params, frozen)(batch.tokens, positions=batch.positions)
        return logits, jax.value_and_grad(loss_fn)(params, frozen, batch)

    batch = model.Batch(tokens, positions=positions)
    logits, (loss, gradients) = outcome(params, frozen, batch)
    assert_close(logits, expected["logits"])
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-5)
    found = {f"gradient/{name}": value for name, value in weights.to_hf(gradients).items()}
    assert found.keys() == expected.keys() - {"logits", "loss"}
    for name, gradient in found.items():
        assert_close(gradient, expected[name], name)


@over_cases
def test_the_golden_file_is_what_torch_gives(case):
    import torch

    golden = np.load(make_decoders.FILE)
    start = f"{case}/weight/"
    held = {n.removeprefix(start): golden[n] for n in golden.files if n.startswith(start)}
    network = make_decoders.build(case)
    parameters = dict(network.named_parameters())
    assert parameters.keys() == held.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(held[name]))
    tokens, positions = golden[f"{case}/tokens"], golden[f"{case}/positions"]
    for name, value in make_decoders.outcome(network, tokens, positions).items():
        assert_close(golden[f"{case}/{name}"], value, name)


def test_padding_on_the_left_is_an_attention_mask(tmp_path):
    """As segments; the positions of real tokens count from 0, as `generate` does."""
    import torch

    network = make_decoders.build("qwen2-tied")
    network.save_pretrained(tmp_path)
    real = np.arange(10) >= np.array([[4], [0]])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    inputs = {"attention_mask": real, "position_ids": positions}
    expected = torch_logits(network, **{n: torch.tensor(x).long() for n, x in inputs.items()})
    found = logits_of(weights.load(tmp_path), segments=jnp.asarray(real, jnp.int32))
    assert_close(found[real], expected[real])


@pytest.mark.parametrize("case", ["qwen2-untied-window", "qwen3"])
def test_packed_documents_are_those_of_transformers(case, tmp_path):
    """Which takes them from positions that begin again, where there is no other mask."""
    import torch

    network = make_decoders.build(case)
    network.save_pretrained(tmp_path)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 1, 2, 3, 4, 5, 6]])
    expected = torch_logits(network, position_ids=torch.tensor(positions), use_cache=False)
    segments = jnp.asarray(np.cumsum(positions == 0, axis=1), jnp.int32)
    assert_close(logits_of(weights.load(tmp_path), segments=segments), expected)
    alone = torch_logits(network)
    assert np.abs(alone - expected).max() > 0.01


# --- files, both ways --------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "scan"), [("several", False), ("one", True)])
def test_files_of_transformers_open_here(files, scan, tmp_path):
    network = make_decoders.build("qwen3")
    network.save_pretrained(tmp_path, max_shard_size="5KB" if files == "several" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (files == "several")
    decoder = weights.load(tmp_path, scan=scan)
    assert_close(logits_of(decoder), torch_logits(network))


def test_a_bfloat16_file_of_transformers_opens_here(tmp_path):
    network = make_decoders.build("llama").bfloat16()
    network.save_pretrained(tmp_path)
    decoder = weights.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(decoder))} == {np.dtype("float32")}
    assert_close(logits_of(decoder), torch_logits(network.float()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_written_here_open_there(architecture, tmp_path):
    import transformers

    files = "several" if architecture.startswith("llama") else "one"
    config = dataclasses.replace(SMALL, **ARCHITECTURES[architecture])
    decoder = random_decoder(config, scan=architecture in SCANNED)
    weights.save(decoder, tmp_path, file_bytes=5_000 if files == "several" else 10**9)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (files == "several")
    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype="float32"
    )
    assert not any(info.values()), info
    assert_close(logits_of(decoder), torch_logits(network))
    assert model.Config.from_hf(network.config) == config


# --- adapters, both ways -----------------------------------------------------------------------


def test_an_adapter_of_peft_opens_here(tmp_path):
    """Logits, and the gradient of every adapter weight."""
    import peft
    import torch

    network = make_decoders.build("qwen2-tied")
    network.save_pretrained(tmp_path / "base")
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    tuned = peft.get_peft_model(network, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.4)
    tuned.save_pretrained(tmp_path / "adapter")
    decoder = weights.load(tmp_path / "base")
    weights.load_adapter(decoder, tmp_path / "adapter")
    assert_close(logits_of(decoder), torch_logits(tuned))

    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    expected = make_decoders.outcome(tuned.eval(), TOKENS, positions)
    graphdef, params, frozen = model.split(decoder, nnx.LoRAParam)
    gradients = jax.jit(jax.grad(model.next_token_loss(graphdef)))(params, frozen, TOKENS)
    found = weights.to_hf(gradients)
    assert len(found) == 2 * 3 * 2
    for name, gradient in found.items():
        there = name.replace(".weight", ".default.weight")
        assert_close(gradient, expected[f"gradient/{there}"], name)


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_written_here_opens_in_peft(scan, tmp_path):
    import peft
    import transformers

    decoder = random_decoder(SMALL, scan=scan)
    weights.save(decoder, tmp_path / "base")
    adapted(decoder)
    weights.save_adapter(decoder, tmp_path / "adapter", base=str(tmp_path / "base"))
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="float32", attn_implementation="eager"
    )
    tuned = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    assert_close(logits_of(decoder), torch_logits(tuned))


@pytest.mark.parametrize("scan", [False, True])
def test_a_merged_model_opens_in_transformers(scan, tmp_path):
    import transformers

    decoder = adapted(random_decoder(SMALL, scan=scan))
    weights.save(decoder, tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="float32", attn_implementation="eager"
    )
    assert_close(logits_of(decoder), torch_logits(network))
    assert lora.adapters(decoder), "writing it must not merge the model itself"
