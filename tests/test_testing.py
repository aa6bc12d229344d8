"""The error injector: every kind does what it says, in its steps, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_same_bits, bits, small_params

import lbw_optax
from lbw_optax.testing import FOREVER, KINDS, Fault

AT, VOCABULARY = 5, 97
BATCH = np.random.default_rng(0).integers(VOCABULARY, size=(8, 13), dtype=np.int32)
PLACES = ("batch", "activations", "gradients", "params", "opt_state")
PLACE_OF = {
    "none": (),
    "nan_loss": ("gradients",),
    "inf_loss": ("gradients",),
    "nan_gradient": ("gradients",),
    "inf_gradient": ("gradients",),
    "nan_activation": ("activations",),
    "random_tokens": ("batch",),
    "one_token": ("batch",),
    "shifted_labels": ("batch",),
    "scaled_gradient": ("gradients",),
    "flipped_parameter": ("params",),
    "flipped_mu": ("opt_state",),
    "flipped_nu": ("opt_state",),
    "learning_rate": ("schedule",),
    "drift": ("schedule",),
    "level_shift": ("gradients",),
    "false_alarm": ("gradients",),
    "stealth": ("batch", "gradients"),
}
STEPS = (0, AT - 1, AT, AT + 1, AT + 2, AT + 4, AT + 9, AT + 10, AT + 99, AT + 100, 10_000)


@functools.cache
def healthy():
    """What passes at each place of a step of a guarded AdamW, all arrays, no value zero."""
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda p: jnp.asarray(draw(size=p.shape), p.dtype), small_params())
    tx = optax.chain(optax.clip_by_global_norm(1.0), lbw_optax.adamw(1e-2))
    _, state = tx.update(params, tx.init(params), params, value=jnp.float32(2))
    return {
        "batch": (jnp.asarray(BATCH[:, :-1]), jnp.asarray(BATCH[:, 1:])),
        "activations": jnp.asarray(draw(size=(4, 6)), jnp.float32),
        "gradients": (jnp.float32(2.5), params),
        "params": params,
        "opt_state": state,
    }


@functools.partial(jax.jit, static_argnums=0)
def passed(place, fault, step):
    """What comes out of one place of the step."""
    if place == "schedule":
        return fault.schedule(1e-3)(step)
    with jax.ensure_compile_time_eval():  # what is cached must not belong to this trace
        value = healthy()[place]
    if place == "batch":
        return fault.batch(step, *value, VOCABULARY)
    if place == "gradients":
        return fault.gradients(step, *value)
    return getattr(fault, place)(step, value)


def changed(before, after):
    """For each leaf the indices of the elements whose bits differ, by its path."""
    found = {}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert jax.typeof(x) == jax.typeof(y)
        where = np.argwhere(bits(x) != bits(y))
        if len(where):
            found[jax.tree_util.keystr(path)] = where
    return found


def struck(kind, place, step=AT, **details):
    before = healthy()[place]
    after = passed(place, Fault(kind, AT, **details), step)
    return before, after, changed(before, after)


def test_every_kind_is_tested():
    assert set(PLACE_OF) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_strikes_in_its_steps_and_in_its_places_only(kind):
    fault = Fault(kind, AT)
    length, every = KINDS[kind].length, KINDS[kind].every
    for step in STEPS:
        expected = AT <= step < min(AT + length, FOREVER) and (step - AT) % every == 0
        assert bool(fault.active(step)) == expected, step
        for place in PLACES:
            strikes = expected and place in PLACE_OF[kind]
            differs = bool(changed(healthy()[place], passed(place, fault, step)))
            assert differs == strikes, (place, step)
        strikes = expected and "schedule" in PLACE_OF[kind]
        assert (passed("schedule", fault, step) != np.float32(1e-3)) == strikes


@pytest.mark.parametrize("length", [1, 10, 50, 500])
def test_as_many_bad_steps_in_a_row_as_asked_for(length):
    active = jax.vmap(Fault("nan_gradient", AT, length).active)(jnp.arange(600))
    assert np.flatnonzero(active).tolist() == list(range(AT, AT + length))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_does_the_same_and_compiled_too(kind):
    """Everything but the kind may be traced."""
    for place in PLACES:
        here = passed(place, Fault(kind, AT, 4, KINDS[kind].size, 3), AT)
        traced = Fault(kind, *map(jnp.asarray, (AT, 4, KINDS[kind].size, 3)))
        assert_same_bits(passed(place, traced, jnp.int32(AT)), here)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("nan_gradient", "gradients"),
        ("nan_activation", "activations"),
        ("random_tokens", "batch"),
        ("one_token", "batch"),
        ("flipped_parameter", "params"),
        ("flipped_mu", "opt_state"),
        ("flipped_nu", "opt_state"),
    ],
)
def test_another_seed_and_another_step_hit_elsewhere(kind, place):
    places = {str(struck(kind, place, seed=seed)[1:]) for seed in range(12)}
    assert len(places) > 2
    at_steps = {str(struck(kind, place, step=AT + i, length=12)[1:]) for i in range(12)}
    assert len(at_steps) > 2


def test_faults_of_several_seeds_at_once():
    faults = jax.vmap(lambda seed: Fault("flipped_parameter", AT, seed=seed))(jnp.arange(5))
    together = jax.vmap(lambda fault: passed("params", fault, AT))(faults)
    alone = [passed("params", Fault("flipped_parameter", AT, seed=seed), AT) for seed in range(5)]
    assert_same_bits(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


# --- what exactly is changed -------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), [("nan_loss", np.nan), ("inf_loss", np.inf)])
def test_bad_loss(kind, value):
    _, (loss, _), differs = struck(kind, "gradients")
    np.testing.assert_equal(float(loss), value)
    assert list(differs) == ["[0]"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kind", "value"), [("nan_gradient", np.nan), ("inf_gradient", np.inf)])
def test_bad_leaf_of_the_gradients(kind, value, seed):
    (_, before), (_, after), differs = struck(kind, "gradients", seed=seed)
    assert len(differs) == 1
    (name,) = (name for name in before if f"'{name}'" in next(iter(differs)))
    np.testing.assert_array_equal(after[name], np.full_like(before[name], value))


def test_every_leaf_can_be_hit():
    seen = {next(iter(struck("nan_gradient", "gradients", seed=seed)[2])) for seed in range(20)}
    assert len(seen) == 3


def test_one_activation():
    _, after, differs = struck("nan_activation", "activations")
    assert [len(where) for where in differs.values()] == [1]
    assert np.isnan(after).sum() == 1


def test_nan_activation_makes_loss_and_gradients_nan():
    fault = Fault("nan_activation", AT)

    def loss_fn(w, step):
        return jnp.mean(jnp.tanh(fault.activations(step, jnp.ones((3, 4)) @ w)) ** 2)

    w = jnp.ones((4, 2))
    for step in (AT - 1, AT, AT + 1):
        loss, gradient = jax.value_and_grad(loss_fn)(w, step)
        clean, clean_gradient = jax.value_and_grad(lambda w: loss_fn(w, 0))(w)
        if step == AT:
            assert np.isnan(loss)
            assert np.isnan(gradient).any()
        else:
            assert_same_bits((loss, gradient), (clean, clean_gradient))


def test_random_tokens():
    _, (inputs, targets), _ = struck("random_tokens", "batch")
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.min() >= 0
    assert inputs.max() < VOCABULARY
    assert len(np.unique(inputs)) > VOCABULARY // 2
    assert np.mean(inputs == BATCH[:, :-1]) < 0.1


def test_one_token():
    _, (inputs, targets), _ = struck("one_token", "batch")
    assert len(np.unique(np.concatenate([inputs, targets]))) == 1
    assert 0 <= inputs[0, 0] < VOCABULARY


def test_shifted_labels():
    _, (inputs, targets), _ = struck("shifted_labels", "batch")
    np.testing.assert_array_equal(inputs, BATCH[:, :-1])
    np.testing.assert_array_equal(targets, BATCH[:, :-1])


@pytest.mark.parametrize("factor", [1e3, 1e4, 1e5, 1e6])
def test_scaled_gradient(factor):
    (loss, before), (after_loss, after), _ = struck("scaled_gradient", "gradients", size=factor)
    assert_same_bits(after_loss, loss)
    expected = jax.tree.map(lambda g: g * np.float32(factor), jax.device_get(before))
    assert_same_bits(jax.device_get(after), expected)


@pytest.mark.parametrize(("dtype", "bit"), [("f4", 0), ("f4", 1), ("f4", 5), ("f4", 31)])
@pytest.mark.parametrize(
    ("kind", "place", "part"),
    [
        ("flipped_parameter", "params", ""),
        ("flipped_mu", "opt_state", ".mu"),
        ("flipped_nu", "opt_state", ".nu"),
    ],
)
def test_one_bit_of_one_element(kind, place, part, dtype, bit):
    before, after, differs = struck(kind, place, size=bit)
    ((path, where),) = differs.items()
    assert part in path
    assert len(where) == 1
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    flipped = [np.ravel(bits(x) ^ bits(y)) for x, y in pairs if x.dtype == dtype]
    assert sorted(np.concatenate(flipped))[-2:] == [0, 1 << (31 - bit)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_top_exponent_bit_of_a_narrow_type(dtype):
    before = {
        "w": jnp.full(4, 0.5, dtype),
        "steps": jnp.arange(3),
        "none": jnp.zeros((0, 2), dtype),
    }
    after = Fault("flipped_parameter", AT).params(AT, before)
    assert [int(x) for x in np.bitwise_xor(bits(before["w"]), bits(after["w"])) if x] == [1 << 14]
    assert_same_bits(after["steps"], before["steps"])


def test_moments_must_be_there():
    state = optax.sgd(0.1, momentum=0.9).init(jnp.ones(2))
    with pytest.raises(ValueError, match="no nu"):
        Fault("flipped_nu", AT).opt_state(AT, state)


def test_learning_rate():
    schedule = Fault("learning_rate", AT, length=3).schedule(optax.linear_schedule(0.0, 1.0, 10))
    rates = [float(schedule(step)) for step in range(10)]
    expected = [step / 10 * (100 if AT <= step < AT + 3 else 1) for step in range(10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_drift():
    schedule = Fault("drift", AT, length=4, size=1.5).schedule(0.1)
    rates = [float(schedule(step)) for step in range(11)]
    expected = [0.1] * AT + [0.1 * 1.5**k for k in (1, 2, 3, 4)] + [0.1] * 2
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_drift_ends_in_divergence():
    """Gradient descent on x^2/2 diverges once the rate has passed 2."""
    schedule, x = Fault("drift", 0).schedule(0.5), 1.0
    path = [x := x * (1 - float(schedule(step))) for step in range(100)]
    assert abs(path[20]) < 1e-3
    assert abs(path[-1]) > 1e3


def test_level_shift_lasts():
    for step in (AT, AT + 10**6):
        before, after, _ = struck("level_shift", "gradients", step=step, size=3.0)
        expected = jax.tree.map(lambda x: np.asarray(x) * np.float32(3), before)
        assert_same_bits(jax.device_get(after), expected)


def test_false_alarm_leaves_the_direction_of_the_gradient():
    before, after, _ = struck("false_alarm", "gradients")
    expected = jax.tree.map(lambda x: np.asarray(x) * np.float32(20), before)
    assert_same_bits(jax.device_get(after), expected)


def test_stealth():
    _, (inputs, _), differs = struck("stealth", "batch")
    assert {int(row[0]) for where in differs.values() for row in where} == {0, 1}
    np.testing.assert_array_equal(inputs[2:], BATCH[2:, :-1])
    (loss, before), (after_loss, after), _ = struck("stealth", "gradients")
    assert_same_bits(after_loss, loss)
    expected = jax.tree.map(lambda g: g * np.float32(5), jax.device_get(before))
    assert_same_bits(jax.device_get(after), expected)


def test_unknown_kind():
    with pytest.raises(ValueError, match="did you mean nan_gradient"):
        Fault("nan_gradients", AT)
