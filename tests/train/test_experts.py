"""A mixture of experts against every expert computed for every token, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train import experts
from train.architectures import Experts

HIDDEN, TOKENS, COUNT = 6, 20, 5


def made(config, gate):
    kinds = {"dtype": None, "param_dtype": jnp.float32, "init": nnx.initializers.normal(0.5)}
    mixture = experts.Mixture(HIDDEN, config, **kinds, rngs=nnx.Rngs(0))
    mixture.gate.kernel[...] = jnp.asarray(gate)
    return mixture


def reference(mixture, x, normalised):
    """Rows and how often each expert was chosen; the largest probabilities by a full sort."""
    gate, up, down = (
        np.asarray(getattr(mixture.experts, name)[...], np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    logits = x @ np.asarray(mixture.gate.kernel[...], np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows, times = np.zeros_like(x), np.zeros(COUNT)
    for token, row in enumerate(x):
        best = np.argsort(-probabilities[token], kind="stable")[: mixture.config[1]]
        weights = probabilities[token, best]
        weights = weights / weights.sum() if normalised else weights
        for expert, weight in zip(best, weights, strict=True):
            inner = row @ gate[expert]
            rows[token] += weight * (
                (inner / (1 + np.exp(-inner)) * (row @ up[expert])) @ down[expert]
            )
            times[expert] += 1
    return rows, times, probabilities.sum(axis=0)


def one_for_all(rng):
    """Every token to the same two experts: three have nothing to do."""
    return np.outer(np.ones(HIDDEN), [0.0, 9.0, 0.0, 0.0, 8.0])


def at_random(rng):
    return rng.normal(size=(HIDDEN, COUNT))


@pytest.mark.parametrize(("chosen", "normalised"), [(2, True), (1, False), (COUNT, False)])
def test_a_mixture_is_the_weighted_sum_of_its_experts(chosen, normalised):
    config = Experts(COUNT, chosen, 4, normalised)
    call = nnx.jit(lambda mixture, x: mixture(x))
    for gates in (at_random, one_for_all):
        rng = np.random.default_rng(0)
        mixture, x = made(config, gates(rng)), np.abs(rng.normal(size=(TOKENS, HIDDEN)))
        rows, times, probabilities = reference(mixture, x, normalised)
        found, routed = call(mixture, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(routed.chosen, times)
        np.testing.assert_allclose(routed.probabilities, probabilities, rtol=1e-5)
        assert routed.tokens == TOKENS


@pytest.mark.parametrize("first", [0, 3])
def test_every_pair_lies_once_in_a_block_of_its_expert(first):
    """Of the experts that are here; the others are another device's."""
    plan = jax.jit(experts._planned, static_argnames="experts")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        expert = rng.choice(COUNT + first, size=23, p=rng.dirichlet(np.full(COUNT + first, 0.3)))
        found = plan(jnp.asarray(expert - first), experts=COUNT)
        rows = np.asarray(found.row).reshape(len(found.expert), -1)
        owner = np.repeat(found.expert, rows.shape[1]), rows.reshape(-1)
        there = {(e, r) for e, r in np.transpose(owner).tolist() if r != experts._NOWHERE}
        mine = [(e - first, i) for i, e in enumerate(expert) if 0 <= e - first < COUNT]
        assert there == set(mine)
        assert np.sum(rows != experts._NOWHERE) == len(mine)
