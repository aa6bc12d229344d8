"""The loss in chunks against the whole one and NumPy; what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from train import losses, model

CONFIG = model.Config(
    vocab_size=41,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(41, size=(3, 11)).astype(np.int32)
TOKENS[1, 6:] = losses.IGNORED


def by_numpy(logits, targets, z_loss=0.0):
    logits = np.asarray(logits, np.float64)
    total, count = 0.0, 0
    for place, target in np.ndenumerate(targets):
        if target != losses.IGNORED:
            normaliser = np.log(np.exp(logits[place]).sum())
            total += normaliser - logits[place][target] + z_loss * normaliser**2
            count += 1
    return total / count


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_cross_entropy_equals_numpy(z_loss):
    logits = RNG.normal(size=(3, 10, 41)).astype(np.float32)
    loss = losses.cross_entropy(logits, TOKENS[:, 1:], z_loss)
    assert float(loss) == pytest.approx(by_numpy(logits, TOKENS[:, 1:], z_loss), rel=1e-6)


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.0), (3, 0.3), (10, 0.0), (64, 0.3)])
def test_chunks_give_the_whole_loss_and_gradient(chunk, z_loss):
    """Of the input and of the head, also where the chunk does not divide the length."""
    hidden = RNG.normal(size=(3, 10, 8)).astype(np.float32)
    head = RNG.normal(size=(8, 41)).astype(np.float32)
    targets = TOKENS[:, 1:]

    def whole(hidden, head):
        return losses.cross_entropy(hidden @ head, targets, z_loss)

    def chunked(hidden, head):
        return losses.chunked_cross_entropy(
            lambda rows: rows @ head, hidden, targets, chunk=chunk, z_loss=z_loss
        )

    both = [jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (whole, chunked)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-7), *both)


def largest_array(jaxpr):
    """Of everything that a program computes, the programs inside it included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize("chunk", [None, 2])
def test_chunks_never_hold_the_logits_of_a_batch(chunk):
    config = model.Config(**{**vars(CONFIG), "vocab_size": 1000})
    graphdef, params, frozen = model.split(model.Decoder(config, rngs=nnx.Rngs(0)))
    step = jax.value_and_grad(model.next_token_loss(graphdef, chunk=chunk))
    largest = largest_array(jax.make_jaxpr(step)(params, frozen, TOKENS).jaxpr)
    if chunk is None:
        assert largest >= 3 * 10 * 1000
    else:
        assert largest <= max(3 * chunk * 1000, 1000 * 8)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        losses.chunked_cross_entropy(lambda x: x, jnp.ones((1, 2, 3)), jnp.ones((1, 2)), chunk=0)


@pytest.mark.parametrize("xp", [np, jnp])
def test_targets_end_with_their_document(xp):
    tokens = xp.asarray([[4, 5, 6, 7, -1], [1, 2, 3, 4, 5]])
    segments = xp.asarray([[0, 0, 1, 1, 1], [7, 7, 7, 7, 7]])
    found = losses.targets(losses.Batch(tokens, segments))
    assert found.tolist() == [[5, -1, 7, -1], [2, 3, 4, 5]]
    assert losses.targets(tokens).tolist() == [[5, 6, 7, -1], [2, 3, 4, 5]]
