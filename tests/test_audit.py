"""What the host reads and orders: metrics, events, check, override."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import (
    assert_same_bits,
    gradients_of,
    guard_in,
    guarded,
    run_of,
    small_params,
    storm,
    train,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law.events import SIZE, Event

LABELS = {"bias": "bare", "gain": "bare", "weights": "governed"}


def governed():
    return lbw_guard(optax.sgd(0.1))


NESTS = {
    "plain": governed,
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), governed()),
    "chained_before": lambda: optax.chain(lbw_guard(), optax.adamw(1e-3)),
    "multi_steps": lambda: optax.MultiSteps(governed(), 2).gradient_transformation(),
    "around_multi_steps": lambda: lbw_guard(
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    ),
    "masked": lambda: optax.masked(governed(), {"bias": True, "gain": False, "weights": True}),
    "partition": lambda: optax.partition(
        {"governed": governed(), "bare": optax.sgd(0.1)}, dict(LABELS)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lbw_guard)(
        optax.sgd(0.1), min_scale=0.1
    ),
    "deep": lambda: optax.chain(
        optax.masked(optax.chain(optax.trace(0.9), governed()), dict.fromkeys(LABELS, True)),
        optax.identity(),
    ),
}
READERS = {
    "metrics": lbw_optax.metrics,
    "events": lbw_optax.events,
    "check": lbw_optax.check,
    "override": functools.partial(lbw_optax.override, scale=0.5),
}


@pytest.mark.parametrize("make", NESTS.values(), ids=NESTS)
def test_a_guard_is_found_in_every_nest(make):
    state = make().init(small_params())
    changed = lbw_optax.override(state, scale=0.5)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    np.testing.assert_allclose(jax.jit(lbw_optax.metrics)(changed)["scale"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(lbw_optax.metrics(changed)["scale"], 0.5, rtol=1e-6)
    assert lbw_optax.events(changed) == []
    lbw_optax.check(changed)
    assert_same_bits(make().init(small_params()), state)  # and the old state is as it was


class Line(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.array([2.0, -1.0]))


def test_flax_nnx_optimizer():
    model = Line()
    optimizer = nnx.Optimizer(model, lbw_guard(optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, bad):
        value, gradients = nnx.value_and_grad(lambda m: jnp.sum(m.weight[...] ** 2))(model)
        gradients = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), gradients)
        optimizer.update(model, gradients, value=value)
        return lbw_optax.metrics(optimizer.opt_state)

    for bad in (False, False, True):
        inside = step(model, optimizer, bad)
    outside = lbw_optax.metrics(optimizer.opt_state)
    chex.assert_trees_all_equal(inside, outside)
    assert int(outside["skips"]) == 1
    assert [event.action for event in lbw_optax.events(optimizer.opt_state)] == ["skip"]
    optimizer.opt_state = lbw_optax.override(optimizer.opt_state, scale=0.25)
    before = np.asarray(model.weight[...])
    step(model, optimizer, False)
    np.testing.assert_allclose(model.weight[...], before * (1 - 0.25 * 0.1 * 2), rtol=1e-6)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_guard(read):
    with pytest.raises(ValueError, match=r"holds no guard.*lbw_guard\(inner\)"):
        read(optax.adamw(1e-3).init(small_params()))


def test_explain_speaks_of_one_guard():
    two = optax.chain(lbw_guard(), governed()).init(small_params())
    with pytest.raises(ValueError, match=r"holds 2 guards.*pass the part"):
        lbw_optax.explain(two)
    assert "Soft start" in lbw_optax.explain(two[0])
    lbw_optax.check(lbw_optax.override(two, mode="observe"))  # these mean both


def test_metrics_are_scalars_that_repeat_the_state():
    run, params = guarded("adamw"), small_params()
    _, state = train(run, params, run.init(params), 5)
    metrics = lbw_optax.metrics(state)
    chex.assert_shape(list(metrics.values()), ())
    guard = guard_in(state)
    assert float(metrics["gradient_norm"]) == float(guard.telemetry.gradient_norm)
    assert int(metrics["regime"]) == int(guard.law.control.regime)
    assert float(metrics["scale"]) == pytest.approx(np.exp(guard.law.control.log_scale))
    assert float(metrics["loss_trend"]) < 0  # it fell
    counts = [int(metrics[f"gradient_log2/{k}"]) for k in range(-24, 8, 2)]
    assert counts == guard.telemetry.histogram.tolist()
    assert sum(counts) == 16


# --- override ----------------------------------------------------------------------------------


def test_override_pins_and_releases_without_compiling_again():
    run, params = guarded("adamw"), small_params()
    params, state = train(run, params, run.init(params), 3)
    compiled = run.update._cache_size()
    state = lbw_optax.override(state, scale=0.3)
    for _ in range(5):
        params, state = train(run, params, state, 1)
        assert float(lbw_optax.metrics(state)["scale"]) == pytest.approx(0.3)
    state = lbw_optax.override(state, scale="auto")
    params, state = train(run, params, state, 3)
    assert float(lbw_optax.metrics(state)["scale"]) != pytest.approx(0.3)
    assert run.update._cache_size() == compiled


def test_a_pinned_guard_still_skips():
    run, params = guarded("adamw"), small_params()
    state = lbw_optax.override(run.init(params), scale=1.0)
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    after, state = run.step(params, state, bad, np.float32(1))
    assert_same_bits(after, params)
    assert float(lbw_optax.metrics(state)["scale"]) == 1.0


def test_override_of_the_mode_and_back():
    run, params = guarded("sgd_momentum"), small_params()
    state = lbw_optax.override(run.init(params), mode="observe")
    updates, state = run.update(gradients_of(params), state, params, value=np.float32(1))
    expected = jax.tree.map(lambda g: np.float32(-0.1) * g, gradients_of(params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    state = lbw_optax.override(state, mode="govern")
    updates, _ = run.update(gradients_of(params), state, params, value=np.float32(1))
    assert abs(float(updates["gain"])) < 0.1 * abs(float(expected["gain"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", x) for x in (0, 0.0, -1, 1.5, float("nan"), float("inf"), "x", "", 1e-50)]
    + [("scale", x) for x in (np.float32(2), np.float32(np.nan), jnp.float32(2), jnp.ones(2), [1])]
    + [("mode", x) for x in ("x", "", "auto", 1)],
    ids=repr,
)
def test_bad_override_is_named_with_its_value(name, value):
    state = governed().init(small_params())
    with pytest.raises(ValueError, match=name) as error:
        lbw_optax.override(state, **{name: value})
    assert repr(value) in str(error.value)


def test_override_without_an_order_changes_nothing_and_reset_clears_exhausted():
    run, params = guarded("sgd_momentum", max_skips=2), small_params()
    state = run.init(params)
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    for _ in range(2):
        _, state = run.update(bad, state, params, value=np.float32(1))
    with pytest.raises(lbw_optax.GuardExhausted, match="2 skipped in all, 2 in a row"):
        lbw_optax.check(state)
    assert_same_bits(lbw_optax.override(state), state)
    with pytest.raises(lbw_optax.GuardExhausted):
        lbw_optax.check(lbw_optax.override(state, scale=0.5, mode="observe"))
    lbw_optax.check(lbw_optax.reset(state))


def test_after_a_reset_a_loss_that_has_risen_is_the_new_level():
    """Or it would ask again at the next step, and a person's word would count for nothing."""
    run, params = guarded("sgd_momentum"), small_params()
    state, gradients = run.init(params), gradients_of(params)
    asked = []
    for step in range(90):
        value = np.float32(1 if step < 40 else 9)
        _, state = run.update(gradients, state, params, value=value)
        asked.append(int(lbw_optax.metrics(state)["rollback_asked"]))
        if asked[-1]:
            state = lbw_optax.reset(state)
    assert np.count_nonzero(asked) == 1


@pytest.mark.parametrize(("order", "scale"), [(0.25, 0.25), (7.0, 1.0), (np.nan, 0.01)])
def test_a_traced_order_stays_in_bounds(order, scale):
    state = jax.jit(lambda s, x: lbw_optax.override(s, scale=x))(
        governed().init(small_params()), np.float32(order)
    )
    assert float(lbw_optax.metrics(state)["scale"]) == pytest.approx(scale)


def test_adopting_a_state_of_another_model_is_refused():
    state = lbw_guard(optax.adam(0.1)).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"float32\[7\], and float32\[3\] is needed"):
        lbw_optax.adopt(state, optax.adam(0.1).init(jnp.ones(7)))


def test_reset_gives_a_fresh_allowance():
    run, params = guarded("sgd_momentum", max_skips=2), small_params()
    state = run.init(params)
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    for _ in range(2):
        _, state = run.update(bad, state, params, value=np.float32(1))
    _, state = run.update(bad, lbw_optax.reset(state), params, value=np.float32(1))
    assert not bool(guard_in(state).law.control.exhausted)  # one skip after the order, of two


# --- events ------------------------------------------------------------------------------------


def test_no_event_is_lost_when_read_every_64_steps():
    seen: dict[int, Event] = {}
    one_by_one: dict[int, Event] = {}
    for step, state in storm(320):
        newest = lbw_optax.events(state)[-1]
        one_by_one[newest.number] = newest
        if step % SIZE == SIZE - 1:
            seen |= {event.number: event for event in lbw_optax.events(state)}
    assert seen == one_by_one
    assert sorted(seen) == list(range(320))
    assert [seen[i].step for i in range(320)] == list(range(320))


def test_check_names_what_to_do():
    *_, (_, state) = storm(40)
    with pytest.raises(lbw_optax.GuardExhausted, match=r"lbw_optax\.reset") as error:
        lbw_optax.check({"optimizer": (optax.EmptyState(), state)})
    assert "step 39: skip for nonfinite_gradients = 3 (threshold 0)" in str(error.value)


def test_metrics_inside_the_compiled_step():
    """`metrics` inside the user's own jitted step costs no second program."""
    run, params = run_of(governed()), small_params()

    @jax.jit
    def step(params, state):
        updates, state = run.tx.update(params, state, params)
        return optax.apply_updates(params, updates), state, lbw_optax.metrics(state)

    state = run.init(params)
    for _ in range(3):
        params, state, inside = step(params, state)
        chex.assert_trees_all_close(inside, lbw_optax.metrics(state), rtol=1e-6)
    assert step._cache_size() == 1
