"""Telemetry against NumPy: on trees that are sampled whole, and on one that is not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import cosine, curvature, flat, histogram
from support import (
    INNER,
    assert_all_finite,
    chained,
    gradients_of,
    guard_in,
    guarded,
    run_of,
    small_params,
)

from lbw_optax import lbw_guard
from lbw_optax.law import telemetry

FLOATS = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def _noisy_gradients(params, rng):
    def disturb(g):
        return (g + rng.normal(size=g.shape) * rng.choice([1e-3, 0.1, 5.0])).astype(g.dtype)

    return jax.tree.map(disturb, gradients_of(params))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_wrapped_signals_equal_numpy_over_a_trajectory(dtype):
    rng, run = np.random.default_rng(2), guarded("sgd_momentum")
    params = small_params(dtype)
    state = run.init(params)
    last_step, gradient_before = np.zeros(16), np.zeros(16)
    scale = math.exp(guard_in(state).law.control.log_scale)
    for step in range(40):
        gradients = _noisy_gradients(params, rng)
        updates, state = run.update(gradients, state, params, value=jnp.float32(step))
        seen, control = guard_in(state).telemetry, guard_in(state).law.control
        gradient = flat(jax.tree.leaves(gradients))
        applied = flat(jax.tree.leaves(updates))
        length = np.linalg.norm(flat(jax.tree.leaves(params)))
        # u = applied / s; in half precision the applied updates are rounded, the norm before not.
        unrounded = np.linalg.norm(applied) / math.exp(control.log_scale) * scale
        tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
        expected = {
            "gradient_norm": np.linalg.norm(gradient),
            "update_norm": unrounded,
            "parameter_norm": length,
            "relative_step": unrounded / length,
            "loss": step,
            "overshoot": cosine(gradient, last_step),
            "curvature": curvature(gradient, gradient_before, last_step),
        }
        for name, x in expected.items():
            if x is not None:
                np.testing.assert_allclose(
                    getattr(seen, name), x, tolerance, 1e-4 * abs(x), err_msg=f"{name}, {step}"
                )
        assert bool(seen.has_overshoot) == (expected["overshoot"] is not None)
        np.testing.assert_array_equal(seen.histogram, histogram(gradient))
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        last_step, gradient_before, scale = applied, gradient, math.exp(control.log_scale)


def test_chained_signals_equal_numpy_over_a_trajectory():
    """The step is what the parameters moved by, at the scale that would have been held."""
    rng, run, params = np.random.default_rng(3), chained("adamw"), small_params()
    state, before, gradient_before = run.init(params), None, np.zeros(16)
    for step in range(40):
        scale = math.exp(guard_in(state).law.control.log_scale)
        gradients, here = _noisy_gradients(params, rng), flat(jax.tree.leaves(params))
        params, state = run.step(params, state, gradients, np.float32(1.0))
        seen, gradient = guard_in(state).telemetry, flat(jax.tree.leaves(gradients))
        np.testing.assert_allclose(seen.gradient_norm, np.linalg.norm(gradient), rtol=1e-5)
        if step:
            moved = here - before
            # |p| ~ 4: float32 keeps few digits of p - p'.
            length = scale * np.linalg.norm(moved)
            expected = [length, length / np.linalg.norm(here)]
            np.testing.assert_allclose([seen.update_norm, seen.relative_step], expected, rtol=1e-3)
            np.testing.assert_allclose(seen.overshoot, cosine(gradient, moved), atol=1e-3)
            slope = curvature(gradient, gradient_before, moved)
            np.testing.assert_allclose(seen.curvature, slope, rtol=1e-2, atol=1e-2)
        before, gradient_before = here, gradient


def test_curvature_of_a_quadratic_is_its_second_derivative():
    """Loss c |p|^2 / 2 has curvature c along every step."""
    run, params = guarded("sgd_momentum"), small_params()
    state = run.init(params)
    for _ in range(5):
        gradients = jax.tree.map(lambda p: 0.37 * p, params)
        params, state = run.step(params, state, gradients, np.float32(1))
    np.testing.assert_allclose(guard_in(state).telemetry.curvature, 0.37, rtol=1e-2)


probe = jax.jit(telemetry.sample)


def _tree(rng, shapes):
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


SHAPES = [(300, 701), (40, 30, 64), (200000,), (7,)]


def test_probe_estimates_inner_products_within_its_statistical_bound():
    """Weighted by n / m, m of n coordinates estimate a sum with a standard error known from it.

    Five standard errors for each of 20 pairs: a chance of 1e-5 to fail, were the draw not fixed.
    """
    rng = np.random.default_rng(4)
    errors = []
    for _ in range(20):
        x, y = _tree(rng, SHAPES), _tree(rng, SHAPES)
        full = sum(float(np.vdot(a, b)) for a, b in zip(x, y, strict=True))
        estimate = float(np.vdot(probe(x), probe(y)))
        errors.append((estimate - full) / _standard_error(x, y))
    assert np.max(np.abs(errors)) < 5
    assert 0.5 < np.std(errors) < 1.6  # and the stated error is the true one, not a loose bound


def _standard_error(x, y):
    """Of the sampled sum: sum over leaves of n^2 var(x y) (1 / m - 1 / n)."""
    total = 0.0
    for a, b in zip(x, y, strict=True):
        n, m = a.size, telemetry._sample_size(a)
        total += n**2 * np.var(np.asarray(a) * np.asarray(b)) * (1 / m - 1 / n)
    return math.sqrt(total)


def test_probe_of_a_constant_tree_has_its_exact_length():
    """No bias: the weights restore the full norm where nothing varies."""
    tree = [jnp.full(shape, 2.0) for shape in SHAPES]
    full = 2.0 * math.sqrt(sum(leaf.size for leaf in tree))
    np.testing.assert_allclose(jnp.linalg.norm(probe(tree)), full, rtol=1e-5)


def test_overshoot_on_a_probe_is_near_the_full_cosine():
    rng = np.random.default_rng(5)
    params = _tree(rng, SHAPES)
    run = run_of(lbw_guard(INNER["sgd_momentum"]()))
    state = run.init(params)
    first = _tree(rng, SHAPES)
    updates, state = run.update(first, state, params)
    second = jax.tree.map(lambda g, n: 0.5 * g + n, first, _tree(rng, SHAPES))
    _, state = run.update(second, state, params)
    full = cosine(flat(second), flat(updates))
    # Some 4000 coordinates, weighted unequally: an error of about 0.03.
    np.testing.assert_allclose(guard_in(state).telemetry.overshoot, full, atol=0.1)
    assert full < -0.3


COORDINATE_SHAPES = [
    (3,),
    (1024,),
    (1030,),
    (12000,),
    (2**31 - 1,),
    (5000,),
    (64, 32),
    (8, 896),
    (300, 701),
    (64, 4096),
    (3, 5000),
    (2**17, 2**17),
    (2, 3, 5, 7, 11, 13),
    (1, 200000),
    (200000, 1),
    (2**16, 2**15 + 8),  # > 2^31 elements
    (70001, 70000),  # > 2^32
    (80, 8192, 28672),  # stacked layers of a 70B model, 1.9e10
    (2**31 - 1, 4),
    (16384, 262400),  # the head of a model with a large vocabulary
    (16384, 400000),
]


def _flat_positions(shape, size):
    """In int64, which has room for every one of these shapes."""
    index = jax.device_get(telemetry._coordinates(shape, size))
    position = np.zeros(size, np.int64)
    for part, length in zip(index, shape, strict=True):
        assert part.dtype == np.int32
        assert (part >= 0).all()
        assert (part < length).all()
        position = position * length + part
    return position


@pytest.mark.parametrize("shape", COORDINATE_SHAPES, ids=str)
def test_coordinates_are_valid_distinct_fixed_and_spread_over_the_leaf(shape):
    size = telemetry._sample_size(jax.ShapeDtypeStruct(shape, jnp.float32))
    position = _flat_positions(shape, size)
    np.testing.assert_array_equal(position, _flat_positions(shape, size))
    assert len(np.unique(position)) == size
    assert len(np.unique(position % shape[-1])) == min(size, shape[-1])
    if size >= 64:  # each eighth of the leaf has its share of the sample
        shares = np.bincount(position * 8 // math.prod(shape), minlength=8) * 8 / size
        assert shares.min() > 0.5
        assert shares.max() < 1.5


NORMS = {
    "f16 that overflows when squared": ([jnp.full(8, 6e4, jnp.float16)], 6e4 * math.sqrt(8), 0),
    "bf16": ([jnp.full(8, 3.0, jnp.bfloat16)], 3 * math.sqrt(8), 0),
    "f32 that overflows when squared": ([jnp.full(8, 1e30)], math.inf, 0),
    "f32 at the edge": ([jnp.full(4, 5e18)], 1e19, 0),
    "two NaN, one Inf": ([jnp.array([1.0, np.nan]), jnp.array([np.nan, -np.inf])], None, 3),
    "NaN in f16": ([jnp.array([1.0, np.nan], jnp.float16)], None, 1),
    "integers only": ([jnp.arange(3)], 0, 0),
    "integers beside floats": ([jnp.arange(3), jnp.full(4, 2.0)], 4, 0),
    "empty leaf": ([jnp.zeros([0, 3]), jnp.full(4, 2.0)], 4, 0),
    "nothing": ([], 0, 0),
    "scalar": ([jnp.float32(-3)], 3, 0),
    "complex": ([jnp.array([3 + 4j, 12j], jnp.complex64)], 13, 0),
    "NaN in complex": ([jnp.array([3 + 4j, complex(0, np.nan)], jnp.complex64)], None, 1),
}


@pytest.mark.parametrize(("tree", "norm", "nonfinite"), NORMS.values(), ids=NORMS)
def test_norm_and_nonfinite(tree, norm, nonfinite):
    actual, count = jax.jit(telemetry.norm_and_nonfinite)(tree)
    assert actual.dtype == jnp.float32
    assert count.dtype == jnp.int32
    assert int(count) == nonfinite
    if norm is None:
        assert not np.isfinite(actual)
    else:
        np.testing.assert_allclose(actual, norm, rtol=1e-6)


HISTOGRAM_VALUES = [0.0, 1e-45, 2.0**-24, 2.0**-22, 1.0, 1.99, 2.0, -4.0, 63.9, 64.0, 1e38]


def test_histogram_buckets():
    values = np.array([*HISTOGRAM_VALUES, np.nan, np.inf], np.float32)
    actual = jax.jit(telemetry._histogram)([jnp.asarray(values)])
    np.testing.assert_array_equal(actual, histogram(values.astype(np.float64)))
    assert actual.sum() == len(HISTOGRAM_VALUES)


def test_signals_that_are_missing_keep_their_last_value():
    """Without parameters, loss, or a finite gradient: flags down, values as before, no NaN."""
    run, params = guarded("sgd_momentum"), small_params()
    state = run.init(params)
    for _ in range(3):
        _, state = run.update(gradients_of(params), state, params, value=jnp.float32(2.5))
    before = guard_in(state).telemetry
    nan = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    _, state = run.update(nan, state, params)
    after = guard_in(state).telemetry
    for name in ("gradient_norm", "overshoot", "curvature", "loss", "relative_step"):
        assert getattr(after, name) == getattr(before, name), name
    assert not (after.has_gradient | after.has_overshoot | after.has_loss | after.has_step)
    assert after.nonfinite_gradients == 16
    assert_all_finite(state)


def test_leaves_that_start_at_zero_have_no_length_to_be_compared_with():
    """LoRA's pair: both factors move by as much a coordinate, one has a size."""
    tx = lbw_guard(optax.sgd(0.1))
    params = {"a": jnp.full((2, 6), 3.0), "b": jnp.zeros((6, 2)), "bias": jnp.full(8, -1.0)}
    state, share = tx.init(params), 20 / 32
    for _ in range(3):
        gradients = jax.tree.map(jnp.ones_like, params)
        scale = math.exp(state.law.control.log_scale)
        length = np.linalg.norm(flat(jax.tree.leaves(params)))
        updates, state = tx.update(gradients, state, params)
        expected = scale * 0.1 * math.sqrt(32) / length * math.sqrt(share)
        np.testing.assert_allclose(state.telemetry.relative_step, expected, rtol=1e-5)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("params", [None, {}, jnp.zeros(3), jnp.ones(3)], ids=str)
def test_where_no_leaf_or_every_leaf_has_a_size_all_coordinates_count(params):
    assert telemetry.init(params).nonzero_fraction == 1


def test_no_parameters_no_relative_step():
    run, params = guarded("sgd_momentum"), small_params()
    state = run.init(params)
    for _ in range(3):
        _, state = run.update(gradients_of(params), state)
    seen = guard_in(state).telemetry
    assert not seen.has_step
    assert seen.has_overshoot  # the other signal is still there


@pytest.mark.parametrize("value", [np.ones(1), np.ones([2, 2])], ids=["vector", "matrix"])
def test_loss_must_be_a_scalar(value):
    run, params = guarded("sgd_momentum"), small_params()
    state = run.init(params)
    with pytest.raises(ValueError, match="value must be the scalar loss"):
        run.tx.update(gradients_of(params), state, params, value=value)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({}, "given no loss:"),
        ({"objective": 2.0}, r"no loss \(is it objective, which it ignores\?\)"),
    ],
    ids=["none", "under another name"],
)
def test_a_loss_that_does_not_arrive_is_a_warning(given, hint):
    tx, params = lbw_guard(optax.sgd(0.1)), small_params()
    with pytest.warns(UserWarning, match=hint):
        tx.update(gradients_of(params), tx.init(params), params, **given)


def test_loss_is_another_name_for_value():
    run, params = guarded("sgd_momentum"), small_params()
    for name in ("value", "loss"):
        _, state = run.update(gradients_of(params), run.init(params), params, **{name: 2.5})
        assert float(guard_in(state).telemetry.loss) == 2.5
