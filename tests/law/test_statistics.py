"""Running statistics: against the weighted history, closed forms, and stated bounds."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RunningReference
from support import assert_same_bits

from lbw_optax.law import statistics, telemetry
from lbw_optax.law.statistics import Memory, Running

MEMORIES = {
    "gradient": statistics.GRADIENT,
    "loss": statistics.LOSS,
    "loss_slow": statistics.LOSS_SLOW,
}
NOTHING = Running(*[jnp.zeros([], jnp.float32)] * 3)
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
LENGTH = 24
# Of a gradient that did not jump.
GIVEN = jnp.array(False), jnp.float32(0)


@jax.jit
def _scan(values: jax.Array, memory: Memory) -> tuple[Running, jax.Array]:
    def step(running, x):
        running = statistics.update(running, x, jnp.array(True), memory)
        return running, (running, statistics.std(running, memory))

    return jax.lax.scan(step, NOTHING, values)[1]


def trajectory(values, memory: Memory) -> tuple[Running, np.ndarray]:
    """All statistics after each value: the running triple, and its spread."""
    return jax.device_get(_scan(jnp.asarray(values, jnp.float32), memory))


def _noise(length: int = 300) -> np.ndarray:
    return np.random.default_rng(0).normal(2.0, 0.3, length)


def _with(**changes) -> np.ndarray:
    values = _noise()
    for at, x in changes.items():
        values[int(at[2:])] = x
    return values


CASES = {
    "noise": _noise(),
    "constant": np.full(300, -0.7),
    "nonfinite": _with(at0=np.nan, at1=np.inf, at40=np.nan, at41=-np.inf, at299=np.nan),
    "spikes": _with(at3=1e30, at90=-1e38, at91=500.0, at200=np.float32(1e-40)),
    "level_shift": np.concatenate([_noise(150), 40 + _noise(150)]),
    "steady_climb": np.linspace(-20, 60, 300),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_the_weighted_history(case, memory):
    running, spreads = trajectory(CASES[case], memory)
    reference = RunningReference(memory)
    for i, x in enumerate(CASES[case]):
        reference.add(float(np.float32(x)))
        actual = [part[i] for part in (*running, spreads)]
        expected = [reference.mean, reference.variance, reference.weight, reference.std]
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5, err_msg=f"step {i}")


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_first_values_are_free_of_bias(memory):
    """Values within three spreads: mean of two, and of a constant, in closed form."""
    running, *_ = trajectory([5.0, 5.0 + memory.floor], memory)
    assert running.mean[0] == 5.0
    assert running.variance[0] == 0.0
    older, newer = memory.decay / (1 + memory.decay), 1 / (1 + memory.decay)
    np.testing.assert_allclose(running.mean[1], 5.0 + newer * memory.floor, rtol=1e-6)
    np.testing.assert_allclose(running.variance[1], older * newer * memory.floor**2, rtol=1e-3)
    constant, *_ = trajectory(np.full(LENGTH, 5.0), memory)
    chex.assert_trees_all_close(constant.mean, np.full(LENGTH, np.float32(5)))
    chex.assert_trees_all_close(constant.variance, np.zeros(LENGTH, np.float32))


@pytest.mark.parametrize("x", [np.nan, np.inf, -np.inf])
def test_nonfinite_value_changes_nothing(x):
    before = jax.tree.map(lambda part: part[-1], trajectory(_noise(50), statistics.LOSS)[0])
    before = jax.tree.map(jnp.asarray, before)
    after = statistics.update(before, jnp.float32(x), jnp.array(True), statistics.LOSS)
    assert_same_bits(after, before)
    unkept = statistics.update(before, jnp.float32(9), jnp.array(False), statistics.LOSS)
    assert_same_bits(unkept, before)


def outlier_bound(rate: float, spreads: float) -> tuple[float, float]:
    """How far one value moves a mean, and a threshold `mean + k spread`, in spreads before it.

    The mean moves by a d with d <= 3 s. The variance grows to (1 - a) (v + a d^2), so that the
    spread grows by at most sqrt(1 + 9 a (1 - a)).
    """
    mean = statistics.WINSOR * rate
    growth = math.sqrt(1 + statistics.WINSOR**2 * rate * (1 - rate))
    return mean, mean + spreads * (growth - 1)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("outlier", [3.0, 1e3, 1e30, np.finfo(np.float32).max, -1e30])
@pytest.mark.parametrize("history", [1, 2, 5, 20, 200])
def test_one_outlier_moves_mean_and_threshold_by_less_than_stated(memory, outlier, history):
    values = np.append(_noise(history), outlier)
    running, spreads = trajectory(values, memory)
    rate = (1 - memory.decay) / running.weight[-1]
    most_mean, most_threshold = outlier_bound(rate, statistics.SPIKE_STDS)
    threshold = running.mean + statistics.SPIKE_STDS * spreads
    moved_mean, moved = np.diff(running.mean)[-1], np.diff(threshold)[-1]
    assert abs(moved_mean) <= most_mean * spreads[-2] * (1 + 1e-5) + 1e-6
    assert moved <= most_threshold * spreads[-2] * (1 + 1e-5) + 1e-6
    if abs(outlier) > 100:  # the bound on the mean is attained, so it is not a loose one
        assert abs(moved_mean) >= most_mean * spreads[-2] * (1 - 1e-3)


@pytest.mark.parametrize(
    ("memory", "mean", "threshold"),
    [(statistics.GRADIENT, 0.15, 1.32), (statistics.LOSS, 0.30, 2.38)],
    ids=["gradient", "loss"],
)
def test_outlier_bounds_that_the_docstring_states(memory, mean, threshold):
    """Once warm, one outlier of any size moves the mean and the threshold by so many spreads."""
    running, spreads = trajectory(np.append(_noise(400), 1e30), memory)
    moved = running.mean + statistics.SPIKE_STDS * spreads
    assert np.diff(running.mean)[-1] / spreads[-2] <= mean * (1 + 1e-3)
    assert np.diff(moved)[-1] / spreads[-2] <= threshold
    assert outlier_bound(1 - memory.decay, statistics.SPIKE_STDS)[1] <= threshold


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_jump_is_more_alarming_than_a_climb_to_the_same_value(memory):
    """In spreads above the mean, as thresholds count."""
    quiet, steady = np.full(60, 1.0), np.linspace(1.0, 6.0, 61)[:-1]
    distances = []
    for history in (quiet, steady):
        running, spreads = trajectory(history, memory)
        distances.append((6.0 - running.mean[-1]) / spreads[-1])
    assert distances[0] > 5 * distances[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(ANY_FLOAT, min_size=LENGTH, max_size=LENGTH), st.sampled_from(sorted(MEMORIES)))
def test_any_floats_leave_statistics_finite(values, name):
    memory = MEMORIES[name]
    running, spreads = trajectory(values, memory)
    chex.assert_tree_all_finite((running, spreads))
    assert (spreads >= memory.floor * (1 - 1e-6)).all()
    assert (running.variance >= 0).all()
    assert ((running.weight >= 0) & (running.weight <= 1)).all()


def test_statistics_stay_finite_for_ever_at_the_extremes():
    """The largest floats, in turn, two thousand times: no overflow builds up."""
    largest = np.finfo(np.float32).max
    cases = ([largest, -largest] * 1000, [largest] * 2000, [-largest, 1e-45] * 1000)
    for values in cases:
        chex.assert_tree_all_finite(trajectory(values, statistics.GRADIENT))


def _seen(**signals) -> telemetry.Telemetry:
    flags = {"has_gradient", "has_overshoot", "has_loss"}
    return telemetry.init()._replace(
        **{name: jnp.float32(x) for name, x in signals.items()},
        **{flag: jnp.array(True) for flag in flags},
    )


@jax.jit
def _overshoot(cosines: jax.Array, keep: jax.Array) -> statistics.Overshoot:
    def step(carry, one):
        law, age = carry
        seen = telemetry.init()._replace(overshoot=one[0], has_overshoot=one[1])
        law = statistics.absorb(law, seen, *GIVEN, jnp.array(False), age)
        return (law, age + 1), law.overshoot

    start = statistics.init(), jnp.int32(0)
    return jax.lax.scan(step, start, (cosines, keep))[1]


def test_mean_overshoot_is_that_of_an_eighth_of_the_run():
    """Of eight until the run is 64 steps old; a level that shifts is followed as fast."""
    cosines = np.where(np.arange(800) < 400, -0.3, 0.5).astype(np.float32)
    found = _overshoot(cosines, np.ones(800, bool))
    assert (found.mean[:400] == np.float32(-0.3)).all()
    # After k steps at the new level from step t on, a share of (1 + k / t)^-8 is the old one's.
    shares = (0.5 - np.asarray(found.mean[400:])) / 0.8
    np.testing.assert_allclose(shares, (1 + np.arange(1, 401) / 400) ** -8.0, atol=0.01)


@pytest.mark.parametrize("drift", [0.0, 1e-3])
def test_deviation_of_the_overshoot_is_that_of_its_noise(drift):
    """Whether or not its mean moves meanwhile."""
    noise = np.random.default_rng(2).normal(0, 0.05, 600)
    cosines = noise + drift * np.arange(600) - 0.3
    found = _overshoot(cosines.astype(np.float32), np.ones(600, bool))
    np.testing.assert_allclose(np.sqrt(np.mean(found.variance[300:])), 0.05, rtol=0.1)


def test_a_missing_overshoot_changes_nothing():
    cosines = np.array([0.1, np.nan, 0.3, 0.2], np.float32)
    found = _overshoot(cosines, np.array([True, True, False, True]))
    assert found.mean[0] == found.mean[1] == found.mean[2] != found.mean[3]
    chex.assert_tree_all_finite(found)


def test_absorb_takes_logs_and_keeps_a_rejected_overshoot_out():
    """A rejected gradient says nothing of the way; its norm and loss still count."""
    seen = _seen(gradient_norm=20.0, overshoot=0.3, loss=-4.0)
    healthy = statistics.absorb(statistics.init(), seen, *GIVEN, jnp.array(False), jnp.int32(1))
    np.testing.assert_allclose(healthy.gradient.mean, math.log(20.0), rtol=1e-6)
    np.testing.assert_allclose(healthy.overshoot.mean, 0.3, rtol=1e-6)
    np.testing.assert_allclose(
        [healthy.loss.mean, healthy.loss_slow.mean, healthy.loss_unit], [-1, -1, 4]
    )
    rejected = statistics.absorb(statistics.init(), seen, *GIVEN, jnp.array(True), jnp.int32(1))
    assert rejected.overshoot.mean == 0
    np.testing.assert_allclose(rejected.gradient.mean, math.log(20.0), rtol=1e-6)
