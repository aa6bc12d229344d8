"""What the guard remembers of activations: against NumPy, and that it decides nothing by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import (
    AS_USUAL,
    PLACEMENTS,
    assert_all_finite,
    assert_same_bits,
    gradients_of,
    guard_in,
    slowly,
    small_params,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.activations import Outliers
from lbw_optax.law import layers

absorb = jax.jit(layers.absorb)


def given(peaks, shares=None, logits=None):
    peaks = jnp.asarray(peaks, jnp.float32)
    shares = peaks / 100 if shares is None else jnp.asarray(shares, jnp.float32)
    found = {"layers": Outliers(shares, peaks)}
    return found if logits is None else found | {"attention": jnp.asarray(logits, jnp.float32)}


def spread_of(peaks):
    return np.std(np.log(np.maximum(np.asarray(peaks, np.float64), 1)))


@pytest.mark.parametrize("peaks", [[4.0, 5.0, 30.0, 6.0], [7.0], [0.0, 0.0], [0.0, 8.0]])
def test_the_newest_layers_in_a_few_numbers(peaks):
    after = absorb(layers.init(), given(peaks, logits=[3.0, 60.0]))
    assert float(after.peak) == max(peaks)
    assert float(after.outlier_share) == pytest.approx(max(peaks) / 100)
    assert int(after.farthest) == int(np.argmax(peaks))
    assert float(after.spread) == pytest.approx(spread_of(peaks), abs=1e-6)
    assert float(after.attention_logit) == 60
    assert int(after.nonfinite) == 0


def test_drift_is_in_standard_deviations_of_the_spreads_before():
    """A reference without clipping, which such spreads do not reach."""
    rng = np.random.default_rng(0)
    state, mean, variance, weight = layers.init(), 0.0, 0.0, 0.0
    for step in range(300):
        peaks = 5 * np.exp(0.1 * rng.normal(size=6))
        state = absorb(state, given(peaks))
        x, std = spread_of(peaks), np.sqrt(variance + 0.05**2 + 0.3**2 * (1 - weight))
        expected = (x - mean) / std if step else 0.0
        assert float(state.drift) == pytest.approx(expected, abs=1e-4)
        weight = 0.99 * weight + 0.01
        rate = 0.01 / weight
        mean, away = mean + rate * (x - mean), x - mean
        variance = (1 - rate) * (variance + rate * away**2)
    runaway = absorb(state, given([5.0, 5.0, 5.0, 40.0, 5.0, 5.0]))
    assert float(runaway.drift) > 6
    # One such step moves what is usual by little.
    assert float(runaway.usual.mean - state.usual.mean) < 3.1 * 0.01 / weight * std


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_counted_and_enters_nothing(bad):
    before = absorb(layers.init(), given([4.0, 5.0, 6.0], logits=[3.0]))
    after = absorb(before, given([9.0, bad, bad], [0.1, np.nan, np.nan], logits=[np.nan]))
    assert_all_finite(after)
    assert (float(after.peak), int(after.farthest), int(after.nonfinite)) == (9, 1, 3)
    assert float(after.spread) == 0
    assert float(after.attention_logit) == 3
    all_bad = absorb(after, given([bad, bad, bad], [bad] * 3))
    assert_all_finite(all_bad)
    kept = after._replace(farthest=jnp.int32(0), nonfinite=jnp.int32(3))
    assert_same_bits(all_bad, kept)


def test_a_stack_and_its_layers_one_by_one_are_the_same():
    peaks = [4.0, 11.0, 6.0]
    apart = {f"block.{i}": Outliers(jnp.float32(p / 100), p) for i, p in enumerate(peaks)}
    assert_same_bits(absorb(layers.init(), apart), absorb(layers.init(), given(peaks)))


def test_one_kind_alone_leaves_the_other():
    before = absorb(layers.init(), given([4.0, 9.0], logits=[5.0]))
    after = absorb(before, {"attention": 7.0})
    assert_same_bits(after, before._replace(attention_logit=jnp.float32(7)))
    assert_same_bits(layers.absorb(before, {}), before)
    assert_same_bits(layers.absorb(before, None), before)


STEPS = 30


@functools.cache
def trajectory(placement, watched):
    """Parameters, states and updates of a run with a NaN and a jump, in one compiled program."""
    tx = optax.with_extra_args_support(PLACEMENTS[placement](optax.adamw(0.05)))
    rng = np.random.default_rng(1)
    peaks = 5 * np.exp(rng.normal(size=(STEPS, 4)))
    peaks[20, 1] = np.nan
    factors = np.ones(STEPS, np.float32)
    factors[10], factors[15] = np.nan, 1e6

    @functools.partial(jax.jit, compiler_options=AS_USUAL)
    def step(params, state, gradients, peaks):
        more = {"activations": given(peaks, logits=peaks)} if watched else {}
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1), **more)
        return updates, optax.apply_updates(params, updates), state

    params = small_params()
    state = tx.init(params)
    found = []
    for factor, row in zip(factors, peaks, strict=True):
        gradients = jax.tree.map(lambda g, f=factor: g * f, gradients_of(params))
        updates, params, state = step(params, state, gradients, row)
        found.append(jax.device_get((updates, params, state)))
    return found


@pytest.mark.parametrize("placement", ["wrapped", *slowly("chained")])
def test_decisions_are_the_same_to_the_bit_with_and_without(placement):
    for with_it, without in zip(
        trajectory(placement, True), trajectory(placement, False), strict=True
    ):
        own = [guard_in(x[2])._replace(layers=None) for x in (with_it, without)]
        assert_same_bits(own[0], own[1])
        assert_same_bits(with_it[:2], without[:2])
    last = lbw_optax.metrics(trajectory(placement, True)[-1][2])
    assert float(last["activation_peak"]) > 1
    assert int(last["events"]) >= 2
    never = lbw_optax.metrics(trajectory(placement, False)[-1][2])
    assert int(never["activation_layer"]) == -1
    assert float(never["attention_logit"]) == 0


def kinds(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_state_is_the_same_whether_activations_arrive(placement):
    tx, params = PLACEMENTS[placement](optax.sgd(0.1)), small_params()

    def trace(params, activations):
        state = tx.init(params)
        return state, tx.update(params, state, params, value=1.0, activations=activations)[1]

    python_numbers = {"a": Outliers(0.5, 3), "b": np.float64(2)}
    for activations in (None, given([4.0] * 7), given([4.0], logits=[1.0] * 3), python_numbers):
        before, after = jax.eval_shape(functools.partial(trace, activations=activations), params)
        assert kinds(guard_in(before)) == kinds(guard_in(after))
        assert jax.tree.structure(before) == jax.tree.structure(after)


def test_the_inner_optimizer_is_given_all_but_the_activations():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = lbw_guard(inner), small_params()
    more = {"activations": given([4.0]), "own_name": 7}
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=1.0, **more), params)
    assert seen.keys() == {"value", "own_name"}


def test_under_vmap_each_run_has_activations_of_its_own():
    before = jax.tree.map(lambda x: jnp.stack([x, x]), layers.init())
    after = jax.vmap(layers.absorb)(before, given([[4.0, 9.0], [8.0, 5.0]]))
    assert after.farthest.tolist() == [1, 0]
    assert after.peak.tolist() == [9, 8]


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(lbw_guard(optax.sgd(0.1)), 2),
        lbw_guard(optax.MultiSteps(optax.sgd(0.1), 2)),
        optax.masked(lbw_guard(optax.sgd(0.1)), {"bias": True, "gain": False, "weights": True}),
    ],
    ids=["multi_steps_around", "multi_steps_inside", "masked"],
)
def test_it_reaches_the_guard_in_a_nest(tx):
    params = small_params()

    def newest(peaks):
        more = {"value": 1.0, "activations": given(peaks)}
        return guard_in(tx.update(params, state, params, **more)[1]).layers.peak

    state = tx.init(params)
    traced = jax.make_jaxpr(newest)(jnp.ones(3))
    given_to_it, _ = jax.interpreters.partial_eval.dce_jaxpr(traced.jaxpr, [True])
    assert len(given_to_it.invars) == 1
