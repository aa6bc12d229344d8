"""Adapters against `peft`: what it writes, opened here, and what is written here, opened there."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from golden import make_decoders

from train import lora, model, weights

NEEDED = ("torch", "transformers", "peft", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs the group parity: no {missing}"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks it
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

TIED, UNTIED = "qwen2-tied", "llama"
TOKENS = np.random.default_rng(3).integers(37, size=(2, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
SAME_IN_ALL_LAYERS = {
    "plain": (TIED, {}),
    "rslora": (TIED, {"use_rslora": True}),
    "dora": (TIED, {"use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "dora and rslora": (UNTIED, {"use_dora": True, "use_rslora": True}),
    "gaussian": (UNTIED, {"init_lora_weights": "gaussian"}),
    "a rank of one module": (TIED, {"rank_pattern": {"q_proj": 2}}),
    "an alpha of one module": (TIED, {"alpha_pattern": {"v_proj": 9.5}}),
    "ranks, alphas, rslora": (
        UNTIED,
        {
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"self_attn.q_proj": 7},
            "alpha_pattern": {"mlp.*": 3},
        },
    ),
    "a pattern of modules": (TIED, {"target_modules": r".*\.(mlp\.(up|gate)_proj|o_proj)"}),
    "all linear layers": (UNTIED, {"target_modules": "all-linear"}),
    "all but some": (TIED, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "the head": (UNTIED, {"target_modules": ["q_proj", "lm_head"]}),
    "the head of a tied model": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding and head": (UNTIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding and head, tied": (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "the embedding alone": (UNTIED, {"modules_to_save": ["embed_tokens"]}),
    "the embedding alone, tied": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "the head alone, tied": (TIED, {"modules_to_save": ["lm_head"]}),
    "the embedding, to stay tied": (
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "norms": (TIED, {"modules_to_save": ["norm"]}),
    "a layer with its bias": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}),
    "dora with the head whole": (TIED, {"use_dora": True, "modules_to_save": ["lm_head"]}),
}
DIFFERENT = {
    "some layers": (TIED, {"layers_to_transform": [1]}),
    "one layer": (UNTIED, {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "a rank of one layer": (TIED, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "an alpha of one layer": (TIED, {"alpha_pattern": {r"model\.layers\.0\..*": 2}}),
    "targets of one layer": (TIED, {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]}),
    "dora in some layers": (UNTIED, {"layers_to_transform": [0], "use_dora": True}),
}
CASES = SAME_IN_ALL_LAYERS | DIFFERENT


def assert_close(actual, expected, what=""):
    """Within 1e-4 of the largest number that is expected."""
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol, err_msg=what)


def peft_model(case, place):
    """A model of peft, every trained parameter moved; base and adapter are saved in `place`."""
    import peft
    import torch

    base, settings = CASES[case]
    network = make_decoders.build(base, seed=1)
    network.save_pretrained(place / "base")
    config = peft.LoraConfig(**PLAIN | settings, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(network, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(place / "adapter")
    return tuned.eval()


def loaded(place, adapter="adapter", **options):
    decoder = weights.load(place / "base", **options)
    weights.load_adapter(decoder, place / adapter)
    return decoder


def logits_of(decoder):
    return np.asarray(nnx.jit(lambda m: m(TOKENS))(decoder))


def there(name):
    """The name that peft gives a gradient while it trains."""
    if ".lora_" in name:
        start, _, end = name.rpartition(".lora_")
        return f"{start}.lora_{end.removesuffix('.weight')}.default.weight"
    module, _, leaf = name.rpartition(".")
    return f"base_model.model.{module}.modules_to_save.default.{leaf}"


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_and_back(case, tmp_path):
    """Opened here, saved again as an adapter, and merged: always the logits that peft has."""
    import peft
    import transformers

    tuned = peft_model(case, tmp_path)
    expected = make_decoders.logits(tuned, TOKENS, POSITIONS)
    decoder = loaded(tmp_path, scan=case in SAME_IN_ALL_LAYERS)
    assert_close(logits_of(decoder), expected)

    weights.save_adapter(decoder, tmp_path / "again", base=str(tmp_path / "base"))
    opened = transformers.AutoModelForCausalLM.from_pretrained
    network = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "again")
    assert_close(make_decoders.logits(network, TOKENS, POSITIONS), expected)
    weights.save(decoder, tmp_path / "merged")
    assert_close(make_decoders.logits(opened(tmp_path / "merged"), TOKENS, POSITIONS), expected)
    lora.merge_lora(decoder)
    assert not jax.tree.leaves(nnx.state(decoder, nnx.LoRAParam))


TRAINED = ("dora and rslora", "ranks, alphas, rslora", "some layers", "a layer with its bias")
TRAINED += ("the embedding, to stay tied", "the head of a tied model", "dora with the head whole")


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_trained_has_the_gradients_of_peft(case, tmp_path):
    expected = make_decoders.outcome(peft_model(case, tmp_path), TOKENS, POSITIONS)
    graphdef, params, frozen = model.split(loaded(tmp_path), nnx.LoRAParam)
    step = jax.jit(jax.value_and_grad(model.next_token_loss(graphdef)))
    loss, gradients = step(params, frozen, TOKENS)
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-5)
    found = {f"gradient/{there(n)}": value for n, value in weights.to_hf(gradients).items()}
    assert found.keys() == expected.keys() - {"logits", "loss"}
    for name, gradient in found.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize("case", DIFFERENT)
def test_layers_that_differ_are_no_stack(case, tmp_path):
    peft_model(case, tmp_path)
    with pytest.raises(weights.WeightsError, match=r"different things in .*scan=False"):
        loaded(tmp_path, scan=True)


REFUSED = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", "orthogonal"],
    "use_qalora": [True],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"]}],
    "corda_config": [{"corda_method": "ipm"}],
    "target_parameters": [["mlp.gate_proj.weight"]],
    "alora_invocation_tokens": [[7, 8]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only", "something"],
    "peft_type": ["IA3", "ADALORA", "XLORA"],
    "a_field_of_next_year": [1, "x", {"y": 0}],
    "r": ["8", [8], True],
    "lora_alpha": ["16", float("inf")],
    "use_rslora": ["no"],
    "rank_pattern": [["q_proj"], {"q_proj": "4"}, {"q_proj": 2.5}, {"q_proj": None}],
    "alpha_pattern": [{"q_proj": "4"}, {"q_proj": True}, {"q_proj": -float("inf")}],
    "layers_to_transform": [["0"], True],
    "exclude_modules": [[1]],
    "modules_to_save": [[1], "lm_head"],
    "target_modules": [None, 7, ["q_proj", 7]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f in REFUSED for v in REFUSED[f]])
def test_what_is_not_understood_is_refused_by_name(field, value, plain):
    change(plain, {field: value})
    with pytest.raises(weights.WeightsError) as raised:
        loaded(plain)
    assert f"asks for {field}={value!r}: this is not implemented" in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"target_modules": ["c_attn"]}, r"\['c_attn'\] .*names no linear layer .* q_proj"),
        ({"target_modules": "(q_proj"}, r"'\(q_proj', which is no regular expression"),
        ({"rank_pattern": {"q_(": 2}}, r"'q_\(', which is no regular expression"),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers("},
            r"'layers\(', which is no regular expression",
        ),
        ({"r": 0}, "rank=0: a low-rank adapter needs"),
        ({"rank_pattern": {"v_proj": 0}}, "rank=0: a low-rank adapter needs"),
        ({"lora_dropout": 1.0}, r"dropout=1.0: the share"),
        ({"r": 5}, r"q_proj.lora_A.weight has shape \(4, 16\), but the model needs \(5, 16\)"),
        ({"target_modules": ["q_proj"]}, r"v_proj.lora_A.weight \(4, 16\) is nothing"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight .* is missing"),
        ({"layers_to_transform": [0]}, r"layers.1.self_attn.q_proj.lora_A.weight .* is nothing"),
        ({"use_dora": True}, r"lora_magnitude_vector \(16,\) is missing"),
        ({"modules_to_save": ["norm"]}, r"model.norm.weight \(16,\) is missing"),
    ],
)
def test_a_config_that_its_file_does_not_bear_out(changed, sentence, plain):
    change(plain, changed)
    with pytest.raises(weights.WeightsError, match=sentence):
        loaded(plain)


@pytest.mark.parametrize("content", ["[]", "null", '"LORA"'])
def test_a_config_that_is_no_object(content, plain):
    (plain / "adapter" / weights.ADAPTER_CONFIG).write_text(content)
    with pytest.raises(weights.WeightsError, match=r"adapter_config.json holds no JSON object"):
        loaded(plain)


def test_an_adapter_on_an_adapter_is_refused(plain):
    decoder = loaded(plain)
    with pytest.raises(weights.WeightsError, match=r"has adapters already: .*merge_lora"):
        weights.load_adapter(decoder, plain / "adapter")


def test_fields_that_are_not_set_are_no_matter(plain):
    """As the files of other versions have them, or leave them out."""
    expected = adapters_of(loaded(plain))
    change(plain, {"a_field_of_next_year": None, "another": False, "third": {}, "loftq_config": {}})
    jax.tree.map(np.testing.assert_array_equal, adapters_of(loaded(plain)), expected)
    path = plain / "adapter" / weights.ADAPTER_CONFIG
    kept = {"r", "lora_alpha", "target_modules"}
    path.write_text(
        json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n in kept})
    )
    jax.tree.map(np.testing.assert_array_equal, adapters_of(loaded(plain)), expected)


def adapters_of(decoder):
    layers = [layer for _, _, layer in lora.adapters(decoder)]
    return [(layer.scaling, layer.lora_A[...], layer.lora_B[...]) for layer in layers]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    peft_model("plain", place)
    return place


@pytest.fixture
def plain(written, tmp_path):
    """A base and an adapter of peft, to be changed."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(place, fields):
    path = place / "adapter" / weights.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
