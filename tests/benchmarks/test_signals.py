"""The candidate signals, against what a run on a known loss must show."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbw_optax
from benchmarks import signals
from lbw_optax import lbw_guard


def _watched(rate, curvature, noise):
    """Gradient descent on `curvature` |x|^2 / 2 with noisy gradients, watched for 100 steps."""
    tx, slopes = lbw_guard(optax.sgd(rate), mode="observe"), jnp.linspace(0.5, 1.0, 500)
    params = jnp.ones(500)
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        grads = curvature * slopes * params + noise * jax.random.normal(key, params.shape)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    seen, steps = {name: [] for name in (*signals.KEPT, "scale")}, []
    for key in jax.random.split(jax.random.key(0), 100):
        before = params
        params, state, grads = step(params, state, key)
        metrics = lbw_optax.metrics(state)
        for name, values in seen.items():
            values.append(float(metrics[name]))
        steps.append((np.asarray(before), np.asarray(grads), np.asarray(params - before)))
    return seen, steps


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_signals_are_those_of_the_whole_vectors(rate):
    seen, steps = _watched(rate, curvature=1.0, noise=0.1)
    found = signals.signals(seen)
    window = range(signals.WINDOW.start, signals.WINDOW.stop)
    change = sum((steps[t][1] - steps[t - 1][1]) @ steps[t - 1][2] for t in window)
    before = sum(-steps[t - 1][1] @ steps[t - 1][2] for t in window)
    lengths = [np.linalg.norm(steps[t][2]) / np.linalg.norm(steps[t][0]) for t in window]
    first, last = (np.linalg.norm(steps[t][0]) for t in (window[0], window[-1]))
    assert found["secant"] == pytest.approx(change / before, rel=1e-3)
    assert found["relative_step"] == pytest.approx(np.median(lengths) / 0.01, rel=1e-3)
    growth = 1e4 * np.log(last / first) / (len(window) - 1)
    assert found["norm_growth"] == pytest.approx(growth, rel=1e-3, abs=1e-2)


def test_secant_curvature_is_rate_times_curvature():
    found = signals.signals(_watched(0.2, curvature=3.0, noise=0.0)[0])
    assert 0.5 * 0.2 * 3.0 <= found["secant"] <= 0.2 * 3.0


def test_overshoot_grows_with_the_rate():
    low, high = (signals.signals(_watched(rate, 1.0, 0.5)[0])["overshoot"] for rate in (0.1, 1.9))
    assert low < high
    assert high > 3
