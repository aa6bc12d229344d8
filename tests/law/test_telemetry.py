"""Telemetry against NumPy: on trees that are sampled whole, and on one that is not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import cosine, flat, histogram, mean_parameters, side
from support import (
    assert_all_finite,
    chained,
    gradients_of,
    guard_in,
    guarded,
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
    weights = np.concatenate([np.full(x.size, side(x.shape)) for x in jax.tree.leaves(params)])
    mean = None
    scale = math.exp(guard_in(state).law.control.log_scale)
    for step in range(40):
        gradients = _noisy_gradients(params, rng)
        updates, state = run.update(gradients, state, params, value=jnp.float32(step))
        seen, control = guard_in(state).telemetry, guard_in(state).law.control
        gradient = flat(jax.tree.leaves(gradients))
        applied = flat(jax.tree.leaves(updates))
        here = flat(jax.tree.leaves(params))
        length = np.linalg.norm(here)
        # u = applied / s; in half precision the applied updates are rounded, the norm before not.
        held = scale / math.exp(control.log_scale)
        unrounded = np.linalg.norm(applied) * held
        by_side = np.linalg.norm(applied * np.sqrt(weights / 96)) * held
        tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
        expected = {
            "gradient_norm": np.linalg.norm(gradient),
            "update_norm": unrounded,
            "parameter_norm": length,
            "relative_step": by_side / length,
            "loss": step,
            "overshoot": None if mean is None else cosine(gradient, here - mean),
        }
        for name, x in expected.items():
            if x is not None:
                np.testing.assert_allclose(
                    getattr(seen, name), x, tolerance, 1e-4, err_msg=f"{name}, {step}"
                )
        assert bool(seen.has_overshoot) == (expected["overshoot"] is not None)
        np.testing.assert_array_equal(seen.histogram, histogram(gradient))
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        mean, scale = mean_parameters(mean, here, step + 1), math.exp(control.log_scale)


def test_chained_signals_equal_numpy_over_a_trajectory():
    """The step is what the parameters moved by, at the scale that would have been held."""
    rng, run, params = np.random.default_rng(3), chained("adamw"), small_params()
    weights = np.concatenate([np.full(x.size, side(x.shape)) for x in jax.tree.leaves(params)])
    state, before, mean = run.init(params), None, None
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
            by_side = scale * np.linalg.norm(moved * np.sqrt(weights / 96))
            expected = [length, by_side / np.linalg.norm(here)]
            np.testing.assert_allclose([seen.update_norm, seen.relative_step], expected, rtol=1e-3)
            np.testing.assert_allclose(seen.overshoot, cosine(gradient, here - mean), atol=1e-3)
        before, mean = here, mean_parameters(mean, here, step + 1)


def test_overshoot_tells_on_which_side_of_the_valley_the_mean_lies():
    """On |p|^2 / 2 by steps of 0.1 p the way goes down; by steps of 1.9 p it swings across."""
    for rate, sign in ((0.1, -1), (1.9, 1)):
        tx, params = lbw_guard(optax.sgd(rate), mode="observe"), small_params()
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(12):
            updates, state = update(params, state, params, value=1.0)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(sign * state.telemetry.overshoot, 1.0, rtol=0.05)


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


@pytest.mark.parametrize("leaves", [3, 64, 65, 500])
def test_probe_of_many_leaves_is_unbiased_and_bounded(leaves):
    """At most 64 are looked at, the largest for certain; the length is that of the whole tree."""
    sizes = np.random.default_rng(leaves).integers(1, 40, leaves) ** 3
    sizes[leaves // 2] = 10**6
    tree = [jnp.full(size, 2.0) for size in sizes]
    drawn = telemetry._drawn_by_size([int(size) for size in sizes])
    assert len(drawn) == min(leaves, 64)
    assert (len(sizes) <= 64) or int(sizes.argmax()) in [i for i, _ in drawn]
    np.testing.assert_allclose(jnp.linalg.norm(probe(tree)), 2 * math.sqrt(sizes.sum()), rtol=1e-5)


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


@pytest.mark.parametrize("shape", COORDINATE_SHAPES, ids=str)
def test_the_grid_is_bounded_and_spread_over_every_axis(shape):
    strides, size = telemetry._strides(shape), math.prod(shape)
    wanted = max(telemetry.PROBE_LEAST, min(telemetry.PROBE_MOST, size // telemetry.PROBE_SHARE))
    counts = [-(-length // stride) for length, stride in zip(shape, strides, strict=True)]
    assert min(wanted, size) / 3 <= math.prod(counts) <= 1.25 * max(wanted, 8 ** len(shape))
    for length, stride, count in zip(shape, strides, counts, strict=True):
        assert count >= min(length, 6)
        assert length - (count - 1) * stride <= stride  # to the end of the axis
        assert stride == 1 or all(stride % k for k in range(2, stride))


def test_a_sample_is_that_of_the_grid():
    """Of numbers that say where they are, and with the weight that restores the whole."""
    tree = [jnp.arange(300 * 701, dtype=jnp.float32).reshape(300, 701)]
    (rows, columns), found = telemetry._strides((300, 701)), probe(tree)
    expected = np.asarray(tree[0])[::rows, ::columns].ravel()
    np.testing.assert_allclose(found, expected * math.sqrt(300 * 701 / expected.size), rtol=1e-6)


NORMS = {
    "f16 that overflows when squared": ([jnp.full(8, 6e4, jnp.float16)], 6e4 * math.sqrt(8), 0),
    "bf16": ([jnp.full(8, 3.0, jnp.bfloat16)], 3 * math.sqrt(8), 0),
    "f32 that overflows when squared": ([jnp.full(8, 1e30)], None, 1),
    "f32 at the edge": ([jnp.full(4, 5e18)], 1e19, 0),
    "two leaves": ([jnp.array([1.0, np.nan]), jnp.ones(2), jnp.array([0, -np.inf])], None, 2),
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
    def measure(tree):
        nothing = telemetry.Probe(telemetry.sample_of_zeros(tree), None)
        before = telemetry.init()
        return telemetry.observe_gradients(before, nothing, tree, None, None, jnp.int32(0))[0]

    seen = jax.jit(measure)(tree)
    assert seen.gradient_norm.dtype == jnp.float32
    assert seen.nonfinite_gradients.dtype == jnp.int32
    assert int(seen.nonfinite_gradients) == nonfinite
    assert bool(seen.has_gradient) == (norm is not None)
    np.testing.assert_allclose(seen.gradient_norm, norm or 0.0, rtol=1e-6)


HISTOGRAM_VALUES = [0.0, 1e-45, 2.0**-24, 2.0**-22, 1.0, 1.99, 2.0, -4.0, 63.9, 64.0, 1e38]


def test_histogram_buckets():
    values = np.array([*HISTOGRAM_VALUES, np.nan, np.inf], np.float32)
    actual = jax.jit(telemetry._histogram)([(jnp.asarray(values), 1.0)])
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
    for name in ("gradient_norm", "overshoot", "loss", "relative_step"):
        assert getattr(after, name) == getattr(before, name), name
    assert not (after.has_gradient | after.has_overshoot | after.has_loss | after.has_step)
    assert after.nonfinite_gradients == len(jax.tree.leaves(params))
    assert_all_finite(state)


@pytest.mark.parametrize("placement", [guarded, chained])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_where_all_start_at_zero_no_step_is_long_for_them(placement, start):
    run, params = placement("sgd_momentum"), {"w": jnp.full((4, 4), start), "b": jnp.zeros(4)}
    state = run.init(params)
    for _ in range(4):
        params, state = run.step(params, state, jax.tree.map(jnp.ones_like, params), np.float32(1))
    assert bool(guard_in(state).telemetry.from_zero) == (start == 0)
    assert bool(guard_in(state).telemetry.has_step) == (start != 0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), 1),
        ((96,), 1),
        ((96, 96), 96),
        ((8, 896), 27),  # an adapter's factor
        ((896, 8), 27),
        ((512, 8, 64), 512),  # an attention kernel, and the other way round
        ((8, 64, 512), 512),
        ((3, 3, 64, 128), 128),  # a convolution
        ((24, 96, 384), 384),  # layers in a stack: 2304 x 384
    ],
)
def test_side_of_a_leaf(shape, expected):
    assert telemetry._side(shape) == side(shape) == expected


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
    ("value", "loss"), [(1e39, float(np.finfo(np.float32).max)), (np.inf, None), (np.nan, None)]
)
def test_a_finite_loss_beyond_float32_is_the_largest(value, loss):
    with jax.enable_x64(True):
        seen, has_loss, nonfinite = telemetry._loss(jnp.float64(value))
    assert (has_loss, nonfinite) == ((True, 0) if loss else (False, 1))
    assert seen == loss if loss else not np.isfinite(seen)


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
