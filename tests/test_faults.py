"""Faults by name, through the real guard: what a bad step may change, and how training goes on.

A skipped step changes nothing: parameters and inner state are compared as integers.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import flat
from support import (
    INNER,
    assert_all_finite,
    assert_same_bits,
    chained,
    gradients_of,
    guard_in,
    guarded,
    loss_of,
    run_of,
    slowly,
    small_params,
    train,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law import control
from lbw_optax.law.divergence import Reason

NAN, INF = np.float32(np.nan), np.float32(np.inf)
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
GOVERNED = ["adamw", "sgd_momentum"]
over_governed_in_both_types = pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        ("adamw", "f32"),
        ("adamw", "bf16"),
        ("sgd_momentum", "f32"),
        *slowly(("sgd_momentum", "bf16")),
    ],
)


def _every(gradients, x):
    return jax.tree.map(lambda g: np.full_like(g, x), gradients)


def _one_element(gradients, x):
    weights = np.array(gradients["weights"])
    weights[2, 1] = x
    return {**gradients, "weights": weights}


# Each takes healthy (gradients, loss) and returns bad ones, and names the signal that tells.
FAULTS = {
    "nan_loss": (lambda g, v: (g, NAN), "nonfinite_loss"),
    "inf_loss": (lambda g, v: (g, INF), "nonfinite_loss"),
    "nan_gradient": (lambda g, v: (_every(g, NAN), v), "nonfinite_gradients"),
    "nan_gradient_and_loss": (lambda g, v: (_every(g, NAN), NAN), "nonfinite_gradients"),
    "nan_in_one_element": (lambda g, v: (_one_element(g, NAN), v), "nonfinite_gradients"),
    "inf_in_one_leaf": (lambda g, v: ({**g, "bias": _every(g["bias"], INF)}, v), None),
    "minus_inf_in_one_element": (lambda g, v: (_one_element(g, -INF), v), "nonfinite_gradients"),
    "norm_overflows_f32": (lambda g, v: (_every(g, 1e30), v), "nonfinite_gradients"),
}
MOMENTS = {"first": 0, "warm_up": 2, "later": 60}


def with_negative_zeros(params):
    """Adding +0.0 would turn them into +0.0: a skip may not."""
    return {**params, "bias": params["bias"].at[0].set(-0.0)}


def assert_skips(run, params, state, gradients, value):
    """One bad step: nothing moves but the guard's own account of it."""
    before = guard_in(state)
    new_params, new_state = run.step(params, state, gradients, value)
    after = guard_in(new_state)
    assert_same_bits(new_params, params)
    assert_same_bits(after.inner_state, before.inner_state)
    assert int(after.law.control.skips) == int(before.law.control.skips) + 1
    assert float(after.law.control.log_scale) == float(before.law.control.log_scale)
    assert_all_finite(new_params, new_state)
    return new_params, new_state


def assert_converges(run, params, state, steps=400, share=0.02):
    """To this share of the loss at the very beginning; and no healthy step is skipped."""
    skips = int(guard_in(state).law.control.skips)
    start = loss_of(small_params())
    params, state = train(run, params, state, steps)
    assert loss_of(params) < share * start
    assert int(guard_in(state).law.control.skips) == skips
    assert_all_finite(params, state)


@functools.cache
def trained(inner: str, dtype: str, steps: int):
    run, params = guarded(inner), small_params(DTYPES[dtype])
    return train(run, params, run.init(params), steps)


@over_governed_in_both_types
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_step_changes_nothing(fault, moment, inner, dtype):
    make, signal = FAULTS[fault]
    run = guarded(inner)
    params, state = trained(inner, dtype, MOMENTS[moment])
    params = with_negative_zeros(params)
    gradients, value = make(gradients_of(params), np.float32(loss_of(params)))
    params, state = assert_skips(run, params, state, gradients, value)
    newest = lbw_optax.events(state)[-1]
    assert newest.action == "skip"
    assert newest.step == MOMENTS[moment]
    assert newest.signal == (signal or "nonfinite_gradients")


@over_governed_in_both_types
@pytest.mark.parametrize("moment", MOMENTS)
def test_training_converges_after_every_fault_in_turn(moment, inner, dtype):
    run = guarded(inner)
    params, state = trained(inner, dtype, MOMENTS[moment])
    for make, _ in FAULTS.values():
        bad = make(gradients_of(params), np.float32(loss_of(params)))
        params, state = assert_skips(run, params, state, *bad)
    # bfloat16 has steps of 1/128 at 1: a small scale cannot move it closer.
    assert_converges(run, params, state, share=0.02 if dtype == "f32" else 0.1)


@over_governed_in_both_types
@pytest.mark.parametrize("factor", [1e4, 1e6, 1e12])
def test_a_gradient_that_jumps_is_limited_not_thrown_away(factor, inner, dtype):
    """To the length that the run has shown: state and step are those of that gradient."""
    run = guarded(inner)
    params, state = trained(inner, dtype, 60)
    gradients, loss = gradients_of(params), np.float32(loss_of(params))
    shown = np.exp(float(guard_in(state).law.statistics.gradient.mean))
    norm = np.linalg.norm(flat(jax.tree.leaves(gradients)))
    jumps, limited = (
        jax.tree.map(lambda x, k=k: (x * np.float32(k)).astype(x.dtype), gradients)
        for k in (factor, shown / norm)
    )
    after, new_state = run.step(params, state, jumps, loss)
    newest = lbw_optax.events(new_state)[-1]
    assert (newest.action, newest.signal, newest.step) == ("clip", "gradient_norm", 60)
    assert int(guard_in(new_state).law.control.skips) == 0
    expected, expected_state = run.step(params, state, limited, loss)
    tolerance = 1e-4 if dtype == "f32" else 2e-2
    for found, wanted in (
        (after, expected),
        (guard_in(new_state).inner_state, guard_in(expected_state).inner_state),
    ):
        chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance * 1e-2)
    assert loss_of(after) != loss_of(params)
    assert_converges(run, after, new_state, share=0.02 if dtype == "f32" else 0.1)


@pytest.mark.parametrize("inner", GOVERNED)
@pytest.mark.parametrize("moment", MOMENTS)
def test_ten_nan_gradients_in_a_row(moment, inner):
    run = guarded(inner)
    params, state = trained(inner, "f32", MOMENTS[moment])
    for _ in range(10):
        params, state = assert_skips(run, params, state, _every(gradients_of(params), NAN), NAN)
    assert int(guard_in(state).law.control.skips_in_a_row) == 10
    lbw_optax.check(state)  # thirty in a row would be too many, ten are not
    assert_converges(run, params, state)


@pytest.mark.parametrize("inner", GOVERNED)
def test_five_hundred_bad_steps_exhaust_the_guard_and_pass_nothing(inner):
    run = guarded(inner)
    start, state = trained(inner, "f32", 60)
    params, bad = start, _every(gradients_of(start), NAN)
    for step in range(500):
        params, state = run.step(params, state, bad, NAN)
        exhausted = bool(guard_in(state).law.control.exhausted)
        assert exhausted == (step + 1 >= 30)
    assert_same_bits(params, start)
    assert_same_bits(
        guard_in(state).inner_state, guard_in(trained(inner, "f32", 60)[1]).inner_state
    )
    assert_all_finite(state)
    with pytest.raises(lbw_optax.GuardExhausted) as error:
        lbw_optax.check(state)
    text = str(error.value)
    for part in (
        "560 steps",
        "500 skipped in all, 500 in a row",
        "nonfinite_gradients",
        "lbw_optax.reset",
    ):
        assert part in text
    # A person clears it, the data are good again, training goes on.
    state = lbw_optax.reset(state)
    lbw_optax.check(state)
    params, state = train(run, params, state, 400)
    assert loss_of(params) < 0.02 * loss_of(small_params())


HEALTHY_BUT_EXTREME = {
    "f16_norm_overflows_f16": (jnp.float16, 300.0),
    "f32_large": (jnp.float32, 1e18),
    "f32_small": (jnp.float32, 1e-15),
}


@pytest.mark.parametrize(("dtype", "size"), HEALTHY_BUT_EXTREME.values(), ids=HEALTHY_BUT_EXTREME)
def test_extreme_but_healthy_gradients_are_not_skipped(dtype, size):
    """Their squares overflow (300^2 in f16) or nearly so, and yet this run is healthy."""
    run, params = _plain_descent(), small_params(dtype)
    state = run.init(params)
    rng = np.random.default_rng(6)
    for _ in range(20):
        gradients = jax.tree.map(
            lambda p: np.asarray(size * (1 + 0.1 * rng.normal(size=p.shape)), p.dtype), params
        )
        params, state = run.step(params, state, gradients, np.float32(1))
    norm = size * math.sqrt(16)
    np.testing.assert_allclose(guard_in(state).telemetry.gradient_norm, norm, rtol=0.2)
    assert int(guard_in(state).law.control.skips) == 0
    assert not lbw_optax.events(state)
    assert_all_finite(state, params)


@functools.cache
def _plain_descent():
    """Steps of fixed length, whatever the size of the gradient."""
    return run_of(lbw_guard(optax.chain(optax.scale_by_sign(), optax.scale(-1e-3))))


@pytest.mark.parametrize("inner", GOVERNED)
def test_zero_gradients_for_a_hundred_steps(inner):
    run = guarded(inner)
    params, state = trained(inner, "f32", 60)
    for _ in range(100):
        params, state = run.step(params, state, _every(gradients_of(params), 0), np.float32(1))
        assert_all_finite(params, state)
    assert int(guard_in(state).law.control.skips) == 0
    assert_converges(run, params, state)


def _divide_by_size():
    """The sign, by division: NaN where a healthy gradient is zero."""
    return optax.stateless(lambda u, _: jax.tree.map(lambda x: x / jnp.abs(x), u))


def test_updates_that_turn_nonfinite_inside_the_optimizer():
    """They are not applied; an inner state that is broken with them is a matter for a rollback."""
    inner = optax.chain(_divide_by_size(), optax.trace(0.5), optax.scale(-0.02))
    run, params = run_of(lbw_guard(inner)), small_params()
    state = run.init(params)
    params, state = train(run, params, state, 20)
    gradients, start = _one_element(gradients_of(params), 0.0), params
    for _ in range(2):
        params, state = run.step(params, state, gradients, np.float32(1))
        assert_same_bits(params, start)
        gradients = gradients_of(params)
    newest = lbw_optax.events(state)[-1]
    assert (newest.action, newest.signal, newest.value) == ("skip", "nonfinite_updates", 1)
    assert int(lbw_optax.metrics(state)["rollback_asked"]) == Reason.INNER_STATE
    assert_all_finite(guard_in(state)._replace(inner_state=None))


# --- trees -------------------------------------------------------------------------------------

MASKED = optax.MaskedNode()
TREES = {
    "empty": {},
    "scalar": np.float32(3.0),
    "size_0_leaves": {"a": np.zeros([0, 3], np.float32), "b": np.float32([2.0, -1.0])},
    "none_leaves": {"a": None, "b": np.float32([2.0, -1.0])},
    "masked_node_leaves": {"a": MASKED, "b": np.float32([2.0, -1.0])},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees(tree):
    run = guarded("adamw")
    params = jax.tree.map(jnp.asarray, tree)
    state = run.init(params)
    for step in range(5):
        bad = step == 2
        gradients = _every(gradients_of(params), NAN) if bad else gradients_of(params)
        before = params, guard_in(state).inner_state
        params, state = run.step(params, state, gradients, NAN if bad else np.float32(1))
        if bad:
            assert_same_bits((params, guard_in(state).inner_state), before)
        assert_all_finite(params, state)
    assert int(guard_in(state).law.control.skips) == 1
    if any(leaf.size for leaf in jax.tree.leaves(tree)):
        params, state = train(run, params, state, 400)
        assert loss_of(params) < 0.02 * loss_of(tree)


@functools.cache
def _beside_integers():
    """SGD for the floats; integer leaves pass through as they come."""
    return run_of(lbw_guard(optax.masked(optax.sgd(0.1), {"index": False, "w": True})))


def test_integer_leaves():
    run = _beside_integers()
    params = {"index": jnp.arange(3), "w": jnp.array([2.0, -0.0])}
    state = run.init(params)
    zeros = np.zeros(3, np.int32)
    for step in range(5):
        w = np.asarray(params["w"]) * (NAN if step == 2 else 1)
        before = params
        params, state = run.step(params, state, {"index": zeros, "w": w}, np.float32(1))
        if step == 2:
            assert_same_bits(params, before)
    assert_same_bits(params["index"], jnp.arange(3))
    assert int(guard_in(state).law.control.skips) == 1


def test_integer_updates_are_skipped_too():
    run = _beside_integers()
    params = {"index": jnp.arange(3), "w": jnp.array([2.0, -0.0])}
    gradients = {"index": np.ones(3, np.int32), "w": np.full(2, NAN)}
    after, _ = run.step(params, run.init(params), gradients, np.float32(1))
    assert_same_bits(after, params)


def test_complex_leaves():
    run, params = guarded("sgd_momentum"), {"z": jnp.array([1 + 2j, 3j], jnp.complex64)}
    state = run.init(params)
    gradients = {"z": np.array([1j, complex(0, np.nan)], np.complex64)}
    after, _ = run.step(params, state, gradients, np.float32(1))
    assert_same_bits(after, params)


# --- shifts of level ---------------------------------------------------------------------------

# Steps of a lasting shift that are limited, at the most, after a hundred quiet ones.
REACCEPTED_AFTER = {3: 0, 25: 9, 1e3: 13, 1e6: 18, 1e12: 22}


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(("factor", "most"), REACCEPTED_AFTER.items(), ids=str)
def test_a_lasting_shift_of_level_is_accepted_again(factor, most, noise):
    rng, run, params = np.random.default_rng(7), guarded("adamw"), small_params()
    state, limited = run.init(params), []
    for step in range(160):
        level = (factor if step >= 100 else 1.0) * math.exp(noise * rng.normal())
        gradients = _every(gradients_of(params), level / 4)
        params, state = run.step(params, state, gradients, np.float32(1))
        told = lbw_optax.events(state)[-1:]
        limited.append(any((event.step, event.action) == (step, "clip") for event in told))
    assert not any(limited[:100])
    assert bool(sum(limited)) == bool(most)
    assert sum(limited) <= most
    assert not any(limited[100 + most :])
    lbw_optax.check(state)
    assert_all_finite(params, state)


@pytest.mark.parametrize("inner", GOVERNED)
@pytest.mark.parametrize("factor", [3, 25])
def test_training_converges_after_a_shift_of_level(factor, inner):
    """The loss is multiplied from one step to the next, for ever."""
    run = guarded(inner)
    params, state = trained(inner, "f32", 60)
    for _ in range(400):
        gradients = jax.tree.map(lambda g: g * np.float32(factor), gradients_of(params))
        # Momentum SGD at 0.1 x 25 diverges by itself; that the guard holds it is the point.
        params, state = run.step(params, state, gradients, np.float32(factor * loss_of(params)))
    assert loss_of(params) < 0.02 * loss_of(small_params())
    assert_all_finite(params, state)


# --- missing signals ---------------------------------------------------------------------------


def test_missing_value():
    run, params = guarded("adamw"), small_params()
    state = run.init(params)
    for step in range(400):
        gradients = gradients_of(params)
        bad = _every(gradients, NAN) if step in (0, 7) else gradients
        updates, state = run.update(bad, state, params)
        params = optax.apply_updates(params, updates)
    assert loss_of(params) < 0.02 * loss_of(small_params())
    assert int(guard_in(state).law.control.skips) == 2
    assert_all_finite(state)


def test_missing_params():
    """Momentum SGD needs no parameters: skip and overshoot are still there."""
    run, params = guarded("sgd_momentum"), small_params()
    state = run.init(params)
    for step in range(400):
        gradients = gradients_of(params)
        bad = _every(gradients, NAN) if step in (0, 7) else gradients
        before = params, guard_in(state).inner_state
        updates, state = run.update(bad, state)
        params = optax.apply_updates(params, updates)
        if step in (0, 7):
            assert_same_bits((params, guard_in(state).inner_state), before)
    assert loss_of(params) < 0.02 * loss_of(small_params())
    assert int(guard_in(state).law.control.skips) == 2
    assert float(guard_in(state).law.control.log_scale) > math.log(control.FIRST_SCALE)


# --- accumulation of gradients -----------------------------------------------------------------


@functools.cache
def _accumulating(placement: str, inner: str):
    """Two micro-batches a step: the guard around the accumulation, or inside it."""
    if placement == "around":
        return run_of(lbw_guard(optax.MultiSteps(INNER[inner](), 2).gradient_transformation()))
    skip = optax.skip_not_finite if placement == "inside_with_skip_function" else None
    steps = optax.MultiSteps(lbw_guard(INNER[inner]()), 2, should_skip_update_fn=skip)
    return run_of(steps.gradient_transformation())


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        ("adamw", "f32"),
        *slowly(("adamw", "bf16"), ("sgd_momentum", "bf16")),
    ],
)
@pytest.mark.parametrize("micro_step", [0, 1, 6, 7])
def test_guard_around_multi_steps_drops_the_bad_micro_batch(micro_step, inner, dtype):
    """Nothing changes: the accumulated gradient and the count of micro-steps are as before."""
    run, params = _accumulating("around", inner), small_params(DTYPES[dtype])
    params, state = train(run, params, run.init(params), micro_step)
    params = with_negative_zeros(params)
    bad = _every(gradients_of(params), NAN)
    params, state = assert_skips(run, params, state, bad, np.float32(1))
    assert_converges(run, params, state, steps=800, share=0.02 if dtype == "f32" else 0.1)


@pytest.mark.parametrize("inner", ["adamw", *slowly("sgd_momentum")])
@pytest.mark.parametrize("micro_step", [0, 1, 6, 7])
def test_guard_inside_multi_steps_skips_the_accumulated_step(micro_step, inner):
    """Nothing changes at the step that the bad micro-batch belongs to.

    `MultiSteps` keeps a NaN in its accumulator for ever (0 x NaN), so that every later step is
    skipped too: parameters and optimizer hold, and the guard says that it is exhausted.
    """
    run, params = _accumulating("inside", inner), small_params()
    params, state = train(run, params, run.init(params), micro_step - micro_step % 2)
    start, inner_state = params, guard_in(state).inner_state
    if micro_step % 2:
        params, state = train(run, params, state, 1)
    params, state = run.step(params, state, _every(gradients_of(params), NAN), np.float32(1))
    for _ in range(80):
        params, state = train(run, params, state, 1)
        assert not np.isnan(params["gain"])
    # `MultiSteps` adds 0 x update on the micro-steps between: -0.0 may turn into 0.0 there.
    jax.tree.map(np.testing.assert_array_equal, params, start)
    assert_same_bits(guard_in(state).inner_state, inner_state)
    with pytest.raises(lbw_optax.GuardExhausted):
        lbw_optax.check(state)


@pytest.mark.parametrize("micro_step", [0, 1, 6, 7])
def test_guard_inside_multi_steps_with_a_skip_function_goes_on(micro_step):
    run, params = _accumulating("inside_with_skip_function", "adamw"), small_params()
    params, state = train(run, params, run.init(params), micro_step)
    before = params, state
    params, state = run.step(params, state, _every(gradients_of(params), NAN), np.float32(1))
    # Its own zero update is 0.0, not -0.0: equal parameters, but for the sign of a zero.
    jax.tree.map(np.testing.assert_array_equal, params, before[0])
    assert_same_bits(state.inner_opt_state, before[1].inner_opt_state)
    params, state = train(run, params, state, 800)
    assert loss_of(params) < 0.02 * loss_of(small_params())


# --- chained before the optimizer --------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_chained_guard_keeps_every_fault_out(fault):
    """Gradient-side authority: zeros go in, AdamW's state stays finite, its weights still move."""
    run, params = chained("adamw"), small_params()
    params, state = train(run, params, run.init(params), 20)
    bad = FAULTS[fault][0](gradients_of(params), np.float32(1))
    after, state = run.step(params, state, *bad)
    assert int(guard_in(state).law.control.skips) == 1
    assert_all_finite(after, state)
    assert loss_of(after) != loss_of(params)  # momentum moves them: not a full skip
    after, state = train(run, after, state, 400)
    assert loss_of(after) < 0.02 * loss_of(small_params())
