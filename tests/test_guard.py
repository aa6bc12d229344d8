"""The transformation: arguments, soft start, what is applied, and observing without a touch."""

import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import flat, side
from support import (
    assert_all_finite,
    assert_same_bits,
    bare,
    bits,
    chained,
    guard_in,
    guarded,
    run_of,
    small_params,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law import control, statistics
from lbw_optax.law.divergence import Reason

RUNS = {"wrapped": guarded, "chained": chained}

BAD_ARGUMENTS = [
    *[
        ("min_scale", x)
        for x in (0, 0.0, -1, 1.5, 2, math.nan, math.inf, np.float32(2), "0.1", None)
    ],
    *[("max_skips", x) for x in (0, -1, math.nan, "3", None)],
    *[("max_interventions", x) for x in (0, -5, 0.5, math.nan)],
    *[("mode", x) for x in ("x", "", "GOVERN", None, 1)],
    *[("inner", x) for x in (1e-3, optax.adamw, "adamw", dict, (1, 2), object())],
    ("inner", optax.GradientTransformation),
]


def label(x):
    """Readable, and the same in every process: no addresses."""
    return x.__name__ if callable(x) else repr(x) if " at 0x" not in repr(x) else type(x).__name__


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=label)
def test_bad_argument_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=name) as error:
        lbw_guard(**({"inner": optax.adamw(1e-3)} | {name: value}))
    assert repr(value) in str(error.value)


def test_inner_may_be_multi_steps_itself():
    tx, params = lbw_guard(optax.MultiSteps(optax.sgd(0.1), 2)), small_params()
    assert tx.init(params).inner_state.mini_step == 0


@pytest.mark.parametrize("min_scale", [1, 1.0, 1e-6, np.float32(0.5), jnp.float32(0.5)], ids=repr)
def test_good_min_scale(min_scale):
    state = lbw_guard(optax.sgd(0.1), min_scale=min_scale).init(jnp.ones(2))
    first = max(min_scale, control.FIRST_SCALE)
    np.testing.assert_allclose(lbw_optax.metrics(state)["scale"], first, rtol=1e-5)


def test_adamw_has_the_signature_of_optax():
    assert inspect.signature(lbw_optax.adamw) == inspect.signature(optax.adamw)


def test_adamw_is_the_guard_around_adamw():
    arguments = {"learning_rate": 3e-3, "b2": 0.95, "weight_decay": 0.02, "mask": {"w": True}}
    params = {"w": jnp.ones([2, 3])}
    alias, written = lbw_optax.adamw(**arguments), lbw_guard(optax.adamw(**arguments))
    assert_same_bits(alias.init(params), written.init(params))
    programs = [str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
                for tx in (alias, written)]  # fmt: skip
    assert programs[0] == programs[1]


def random_gradients(steps, bad=()):
    rng, params = np.random.default_rng(10), small_params()
    for step in range(steps):
        factor = np.float32(np.nan) if step in bad else np.float32(1)
        yield jax.tree.map(lambda p, f=factor: f * rng.normal(size=p.shape).astype("f"), params)


@pytest.mark.parametrize("inner", ["adamw", "sgd_momentum"])
def test_wrapped_guard_applies_the_scaled_updates_of_the_inner_optimizer(inner):
    """From the first step on, which is short; the inner optimizer itself never notices."""
    run, inner_run, params = guarded(inner), bare(inner), small_params()
    state, inner_state = run.init(params), inner_run.init(params)
    scales = []
    for gradients in random_gradients(40):
        updates, state = run.update(gradients, state, params, value=np.float32(1))
        expected, inner_state = inner_run.update(
            gradients, inner_state, params, value=np.float32(1)
        )
        scales.append(float(lbw_optax.metrics(state)["scale"]))
        expected = jax.tree.map(lambda u, s=scales[-1]: np.float32(s) * u, expected)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-9)
        chex.assert_trees_all_close(state.inner_state, inner_state, rtol=1e-5, atol=1e-7)
        if len(scales) == 1:
            sides = [np.sqrt(side(u.shape) / 96) * u for u in jax.tree.leaves(updates)]
            moved, length = (np.linalg.norm(flat(t)) for t in (sides, jax.tree.leaves(params)))
            np.testing.assert_allclose(moved / length, control.FIRST_STEP, rtol=1e-4)
        params = optax.apply_updates(params, updates)
    assert len(set(scales)) > 5


@pytest.mark.parametrize("inner", ["adamw", "sgd_momentum"])
def test_chained_guard_leaves_a_sound_run_as_it_is_to_the_bit(inner):
    """It reports a scale and applies none; the chain is run operation by operation."""
    tx, bare_tx, params = chained(inner).tx, bare(inner).tx, small_params()
    state, bare_state, scales = tx.init(params), bare_tx.init(params), set()
    for gradients in random_gradients(12):
        gradients = jax.tree.map(jnp.asarray, gradients)
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        expected, bare_state = bare_tx.update(gradients, bare_state, params, value=jnp.float32(1))
        assert_same_bits((updates, state[1]), (expected, bare_state))
        params = optax.apply_updates(params, updates)
        scales.add(float(lbw_optax.metrics(state)["scale"]))
    assert len(scales) > 3


@pytest.mark.parametrize("factor", [1e2, 1e12])
def test_chained_guard_limits_a_gradient_that_jumps(factor):
    """To the length that the run has shown: the geometric mean of the norms before it."""
    tx, norms = lbw_guard(), []
    params = small_params()
    state, update = tx.init(params), jax.jit(tx.update)
    for step, gradients in enumerate(random_gradients(40)):
        if step == 30:
            gradients = jax.tree.map(lambda g: np.float32(factor) * g, gradients)
        updates, state = update(gradients, state, params, value=np.float32(1))
        norms.append(np.linalg.norm(flat(jax.tree.leaves(gradients))))
        if step < 30:
            chex.assert_trees_all_close(updates, gradients, rtol=1e-6)
        elif step == 30:
            limited, whole = (flat(jax.tree.leaves(t)) for t in (updates, gradients))
            decay = statistics.GRADIENT.decay ** np.arange(30)[::-1]
            shown = np.exp(np.average(np.log(norms[:30]), weights=decay))
            np.testing.assert_allclose(limited, whole * shown / norms[-1], rtol=2e-2)
            event = lbw_optax.events(state)[-1]
            assert (event.action, event.signal, event.step) == ("clip", "gradient_norm", 30)
    assert int(guard_in(state).law.control.skips) == 0


def test_chain_gives_the_guard_authority_over_what_follows():
    params, clip = small_params(), optax.clip_by_global_norm(0.1)
    inner = optax.adamw(0.1), optax.scale(0.5)
    chain = lbw_optax.chain(clip, lbw_guard(min_scale=0.01), *inner)
    written = optax.chain(clip, lbw_guard(optax.chain(*inner), min_scale=0.01))
    assert_same_bits(chain.init(params), written.init(params))
    programs = [
        str(jax.make_jaxpr(tx.update)(params, tx.init(params), params, value=1.0))
        for tx in (chain, written)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    "transformations",
    [
        [],
        [optax.adamw(0.1)],
        [optax.adamw(0.1), lbw_guard()],
        [lbw_guard(), lbw_guard(), optax.adamw(0.1)],
        [lbw_guard(optax.adamw(0.1)), optax.scale(0.5)],
    ],
    ids=["nothing", "no guard", "nothing after it", "two", "one that governs already"],
)
def test_a_chain_without_one_guard_at_its_head_is_refused(transformations):
    with pytest.raises(ValueError, match=r"lbw_optax.chain\(lbw_guard\(\), optax.adamw"):
        lbw_optax.chain(*transformations)


@pytest.mark.parametrize("tx", [None, optax.adamw], ids=["None", "uncalled"])
def test_a_chain_names_what_is_no_transformation(tx):
    with pytest.raises(ValueError, match="inner must be an Optax optimizer"):
        lbw_optax.chain(lbw_guard(), tx)


def same_or_both_nan(actual, expected, compiled=False):
    """To the bit, a compiled program to rounding; a NaN may be any NaN."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if compiled:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
            continue
        nan = np.isnan(np.asarray(x, np.float64)) & np.isnan(np.asarray(y, np.float64))
        np.testing.assert_array_equal(np.where(nan, 0, bits(x)), np.where(nan, 0, bits(y)))


# A compiler may round a product and a sum once or twice, and not alike in two programs, whatever
# the arithmetic that they have in common. Operation by operation, there is nothing to choose.
OBSERVED = [
    pytest.param(inner, placement, False, id=f"{inner}-{placement}-by_operation", marks=marks)
    for inner, marks in (("adamw", []), ("sgd_momentum", []), ("lion", pytest.mark.slow))
    for placement in RUNS
] + [
    pytest.param(inner, "wrapped", True, id=f"{inner}-wrapped-compiled")
    for inner in ("adamw", "sgd_momentum")
]


@pytest.mark.parametrize(("inner", "placement", "compiled"), OBSERVED)
def test_observing_leaves_every_bit_as_the_bare_optimizer_has_it(inner, placement, compiled):
    """Also where it would have skipped: a NaN loss, a jump, and in the end NaN gradients."""
    run, bare_run, params = RUNS[placement](inner), bare(inner), small_params()
    update, bare_update = run.update, bare_run.update
    if not compiled:
        update, bare_update = run.tx.update, bare_run.tx.update
    state, bare_state = lbw_optax.override(run.init(params), mode="observe"), bare_run.init(params)
    bare_params = params
    for step, gradients in enumerate(random_gradients(12, bad=(9, 10))):
        value = jnp.float32(np.nan if step in (0, 5) else 1)
        if step == 8:
            gradients = jax.tree.map(lambda g: np.float32(1e7) * g, gradients)
        gradients = jax.tree.map(jnp.asarray, gradients)
        updates, state = update(gradients, state, params, value=value)
        expected, bare_state = bare_update(gradients, bare_state, bare_params, value=value)
        same_or_both_nan(updates, expected, compiled)
        actual_state = state.inner_state if placement == "wrapped" else state[1]
        same_or_both_nan(actual_state, bare_state, compiled)
        params = optax.apply_updates(params, updates)
        bare_params = optax.apply_updates(bare_params, expected)
    # It watched all the same, and no NaN of the run got into its own memory.
    assert int(guard_in(state).law.control.skips) >= 4
    # (Chained, the probe samples the parameters, which are NaN by now.)
    probe = guard_in(state).probe._replace(parameters=None)
    assert_all_finite(guard_in(state)._replace(inner_state=None, probe=probe))
    assert lbw_optax.events(state)[0].signal == "nonfinite_loss"


def test_observing_leaves_a_subnormal_gradient_as_it_is():
    """Arithmetic flushes it to zero on some devices; observing is not arithmetic."""
    run, bare_run = chained("sgd_momentum"), bare("sgd_momentum")
    params = {"w": jnp.ones(3)}
    gradients = {"w": np.float32([1e-40, -1e-45, 2.0])}
    state = lbw_optax.override(run.init(params), mode="observe")
    updates, state = run.update(gradients, state, params, value=np.float32(1))
    expected, bare_state = bare_run.update(
        gradients, bare_run.init(params), params, value=np.float32(1)
    )
    assert_same_bits((updates, state[1]), (expected, bare_state))


def test_observing_knows_that_its_steps_are_taken_in_full():
    """Parameters that a large step has lengthened are not broken, whatever scale it would hold."""
    tx, params = lbw_guard(optax.adam(20.0), mode="observe"), jnp.ones(8)
    state, update = tx.init(params), jax.jit(tx.update)
    lengths = [jnp.linalg.norm(params)]
    for _ in range(12):
        updates, state = update(params, state, params, value=jnp.sum(params**2))
        params = optax.apply_updates(params, updates)
        lengths.append(jnp.linalg.norm(params))
        assert not lbw_optax.metrics(state)["parameters_broken"]
    assert max(lengths) > 10 * lengths[0]


def test_mode_of_the_factory_is_the_mode_of_the_state():
    states = {m: lbw_guard(optax.sgd(0.1), mode=m).init(jnp.ones(2)) for m in ("govern", "observe")}
    assert int(states["govern"].mode) != int(states["observe"].mode)
    assert_same_bits(lbw_optax.override(states["govern"], mode="observe"), states["observe"])


def test_without_inner_it_transforms_gradients():
    tx, gradients = lbw_guard(min_scale=0.5), {"w": jnp.array([2.0, -4.0])}
    updates, state = jax.jit(tx.update)(gradients, tx.init(gradients), gradients, value=1.0)
    chex.assert_trees_all_equal(updates, gradients)
    assert float(lbw_optax.metrics(state)["scale"]) >= 0.5


def test_the_state_is_small():
    """Scalars and a probe: at most 1/64 of a large leaf, and never a copy of it."""
    params = {"w": jnp.zeros([1024, 1024])}
    state = lbw_guard(optax.sgd(0.1)).init(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert size < params["w"].size / 64 + 1000
    assert sorted({leaf.ndim for leaf in jax.tree.leaves(state)}) == [0, 1]


def test_min_scale_one_only_skips():
    """The scale stays at 1 for ever."""
    run, params = run_of(lbw_guard(optax.sgd(0.1), min_scale=1.0)), jnp.ones(3)
    state, gradients = run.init(params), np.float32([1, -2, 3])
    for factor in (1, 1, np.float32(np.nan), 1):
        updates, state = run.update(factor * gradients, state, params, value=np.float32(1))
        moved = np.float32(-0.1) * gradients * np.isfinite(factor)
        np.testing.assert_allclose(updates, moved, rtol=1e-6)
    assert int(guard_in(state).law.control.skips) == 1


def _knows(seen):
    """An inner optimizer that writes down what it is given."""

    def update(updates, state, params=None, **extra_args):
        seen.append(sorted(extra_args))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("bare", [False, True], ids=["transformation", "object"])
def test_multi_steps_inside_hands_on_what_update_is_given(bare):
    seen, params = [], small_params()
    inner = optax.MultiSteps(_knows(seen), 2)
    tx = lbw_guard(inner if bare else inner.gradient_transformation())
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=1.0, temperature=2.0)[0], params)
    assert seen[-1] == ["temperature", "value"]


def test_a_long_step_after_steps_of_length_zero_is_no_fault():
    """As accumulation makes them: there is nothing that it could have jumped from."""
    tx, w = lbw_guard(optax.sgd(1.0), min_scale=1.0), jnp.full(4, 1e-3)
    state = tx.init(w)
    for gradient in (w, 0 * w, 50 * w):
        _, state = tx.update(gradient, state, w, value=1.0)
        assert int(lbw_optax.metrics(state)["skips"]) == 0


def test_chained_guard_keeps_no_parameter_that_is_not_finite():
    tx, w = lbw_guard(), jnp.arange(1.0, 5.0)
    state = tx.init(w)
    for params in (w, w.at[1].set(jnp.nan), w.at[2].set(jnp.inf), w):
        _, state = tx.update(jnp.ones(4), state, params, value=1.0)
        assert_all_finite(state)
    assert int(lbw_optax.metrics(state)["rollback_asked"]) == Reason.PARAMETERS
