"""The small models against loops in NumPy, and the driver on a few steps."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import generality, tasks
from train import data

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    splits = [rng.integers(0, 16, 2000, dtype=np.int32) for _ in range(3)]
    return tasks.tasks(data.Corpus(*splits, tokenizer=None))


def test_recurrence_is_a_loop_over_time():
    layer = tasks._Recurrence(rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((2, 7, tasks.WIDTH)).astype(np.float32)
    forget, value, gate = np.split(x @ np.asarray(layer.parts.kernel[...]), 3, axis=-1)
    keep, h, out = 1 / (1 + np.exp(-forget - 2)), np.zeros((2, tasks.WIDTH)), []
    for t in range(7):
        h = keep[:, t] * h + (1 - keep[:, t]) * value[:, t]
        out.append(h)
    expected = (np.stack(out, 1) * gate / (1 + np.exp(-gate))) @ np.asarray(layer.out.kernel[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_experts_are_the_best_two_of_each_token():
    layer = tasks._Experts(rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((1, 5, tasks.WIDTH)).astype(np.float32)
    up, down = np.asarray(layer.up[...]), np.asarray(layer.down[...])
    scores = np.exp(x[0] @ np.asarray(layer.router.kernel[...]))
    share = scores / scores.sum(-1, keepdims=True)
    expected, chosen = np.zeros_like(x[0]), np.zeros(tasks.EXPERTS)
    for token, row in enumerate(x[0]):
        best = np.argsort(-share[token])[: tasks.CHOSEN]
        chosen[best] += 1 / best.size / len(x[0])
        for expert in best:
            hidden = row @ up[expert]
            weight = share[token, expert] / share[token, best].sum()
            expected[token] += weight * (hidden / (1 + np.exp(-hidden))) @ down[expert]
    y, uneven = layer(jnp.asarray(x))
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(uneven, tasks.EXPERTS * chosen @ share.mean(0), rtol=1e-5)


def test_patches_fit_together_again():
    pictures = np.random.default_rng(0).standard_normal((3, tasks.SIDE, tasks.SIDE))
    patches = tasks._patches(jnp.asarray(pictures))
    np.testing.assert_array_equal(patches[0, 1], pictures[0, :4, 4:8].ravel().astype(np.float32))
    np.testing.assert_array_equal(tasks._picture(patches), pictures.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("experts", "constant rate"),
        ("recurrence", "constant rate"),
        ("diffusion", "constant rate"),
        ("decoder", "warm-up + cosine"),
    ],
)
def test_each_task_starts_at_chance_and_learns(known, name, schedule, monkeypatch):
    monkeypatch.setattr(generality, "STEPS", 10)
    cell = generality.cell_of(schedule, name, "AdamW", True, 3e-3, 0)
    found = generality.measure(known[name], cell)
    chance = 1.0 if name == "diffusion" else np.log(tasks.VOCABULARY)
    assert found["before"] == pytest.approx(chance, rel=0.6)
    assert found["loss"] < found["before"]
    assert 0 < found["scale"] <= 1
