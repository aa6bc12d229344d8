"""The decoder against numbers that torch made once (tests/golden/make_decoders.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from train import model, weights

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoders.npz")
CASES = sorted({name.partition("/")[0] for name in GOLDEN.files})


def part(case: str, kind: str) -> dict[str, np.ndarray]:
    """All arrays of one kind, by parameter name."""
    start = f"{case}/{kind}/"
    return {
        name.removeprefix(start): GOLDEN[name] for name in GOLDEN.files if name.startswith(start)
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Within 1e-4 of the largest number that is expected."""
    np.testing.assert_allclose(
        actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=what
    )


@pytest.mark.parametrize(("case", "chunk"), list(zip(CASES, (None, 5, 5, None, 4), strict=True)))
def test_logits_loss_and_the_gradient_of_every_parameter(case, chunk, tmp_path):
    """Of weights that were read from files as transformers writes them."""
    tensors = pytest.importorskip("safetensors.numpy", reason="needs the group train")
    (tmp_path / "config.json").write_text(GOLDEN[f"{case}/config"].item())
    tensors.save_file(part(case, "weight"), tmp_path / "model.safetensors")
    graphdef, params, frozen = model.split(weights.load(tmp_path))
    tokens, positions = GOLDEN[f"{case}/tokens"], GOLDEN[f"{case}/positions"]
    loss_fn = model.next_token_loss(graphdef, chunk=chunk)

    @jax.jit
    def outcome(params, frozen, batch):
        logits = nnx.merge(graphdef, params, frozen)(batch.tokens, positions=batch.positions)
        return logits, jax.value_and_grad(loss_fn)(params, frozen, batch)

    batch = model.Batch(tokens, positions=positions)
    logits, (loss, gradients) = outcome(params, frozen, batch)
    assert_close(logits, GOLDEN[f"{case}/logits"], "logits")
    assert float(loss) == pytest.approx(float(GOLDEN[f"{case}/loss"]), rel=1e-5)
    expected, found = part(case, "gradient"), weights.to_hf(gradients)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(found[parameter], gradient, parameter)


def test_the_numbers_are_of_what_they_name():
    """Long positions, a window, QK-norm, shared heads and Llama 3.1's scaling all have a case."""
    configs = [json.loads(GOLDEN[f"{case}/config"].item()) for case in CASES]
    assert {config["model_type"] for config in configs} == {"qwen2", "qwen3", "llama"}
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {config["num_key_value_heads"] for config in configs} == {1, 2, 4}
    assert {config["rope_parameters"]["rope_type"] for config in configs} == {"default", "llama3"}
    assert any("sliding_attention" in config.get("layer_types", []) for config in configs)
    assert all(GOLDEN[f"{case}/positions"].max() > 32_000 for case in CASES)
    assert all(np.diff(GOLDEN[f"{case}/positions"]).max() > 2_000 for case in CASES)
