"""A user's own signals, constraints and policy: what they may do, and how it is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import AS_USUAL

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law import custom
from lbw_optax.law.custom import Custom, Step

PARAMS = {"w": jnp.full((4, 4), 2.0, jnp.float32), "b": jnp.ones(4, jnp.float32)}


@functools.cache
def stepper(tx, usual):
    """A step on a quadratic, compiled once for each optimizer."""

    def loss(params):
        return sum(jnp.sum(x**2) for x in params.values())

    @functools.partial(jax.jit, compiler_options=AS_USUAL if usual else None)
    def step(params, state, **given):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, **given)
        return optax.apply_updates(params, updates), state, updates

    return step


def run(tx, steps=60, usual=False, **extra):
    """So many steps; `extra` are sequences of keywords."""
    params, state, step_fn = PARAMS, tx.init(PARAMS), stepper(tx, usual)
    states, applied = [], []
    for step in range(steps):
        given = {name: x[step] for name, x in extra.items()}
        params, state, updates = step_fn(params, state, **given)
        states.append(state)
        applied.append(updates)
    return states, applied


PLAIN = lbw_guard(optax.sgd(1e-3))
BARE = lbw_guard(optax.trace(0.0))
SPOKEN = lbw_guard(optax.trace(0.0), signals={"kl": lambda step: step.extra["kl"]})


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("bad", [100.0, np.nan, np.inf])
def test_a_signal_that_jumps_limits_the_gradient_and_is_told_by_its_name(unit, bad):
    kl = (1 + 0.01 * np.sin(np.arange(60))) * unit
    kl[40] = bad * unit
    states, _ = run(SPOKEN, kl=np.float32(kl))
    (event,) = [e for e in lbw_optax.events(states[-1]) if e.signal == "kl"]
    assert (event.step, event.action) == (40, "clip")
    if np.isfinite(bad):
        np.testing.assert_allclose(event.value, bad * unit, rtol=1e-5)
        assert event.threshold < bad * unit
    bare, _ = run(BARE)
    assert lbw_optax.metrics(states[40])["scale"] <= lbw_optax.metrics(bare[40])["scale"]
    # What reaches the optimizer is a tenth of the gradient.
    given, whole = (s[40].inner_state.trace["w"] for s in (states, bare))
    np.testing.assert_allclose(given, whole / 10, rtol=1e-5)


def test_a_lasting_level_is_accepted_and_a_broken_constraint_spends_its_budget():
    tx = lbw_guard(
        optax.sgd(1e-3),
        signals={"level": lambda step: step.extra["level"]},
        constraints={"small": lambda step: step.extra["level"] < 2},
    )
    level = np.where(np.arange(200) < 50, 1.0, 5.0).astype(np.float32)
    states, _ = run(tx, 200, level=level)
    by = [(e.step, e.signal) for e in lbw_optax.events(states[-1]) if e.action == "clip"]
    steps = {name: [s for s, signal in by if signal == name] for name in ("level", "small")}
    assert 1 <= len(steps["level"]) <= 20
    # Ten at first, and one in eleven steps from then on.
    acted = sum(map(len, steps.values()))
    assert acted <= custom.MOST + 150 * custom.EARNED + len(steps["level"])
    assert not lbw_optax.metrics(states[-1])["exhausted"]
    lbw_optax.check(states[-1])


@pytest.mark.parametrize(("wish", "share"), [(0.5, 0.5), (0.0, 0.1), (7.0, 1.0), (np.nan, 1.0)])
def test_a_policy_shortens_steps_within_its_bounds(wish, share):
    policy = lambda risk, kinds, bounds: jnp.float32(wish)  # noqa: E731
    _, shorter = run(lbw_guard(optax.sgd(1e-3), policy=policy), 1)
    states, longer = run(PLAIN, 1)
    scale = float(lbw_optax.metrics(states[0])["scale"])
    least = max(share, 0.001 / scale)
    np.testing.assert_allclose(shorter[0]["w"], least * longer[0]["w"], rtol=1e-5)


def test_a_policy_is_given_the_risk_and_told_once():
    def policy(risk, kinds, bounds):
        assert kinds.shape == (3,)
        assert bounds.min_scale == 0.001
        return jnp.where(risk >= 0, 0.5, 1.0)

    states, _ = run(lbw_guard(optax.sgd(1e-3), policy=policy))
    told = [e for e in lbw_optax.events(states[-1]) if e.signal == "policy"]
    assert [(e.step, e.action, e.value) for e in told] == [(0, "cut", 0.5)]


def test_without_any_the_state_and_the_decisions_are_those_of_a_guard_without():
    """And with some that say nothing, the decisions too."""
    bare, a = run(lbw_guard(optax.adamw(1e-2)), usual=True)
    quiet = lbw_guard(
        optax.adamw(1e-2),
        signals={"none": lambda step: jnp.float32(0)},
        constraints={"true": lambda step: True},
        policy=lambda risk, kinds, bounds: 1.0,
    )
    _, b = run(quiet, usual=True)
    assert bare[-1].custom == ()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_observing_applies_nothing_of_it():
    loud = functools.partial(
        lbw_guard,
        optax.sgd(1e-3),
        constraints={"never": lambda step: False},
        policy=lambda risk, kinds, bounds: 0.1,
    )
    _, watched = run(loud(mode="observe"), 5)
    _, bare = run(optax.with_extra_args_support(optax.sgd(1e-3)), 5)
    jax.tree.map(np.testing.assert_array_equal, watched, bare)


def test_scan_vmap_and_no_recompilation():
    tx, traces = SPOKEN, []

    @jax.jit
    def step(state, kl):
        traces.append(1)
        return tx.update(PARAMS, state, PARAMS, value=1.0, kl=kl)[1]

    state = tx.init(PARAMS)
    for kl in np.ones(20, np.float32):
        state = step(state, kl)
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(
        lambda s, kl: (step(s, kl), None), tx.init(PARAMS), np.ones(20, np.float32)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), scanned, state)
    both = jax.vmap(step)(jax.tree.map(lambda x: jnp.stack([x, x]), state), jnp.array([1.0, 99.0]))
    assert both.custom.broken.tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"signals": [abs]}, "signals must be a mapping"),
        ({"constraints": {"a": 3}}, "constraints must be a mapping"),
        ({"signals": {"a": abs}, "constraints": {"a": abs}}, "a name of its own"),
        ({"signals": {"policy": abs}}, "not 'policy'"),
        ({"policy": 0.5}, "policy must be a function"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lbw_guard(optax.sgd(0.1), **options)


def test_bad_results_states_and_places_are_refused():
    vector = lbw_guard(optax.sgd(0.1), signals={"g": lambda step: step.gradients["w"]})
    with pytest.raises(ValueError, match="'g' must give one number"):
        vector.update(PARAMS, vector.init(PARAMS), PARAMS)
    other = lbw_guard(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="made with other signals"):
        vector.update(PARAMS, other, PARAMS)
    chained = optax.chain(lbw_guard(signals={"g": lambda step: 0.0}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="need a guard that governs"):
        chained.init(PARAMS)
    governed = lbw_optax.chain(lbw_guard(signals={"g": lambda step: 0.0}), optax.sgd(0.1))
    assert governed.init(PARAMS).custom.names.shape == (1, 1)


def test_the_jump_is_that_of_the_stated_rule():
    """Against NumPy in float64, with the winsorised mean and deviation of the reference."""
    from reference import RunningReference

    from lbw_optax.law.statistics import LOSS, SPIKE_STDS

    values = np.random.default_rng(0).normal(3, 0.3, 80)
    values[[30, 31, 60]] += [5, 0.5, 40]
    own = Custom({"x": lambda step: step.extra["x"]}, {}, None)
    state, known, unit = custom.init(own), RunningReference(LOSS), abs(values[0])
    look = jax.jit(functools.partial(custom.look, own))
    for x in values:
        wanted = bool(known.entered) and x / unit > known.mean + SPIKE_STDS * known.std
        state, _ = look(state, Step(jnp.float32(0), PARAMS, PARAMS, {"x": jnp.float32(x)}))
        assert bool(state.broken[0]) == wanted
        known.add(x / unit)
