"""The loop against a loop by hand; perplexity against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbw_optax import events, lbw_guard
from train import loop
from train.losses import IGNORED, Batch, targets

TARGETS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
START = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.float32(0.5)}


def quadratic(params, frozen, target):
    return jnp.sum((frozen * params["w"] + params["b"] - target) ** 2)


def by_hand(tx, steps, state=None):
    params, losses = START, []
    state = tx.init(params) if state is None else state
    for step in range(steps):
        loss, grads = jax.value_and_grad(quadratic)(params, 2.0, TARGETS[step])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


def fit(tx, steps=8, **options):
    return loop.fit(quadratic, START, tx, TARGETS.__getitem__, steps, frozen=2.0, **options)


def assert_close(tree, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), tree, other)


@pytest.mark.parametrize("tx", [optax.sgd(0.05, momentum=0.9), optax.adamw(0.1)])
def test_fit_is_the_loop_by_hand(tx):
    run = fit(tx)
    params, losses = by_hand(tx, 8)
    assert_close(run.params, params)
    np.testing.assert_allclose(run.history["loss"], losses, rtol=1e-5)
    assert set(run.history) == {"loss"}


def test_what_the_caller_gave_stays_valid():
    tx = optax.adamw(0.1)
    state = tx.init(START)
    fit(tx, opt_state=state)
    assert START["w"].tolist() == [1.0, -2.0, 3.0]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_a_run_goes_on_from_a_state():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)
    state = optax.tree.set(tx.init(START), learning_rate=jnp.float32(0.1))
    assert_close(fit(tx, opt_state=state).params, by_hand(optax.adamw(0.1), 8)[0])
    assert_close(fit(tx).params, START)


def test_the_history_holds_what_the_guard_measured():
    run = fit(lbw_guard(optax.adamw(0.1)))
    assert {name: values.shape for name, values in run.history.items()}["scale"] == (8,)
    assert np.all((run.history["scale"] > 0) & (run.history["scale"] <= 1))
    assert run.history["regime"].dtype == np.int32
    seen = [float(np.sum((2.0 * START["w"] + START["b"] - TARGETS[0]) ** 2))]
    np.testing.assert_allclose(run.history["loss"][:1], seen, rtol=1e-5)


def test_on_step_sees_every_step_in_order_and_a_living_state():
    seen = []

    def on_step(step, metrics, opt_state):
        seen.append((step, float(metrics["loss"]), len(events(opt_state))))

    run = fit(lbw_guard(optax.adamw(0.1)), on_step=on_step)
    assert [step for step, _, _ in seen] == list(range(8))
    assert [loss for _, loss, _ in seen] == run.history["loss"].tolist()


def test_no_steps_change_nothing():
    run = fit(optax.adamw(0.1), steps=0)
    assert_close(run.params, START)
    assert run.history == {}


def token_model(params, frozen, batch):
    """Squared error of a bilinear model: its gradient depends on inputs, targets and params."""
    batch = batch if isinstance(batch, Batch) else Batch(batch)
    wanted = targets(batch)
    counted = wanted != IGNORED
    error = params["w"][batch.tokens[:, :-1]] * params["b"] - frozen * wanted
    return jnp.where(counted, error**2, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def uneven_batches():
    rng = np.random.default_rng(5)
    tokens = rng.integers(7, size=(8, 10)).astype(np.int32)
    padded = tokens.copy()
    padded[3, 4:] = padded[6:, 1:] = IGNORED
    segments = np.cumsum(tokens == 0, axis=1, dtype=np.int32)
    return {"tokens": tokens, "padded": padded, "packed": Batch(tokens, segments)}


@pytest.mark.parametrize("kind", ["tokens", "padded", "packed"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_microbatches_give_the_gradient_of_the_whole_batch(kind, count):
    batch = uneven_batches()[kind]
    params = {"w": jnp.linspace(-1.0, 2.0, 7), "b": jnp.float32(1.5)}
    whole = loop._gradient(token_model, params, 0.3, batch, 1)
    parts = loop._gradient(token_model, params, 0.3, batch, count)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), whole, parts)
    if kind != "tokens":  # the mean of the parts' means is something else
        cut = loop._parts(batch, count)
        losses = [
            token_model(params, 0.3, jax.tree.map(lambda x, i=i: x[i], cut)) for i in range(count)
        ]
        assert abs(np.mean(losses) - float(whole[0])) > 1e-4


def test_every_microbatch_has_a_dropout_of_its_own():
    batch = Batch(np.zeros((4, 3), np.int32), step=np.uint32(5))
    assert loop._parts(jax.tree.map(jnp.asarray, batch), 2).step.tolist() == [10, 11]
    assert loop._parts(jax.tree.map(jnp.asarray, batch._replace(step=6)), 2).step.tolist() == [
        12,
        13,
    ]


def test_a_batch_that_cannot_be_cut_is_named():
    with pytest.raises(ValueError, match="8 sequences cannot be cut into 3 microbatches"):
        loop._gradient(token_model, {}, 0.3, uneven_batches()["tokens"], 3)


def test_the_step_is_compiled_once_for_one_optimizer():
    traces = []

    def counted(params, frozen, target):
        traces.append(frozen)
        return quadratic(params, frozen, target)

    tx = lbw_guard(optax.inject_hyperparams(optax.adamw)(learning_rate=0.0))
    for rate in (0.1, 0.2):
        state = optax.tree.set(tx.init(START), learning_rate=jnp.float32(rate))
        loop.fit(counted, START, tx, TARGETS.__getitem__, 4, frozen=rate, opt_state=state)
    assert len(traces) == 1


def test_frozen_is_an_argument_and_no_constant_of_the_program():
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    arguments = (jnp.float32(1.0), tx.init(jnp.float32(1.0)), jnp.arange(777.0), jnp.float32(0.0))

    def loss_fn(params, frozen, batch):
        return params * jnp.sum(frozen)

    program = loop.train_step.lower(loss_fn, tx.update, *arguments).as_text()
    signature = next(line for line in program.splitlines() if "@main" in line)
    assert "tensor<777xf32>" in signature.split("->")[0]
    assert "tensor<777xf32>" not in signature.split("->")[1]


def mean_loss(params, frozen, tokens):
    """A toy model with a known likelihood: target k costs params * k + frozen nats."""
    targets = tokens[:, 1:]
    counted = targets != IGNORED
    return jnp.where(counted, params * targets + frozen, 0.0).sum() / counted.sum()


def test_perplexity_weighs_each_target_the_same():
    rng = np.random.default_rng(1)
    windows = rng.integers(5, size=(3, 2, 6)).astype(np.int32)
    windows[-1, 1, 2:] = IGNORED
    windows[-1, 0, 5:] = IGNORED
    targets = windows[..., 1:][windows[..., 1:] != IGNORED]
    expected = np.exp(np.mean(0.3 * targets + 0.1))
    assert loop.perplexity(mean_loss, 0.3, windows, frozen=0.1) == pytest.approx(expected, rel=1e-6)
    each = [loop.perplexity(mean_loss, 0.3, windows[i : i + 1], frozen=0.1) for i in range(3)]
    assert np.exp(np.mean(np.log(each))) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("cost", "expected"), [(1e4, np.inf), (np.nan, np.nan)])
def test_perplexity_of_a_broken_model_is_a_number_without_warning(cost, expected):
    windows = np.ones((1, 2, 3), np.int32)
    np.testing.assert_equal(loop.perplexity(mean_loss, cost, windows, frozen=0.0), expected)
