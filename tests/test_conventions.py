"""Optax's own conventions, as a table: inner optimizers x placement of the guard."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import (
    INNER,
    PLACEMENTS,
    Run,
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
    types,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law.control import Control
from lbw_optax.law.divergence import Divergence
from lbw_optax.law.events import Ring
from lbw_optax.law.freezing import Freezing
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Probe, Telemetry
from lbw_optax.state import GuardState

DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}
VALUE = np.float32(1.5)
TABLE = [
    pytest.param(inner, placement, id=f"{inner}-{placement}")
    for inner in INNER
    for placement in PLACEMENTS
]
over_table = pytest.mark.parametrize(("inner", "placement"), TABLE)
# What costs a compilation of its own runs for all of the table with `make test-slow` only.
QUICK = {
    *((inner, "wrapped") for inner in INNER),
    ("adamw", "chained"),
    ("sgd_momentum", "chained"),
}
over_table_compiled = pytest.mark.parametrize(
    ("inner", "placement"),
    [
        pytest.param(
            *case.values, marks=[] if case.values in QUICK else pytest.mark.slow, id=case.id
        )
        for case in TABLE
    ],
)
over_placements = pytest.mark.parametrize("placement", PLACEMENTS)
over_placements_compiled = pytest.mark.parametrize("placement", ["wrapped", *slowly("chained")])


def run_for(inner: str, placement: str) -> Run:
    return guarded(inner) if placement == "wrapped" else chained(inner)


def abstract_update(tx, dtype=jnp.float32):
    """Types of (updates, state before, state after), traced only; with an unknown extra arg."""
    params = small_params(dtype)

    def trace(params):
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params, value=VALUE, nobody_knows=1)
        return updates, state, new_state

    return jax.eval_shape(trace, params)


def kinds(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@over_table_compiled
def test_converges_without_compiling_again(inner, placement):
    run, params = run_for(inner, placement), small_params()
    params, state = train(run, params, run.init(params), 1)
    compiled = run.update._cache_size()
    params, state = train(run, params, state, 500)
    assert run.update._cache_size() == compiled
    assert loss_of(params) < 0.02 * loss_of(small_params())
    assert_all_finite(params, state)
    assert not bool(guard_in(state).law.control.exhausted)


@over_placements_compiled
def test_one_trace_for_all_steps(placement):
    tx, params = PLACEMENTS[placement](optax.sgd(0.1, momentum=0.9)), small_params()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)  # not compiled: fresh scalars, as users have them
    for step in range(4):
        _, state = update(gradients_of(params), state, params, value=np.float32(step))


@over_table
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_types_are_kept_and_unknown_extra_args_accepted(inner, placement, dtype):
    """Updates have the type that the bare optimizer gives them; the state's types never change."""
    updates, before, after = abstract_update(PLACEMENTS[placement](INNER[inner]()), dtype)
    bare_updates, bare_before, bare_after = abstract_update(
        optax.with_extra_args_support(INNER[inner]()), dtype
    )
    assert [x.dtype for x in jax.tree.leaves(updates)] == [
        x.dtype for x in jax.tree.leaves(bare_updates)
    ]
    own_before = guard_in(before)._replace(inner_state=None)
    own_after = guard_in(after)._replace(inner_state=None)
    assert kinds(own_before) == kinds(own_after)
    assert not any(weak for _, _, weak in kinds(own_after))
    if kinds(bare_before) == kinds(bare_after):
        assert kinds(before) == kinds(after)
    assert jax.tree.structure(before) == jax.tree.structure(after)


@over_placements
def test_statistics_are_32_bit_under_x64(placement):
    with jax.enable_x64(True):
        _, before, after = abstract_update(PLACEMENTS[placement](optax.adamw(1e-3)))
        own = [guard_in(state)._replace(inner_state=None) for state in (before, after)]
        assert kinds(own[0]) == kinds(own[1])
        assert {x.dtype.name for x in jax.tree.leaves(own)} <= {"float32", "int32", "bool"}


@over_table
def test_carries_through_scan_and_cond(inner, placement):
    """Both refuse a carry or a branch whose type changes."""
    tx, params = PLACEMENTS[placement](INNER[inner]()), small_params()

    def step(state, gradients):
        return tx.update(gradients, state, params, value=VALUE)[::-1]

    def trace(params):
        state, gradients = tx.init(params), params
        many = jax.tree.map(lambda g: jnp.stack([g] * 3), gradients)
        scanned = jax.lax.scan(step, state, many)[0]
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.cond(params["gain"] > 0, step, lambda s, g: (s, zeros), scanned, gradients)

    state = jax.eval_shape(trace, params)[0]
    assert kinds(state) == kinds(jax.eval_shape(tx.init, params))


def test_scan_equals_the_loop():
    """For real, with a NaN among the steps."""
    run, params = guarded("adamw"), small_params()
    rng = np.random.default_rng(8)
    many = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f"), params) for _ in range(30)]
    many[4]["gain"] = np.float32(np.nan)

    def step(carry, gradients):
        params, state = carry
        updates, state = run.tx.update(gradients, state, params, value=VALUE)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: np.stack(g), *many)
    start = (params, run.init(params))
    scanned = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs)[0])(start, stacked)
    looped = start
    for gradients in many:
        looped = run.step(*looped, gradients, VALUE)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-4, atol=1e-6)
    assert int(guard_in(scanned[1]).law.control.skips) == 1


# --- extra arguments ---------------------------------------------------------------------------


def _times(name: str) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by an extra argument, and remembers it."""

    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u: u * extra_args[name], updates), extra_args[name]

    return optax.GradientTransformationExtraArgs(lambda params: jnp.float32(0), update)


@over_placements
def test_extra_args_reach_the_inner_optimizer(placement):
    """The loss, and one that the guard has never heard of."""
    inner = optax.chain(_times("value"), _times("temperature"))
    run, params = run_of(PLACEMENTS[placement](inner)), small_params()
    extra_args = {"value": np.float32(0.5), "temperature": np.float32(0.25)}
    updates, state = run.update(gradients_of(params), run.init(params), params, **extra_args)
    inner_state = state[1] if placement == "chained" else state.inner_state
    assert [float(x) for x in inner_state] == [0.5, 0.25]
    scale = float(lbw_optax.metrics(state)["scale"]) if placement == "wrapped" else 1
    expected = jax.tree.map(lambda g: np.float32(0.125 * scale) * g, gradients_of(params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@over_placements_compiled
def test_value_reaches_reduce_on_plateau(placement):
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2))
    run, params = run_of(PLACEMENTS[placement](inner)), small_params()
    state = run.init(params)
    for value in (3.0, 2.0, 2.0, 2.0, 2.0):
        _, state = run.update(gradients_of(params), state, params, value=np.float32(value))
    assert float(optax.tree.get(state, "best_value")) == 2.0
    assert float(optax.tree.get(state, "scale")) < 1


def test_value_is_not_invented():
    """An inner optimizer that needs a loss still says so when there is none."""
    tx, params = lbw_guard(_times("value")), small_params()
    with pytest.raises(KeyError, match="value"):
        tx.update(gradients_of(params), tx.init(params), params)


# --- hyper-parameters --------------------------------------------------------------------------


def test_inner_with_injected_hyperparameters():
    """They can be read and set inside the guard, without compiling again."""
    run = run_of(lbw_guard(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)))
    params = small_params()
    state = lbw_optax.override(run.init(params), scale=1.0)
    first, state = run.update(gradients_of(params), state, params, value=VALUE)
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.2)
    second, state = run.update(gradients_of(params), state, params, value=VALUE)
    chex.assert_trees_all_close(second, jax.tree.map(lambda u: 2 * u, first), rtol=1e-6)
    assert run.update._cache_size() == 1


def test_inner_with_an_injected_schedule_counts_only_applied_steps():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    run = run_of(lbw_guard(optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)))
    params = small_params()
    state = run.init(params)
    for step in range(6):
        bad = step in (2, 3)
        gradients = jax.tree.map(
            lambda g, bad=bad: g * (np.nan if bad else 1), gradients_of(params)
        )
        params, state = run.step(params, state, gradients, VALUE)
    assert int(state.inner_state.count) == 4
    np.testing.assert_allclose(
        state.inner_state.hyperparams["learning_rate"], 0.1 * (1 - 3 / 10), rtol=1e-5
    )


def _with_floor(min_scale):
    return lbw_guard(optax.sgd(0.1), min_scale=min_scale)


def test_injected_min_scale_is_a_traced_hyperparameter():
    run, params = run_of(optax.inject_hyperparams(_with_floor)(min_scale=0.25)), small_params()
    state = run.init(params)
    np.testing.assert_allclose(lbw_optax.metrics(state)["scale"], 0.25, rtol=1e-6)
    for floor in (0.25, 0.9):
        state.hyperparams["min_scale"] = jnp.float32(floor)
        _, state = run.update(gradients_of(params), state, params, value=VALUE)
        assert float(lbw_optax.metrics(state)["scale"]) >= floor * (1 - 1e-6)
    assert run.update._cache_size() == 1


def test_guard_itself_can_be_injected_with_schedules():
    """Every numeric knob of the guard at once, as a user would write it."""
    tx = optax.inject_hyperparams(lbw_guard)(
        optax.sgd(0.1), min_scale=lambda count: 0.5 / (1 + count), max_skips=3
    )
    run, params = run_of(tx), small_params()
    state = run.init(params)
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    for step in range(4):
        _, state = run.update(bad, state, params, value=VALUE)
        assert bool(guard_in(state).law.control.exhausted) == (step >= 2)
    assert_all_finite(state)


def test_traced_knobs_in_a_vmap_over_settings():
    """One program trains with several floors at once."""

    def first_scale(min_scale, max_skips):
        tx = lbw_guard(optax.sgd(0.1), min_scale=min_scale, max_skips=max_skips)
        params = small_params()
        state = tx.init(params)
        return tx.update(params, state, params)[1].law.control.log_scale

    floors = jnp.array([0.01, 0.1, 0.5])
    scales = jax.jit(jax.vmap(first_scale))(floors, jnp.array([3, 4, 5]))
    assert (scales >= jnp.log(floors) - 1e-6).all()


# --- wrappers ----------------------------------------------------------------------------------


@over_table
def test_multi_steps_around_and_inside(inner, placement):
    """Traced only; `test_faults.py` runs them."""
    place, make = PLACEMENTS[placement], INNER[inner]
    for tx in (
        optax.MultiSteps(place(make()), 4).gradient_transformation(),
        place(optax.MultiSteps(make(), 4).gradient_transformation()),
    ):
        _, before, after = abstract_update(optax.with_extra_args_support(tx))
        assert kinds(guard_in(before)[1:]) == kinds(guard_in(after)[1:])


MASK = {"bias": False, "gain": False, "weights": True}
MASKED = {
    "guard_around_mask": lambda: lbw_guard(optax.masked(optax.adamw(0.05), MASK)),
    "guard_inside_mask": lambda: optax.masked(lbw_guard(optax.adamw(0.05)), MASK),
}


@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_masked(make):
    run, params = run_of(make()), small_params()
    state = run.init(params)
    updates, state = run.update(gradients_of(params), state, params, value=VALUE)
    seen, scale = guard_in(state).telemetry, float(lbw_optax.metrics(state)["scale"])
    g = gradients_of(params)
    if isinstance(state, optax.MaskedState):  # inside: it neither sees nor touches the others
        chex.assert_trees_all_equal(updates["bias"], g["bias"])
        np.testing.assert_allclose(seen.gradient_norm, np.linalg.norm(g["weights"]), rtol=1e-5)
    else:
        chex.assert_trees_all_close(updates["bias"], np.float32(scale) * g["bias"], rtol=1e-5)
        whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(g)))
        np.testing.assert_allclose(seen.gradient_norm, whole, rtol=1e-5)
    before = params, guard_in(state).inner_state
    bad = {**g, "weights": g["weights"] * np.float32(np.nan)}
    updates, state = run.update(bad, state, params, value=VALUE)
    assert_same_bits(optax.apply_updates(params["weights"], updates["weights"]), params["weights"])
    assert_same_bits(guard_in(state).inner_state, before[1])
    assert_all_finite(state)


def _partition(labels):
    return optax.partition(
        {
            "governed": lbw_guard(optax.adamw(0.05)),
            "bare": optax.sgd(0.1),
            "none": optax.set_to_zero(),
        },
        labels,
    )


def test_partition():
    labels = {"bias": "bare", "gain": "none", "weights": "governed"}
    run, params = run_of(_partition(labels)), small_params()
    state = run.init(params)
    updates, state = run.update(gradients_of(params), state, params, value=VALUE)
    scale = lbw_optax.metrics(state)["scale"]
    bare = optax.adamw(0.05)
    expected, _ = bare.update(
        gradients_of(params)["weights"], bare.init(params["weights"]), params["weights"]
    )
    chex.assert_trees_all_close(updates["weights"], scale * expected, rtol=1e-5)
    chex.assert_trees_all_close(updates["bias"], -0.1 * gradients_of(params)["bias"], rtol=1e-6)
    assert float(updates["gain"]) == 0
    state = run.init(params)
    params, state = train(run, params, state, 400)
    weights = {"weights": params["weights"]}
    assert loss_of(weights) < 0.02 * loss_of({"weights": small_params()["weights"]})


@over_table
def test_map_params(inner, placement):
    """What the bare optimizer keeps per parameter is mapped, the guard's own state is not."""
    run, params = run_for(inner, placement), small_params()
    state = run.init(params)
    mapped = optax.tree.map_params(run.tx, lambda x: x + 1, state)
    bare = INNER[inner]()
    expected = optax.tree.map_params(bare, lambda x: x + 1, bare.init(params))
    actual = mapped.inner_state if placement == "wrapped" else mapped[1]
    chex.assert_trees_all_close(actual, expected)
    own = guard_in(state)._replace(inner_state=None)
    assert_same_bits(guard_in(mapped)._replace(inner_state=None), own)


@over_placements_compiled
def test_donation(placement):
    """Parameters and state are given away at every step, from the first on."""
    run, params = run_for("adamw", placement), small_params()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = run.tx.update(gradients, state, params, value=VALUE)
        return optax.apply_updates(params, updates), state

    kept, kept_state = params, run.init(params)
    given = jax.tree.map(jnp.copy, params)
    given_state = run.tx.init(given)  # not compiled: no buffer may appear in it twice
    for _ in range(3):
        # Flags that the next step does not read are not donated; all that is large is.
        old = jax.tree.leaves((given, *guard_in(given_state)._replace(events=None, telemetry=None)))
        gradients = gradients_of(kept)
        given, given_state = step(given, given_state, gradients)
        assert all(leaf.is_deleted() for leaf in old)
        kept, kept_state = run.step(kept, kept_state, gradients, VALUE)
    chex.assert_trees_all_close((given, given_state), (kept, kept_state), rtol=1e-4, atol=1e-6)


def _stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@over_placements_compiled
def test_vmap_over_runs_equals_the_separate_runs(placement):
    """Four runs, one of which meets a NaN and one a jump of the gradient."""
    run, params = run_for("adamw", placement), small_params()
    rng = np.random.default_rng(9)
    starts = [
        jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype("f"), params) for _ in range(4)
    ]
    together = _stack(starts), _stack([run.init(p) for p in starts])
    separate = [(p, run.init(p)) for p in starts]
    update = jax.jit(jax.vmap(lambda g, s, p, v: run.tx.update(g, s, p, value=v)))
    for step in range(15):
        gradients = [gradients_of(p) for p, _ in separate]
        if step == 7:
            gradients[1] = jax.tree.map(lambda g: g * np.float32(np.nan), gradients[1])
            gradients[2] = jax.tree.map(lambda g: g * np.float32(1e5), gradients[2])
        updates, state = update(_stack(gradients), together[1], together[0], np.ones(4, "f"))
        together = optax.apply_updates(together[0], updates), state
        separate = [
            run.step(*one, g, np.float32(1)) for one, g in zip(separate, gradients, strict=True)
        ]
    chex.assert_trees_all_close(together, _stack(separate), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(guard_in(together[1]).law.control.skips, [0, 1, 0, 0])


def test_state_is_arrays_of_fixed_types_from_init_on():
    run, params = guarded("adamw"), small_params()
    state = run.tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    _, after = run.update(gradients_of(params), state, params, value=VALUE)
    assert types(state) == types(after)


def _own_names() -> set[str]:
    parts = (GuardState, Telemetry, Probe, Running, Statistics, Control, Divergence, Ring, Freezing)
    return {name for part in parts for name in part._fields} - {"inner_state"}


def _optax_states():
    for module in (optax, optax.contrib):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and hasattr(kind, "_fields") and name.endswith("State"):
                yield kind


def test_field_names_are_distinct_from_those_of_optax():
    """So that `optax.tree.get(state, name)` still finds one, and the right one."""
    for kind in _optax_states():
        assert not _own_names() & set(kind._fields), kind
    assert len(list(_optax_states())) > 30


def test_momentum_can_still_be_read_by_its_name():
    state = lbw_guard(optax.sgd(0.1, momentum=0.9)).init(small_params())
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "trace"), small_params())
