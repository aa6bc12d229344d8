"""Every method of the table trains, with a traced learning rate, in every regime it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.stress.methods import METHODS
from benchmarks.stress.regimes import REGIMES, averaged, recipe

STEPS = 50
PAIRS = [(name, method.regimes[-1]) for name, method in METHODS.items()]


@pytest.mark.parametrize(("name", "regime"), PAIRS)
def test_the_loss_falls(name, regime):
    target = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.linspace(1, 2, 3)}

    def loss_fn(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    def run(lr):
        given = recipe(REGIMES[regime], lr, STEPS)
        tx = optax.with_extra_args_support(METHODS[name].build(given))
        params = jax.tree.map(jnp.ones_like, target)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return losses[0], loss_fn(averaged(*carry))

    before, after = jax.jit(run)(jnp.float32(0.05))
    assert after < before


@pytest.mark.parametrize("regime", REGIMES)
def test_the_schedule_starts_above_zero_and_peaks_at_the_rate(regime):
    given = recipe(REGIMES[regime], jnp.float32(0.2), 40)
    rates = np.array([given.learning_rate(step) for step in range(40)])
    undecayed = np.array([given.undecayed(step) for step in range(40)])
    assert rates.min() > 0
    assert rates.max() == pytest.approx(0.2)
    np.testing.assert_allclose(rates, [0.2 * given.shape(step) for step in range(40)], rtol=1e-6)
    if REGIMES[regime].warmup_cosine:
        assert rates[-1] < 0.01 < 0.19 < undecayed[-1]
        np.testing.assert_allclose(undecayed[:5], [0.05, 0.1, 0.15, 0.2, 0.2], rtol=1e-6)
    else:
        assert rates.min() == rates.max() == undecayed.min()


def test_what_is_evaluated_of_a_schedule_free_run_is_its_average():
    tx = optax.chain(optax.identity(), optax.contrib.schedule_free_adamw(0.1))
    params = jnp.ones(3)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    expected = optax.contrib.schedule_free_eval_params(state[1], params)
    np.testing.assert_allclose(averaged(params, state), expected)
    assert np.abs(np.asarray(expected - params)).max() > 1e-3


def test_the_regimes_clip_reaches_the_optimizer():
    """Against the same chain by hand: after one huge gradient the moments hold a clipped one."""
    given = recipe(REGIMES["recipe"], jnp.float32(0.1), 40)
    tx = METHODS["adamw"].build(given)
    by_hand = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(given.learning_rate, b1=0.9, b2=0.95, weight_decay=0.1),
    )
    params, grads = jnp.ones(4), [jnp.full(4, 100.0), jnp.array([0.1, 0.2, 0.3, -0.1])]
    states = [tx.init(params), by_hand.init(params)]
    for gradient in grads:
        (ours, states[0]), (theirs, states[1]) = (
            transform.update(gradient, state, params)
            for transform, state in zip((tx, by_hand), states, strict=True)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
