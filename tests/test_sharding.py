"""Eight simulated devices: explicit and automatic sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import INNER, PLACEMENTS, assert_same_bits, guard_in, slowly, types

import lbw_optax

FSDP = {"bias": P(), "kernel": P("data"), "stacked": P(None, "data", "model")}
SHAPES = {"bias": (16,), "kernel": (64, 96), "stacked": (2, 32, 48)}
EXPLICIT = ["adamw", "sgd_momentum", "lion", "adam"]
over_placements = pytest.mark.parametrize("placement", PLACEMENTS)
over_placements_compiled = pytest.mark.parametrize("placement", ["wrapped", *slowly("chained")])


def mesh_of(kind: AxisType):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def tree(rng, scale=1.0):
    return {name: scale * rng.normal(size=s).astype("f") for name, s in SHAPES.items()}


def put(values, mesh):
    return {n: jax.device_put(x, NamedSharding(mesh, FSDP[n])) for n, x in values.items()}


def batches(bad=3, count=8):
    rng = np.random.default_rng(13)
    for step in range(count):
        gradients = tree(rng, 0.1)
        if step == bad:
            gradients["kernel"][40, 7] = np.nan  # on one device only
        yield gradients


def run(tx, params, mesh=None):
    """(params, state, the compiled step) after the batches, on a mesh or on one device."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = []
    for gradients in batches():
        gradients = put(gradients, mesh) if mesh else gradients
        params, state = step(params, state, gradients)
        history.append(params)
    return history, state, step


@pytest.mark.parametrize("inner", EXPLICIT)
@over_placements
def test_explicit_sharding_is_kept_in_every_leaf(placement, inner):
    """By types alone: `jax.typeof` knows the sharding of each, before and after."""
    tx = PLACEMENTS[placement](INNER[inner]())
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = put(tree(np.random.default_rng(14)), mesh)
        state = jax.jit(tx.init)(params)

        def step(params, state):
            value = jnp.sum(params["bias"])
            updates, new_state = tx.update(params, state, params, value=value)
            assert types(updates) == types(params)
            assert types(new_state) == types(state)
            assert types(optax.apply_updates(params, updates)) == types(params)
            return new_state

        jax.eval_shape(step, params, state)


@over_placements_compiled
def test_explicit_sharding_equals_one_device(placement):
    tx = PLACEMENTS[placement](INNER["adamw"]())
    start = tree(np.random.default_rng(14))
    alone, alone_state, _ = run(tx, start)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharded, state, step = run(tx, put(start, mesh), mesh)
        before = types(state)
        after = step(sharded[-1], state, put(next(batches()), mesh))[1]
        assert types(after) == before
    assert_equal_runs((sharded, state), (alone, alone_state), placement)


@over_placements_compiled
def test_fsdp_with_automatic_sharding_equals_one_device(placement):
    tx, bare = (
        PLACEMENTS[placement](INNER["adamw"]()),
        optax.with_extra_args_support(INNER["adamw"]()),
    )
    start = tree(np.random.default_rng(14))
    alone, alone_state, _ = run(tx, start)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        sharded, state, step = run(tx, put(start, mesh), mesh)
        *_, bare_step = run(bare, put(start, mesh), mesh)
    assert_equal_runs((sharded, state), (alone, alone_state), placement)
    for name, leaf in sharded[-1].items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, FSDP[name]), leaf.ndim)
    assert step._cache_size() <= bare_step._cache_size()


# --- inside shard_map --------------------------------------------------------------------------

AXIS = "data"


def map_over_devices(step, mesh, state, *, split_params=False, **options):
    """One step on each device; the batch is split, and parameters and moments where it is said."""
    spec, split = P(AXIS) if split_params else P(), P(AXIS)

    def place(path, leaf):
        is_moment = jnp.shape(leaf) == (16,) and "probe" not in jax.tree_util.keystr(path)
        return spec if is_moment else P()

    state_spec = jax.tree.map_with_path(place, state)
    specs = {"in_specs": (spec, state_spec, split), "out_specs": (spec, state_spec)}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, **options))


def step_on_one_device(params, state, x, *, loss="all", gradients="all"):
    value, grads = jnp.mean((params[None] - x) ** 2), 2 * jnp.mean(params[None] - x, 0)
    value = jax.lax.pmean(value, AXIS) if loss == "all" else value
    grads = jax.lax.pmean(grads, AXIS) if gradients == "all" else grads
    updates, state = ADAMW.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


ADAMW = lbw_optax.lbw_guard(INNER["adamw"]())
DEVICES = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
WEIGHTS, TARGETS = np.linspace(1, 3, 16).astype("f"), np.linspace(0, 1, 64).reshape(4, 16)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_with_replicated_parameters(check):
    params = jnp.asarray(WEIGHTS)
    state = ADAMW.init(params)
    step = map_over_devices(step_on_one_device, DEVICES, state, check_vma=check)
    moved, after = step(params, state, TARGETS.astype("f"))
    value, grads = jnp.mean((params[None] - TARGETS) ** 2), 2 * jnp.mean(params[None] - TARGETS, 0)
    updates, alone = jax.jit(ADAMW.update)(grads, state, params, value=value)
    chex.assert_trees_all_close(moved, params + updates, rtol=1e-6)
    chex.assert_trees_all_close(after.law, alone.law, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"loss": "own"}, r"mesh axis 'data', .*pass value=jax.lax.pmean\(loss, 'data'\)"),
        ({"gradients": "own"}, r"average them before update, jax.lax.pmean\(grads, 'data'\)"),
    ],
)
def test_what_differs_from_device_to_device_is_refused(own, sentence):
    state = ADAMW.init(jnp.asarray(WEIGHTS))
    step = functools.partial(step_on_one_device, **own)
    with pytest.raises(ValueError, match=sentence):
        map_over_devices(step, DEVICES, state)(jnp.asarray(WEIGHTS), state, TARGETS.astype("f"))


@pytest.mark.parametrize(
    ("placement", "check"), [("wrapped", True), ("wrapped", False), ("chained", True)]
)
def test_parts_of_parameters_are_refused(placement, check):
    """As ZeRO by hand: parameters, gradients and moments are cut, by their shapes."""
    tx = PLACEMENTS[placement](INNER["adamw"]())
    params = jnp.asarray(WEIGHTS)
    state = tx.init(params)

    def step(params, state, _):
        updates, state = tx.update(params, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    mapped = map_over_devices(step, DEVICES, state, split_params=True, check_vma=check)
    with pytest.raises(ValueError, match="outside of shard_map, under jit with shardings"):
        mapped(params, state, TARGETS.astype("f"))


def test_a_run_of_its_own_on_each_device_is_no_part():
    params = jnp.asarray(TARGETS, jnp.float32)
    state = jax.vmap(ADAMW.init)(params)

    def step(params, state):
        run = jax.tree.map(lambda x: x[0], (params, state))
        new = step_on_one_device(*run, jnp.ones((1, 16)), loss="own", gradients="own")
        return jax.tree.map(lambda x: x[None], new)

    mapped = jax.shard_map(step, mesh=DEVICES, in_specs=P(AXIS), out_specs=P(AXIS))
    moved, _ = jax.jit(mapped)(params, state)
    assert (moved != params).all()


def test_explicit_sharding_without_a_loss_compiles_once():
    tx, mesh = PLACEMENTS["wrapped"](INNER["sgd_momentum"]()), mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = put(tree(np.random.default_rng(14)), mesh)
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        before = types(state)
        for _ in range(3):
            _, state = update(params, state, params)
            assert types(state) == before
        assert update._cache_size() == 1


def assert_equal_runs(actual, expected, placement):
    """Sums are taken in another order: equal to float tolerance, decisions the same."""
    (history, state), (alone, alone_state) = actual, expected
    chex.assert_trees_all_close(history, alone, rtol=1e-4, atol=1e-5)
    guard, alone_guard = guard_in(state), guard_in(alone_state)
    chex.assert_trees_all_equal(jax.device_get(guard.law.control.skips), np.int32(1))
    parts = [(g.law.statistics, g.law.control, g.telemetry) for g in (guard, alone_guard)]
    for part, alone_part in zip(*parts, strict=True):
        chex.assert_trees_all_close(
            jax.device_get(part), jax.device_get(alone_part), rtol=1e-3, atol=1e-4
        )
    assert [e.signal for e in lbw_optax.events(state)] == [
        e.signal for e in lbw_optax.events(alone_state)
    ]
    if placement == "wrapped":  # the NaN of one device stops the step on all of them
        assert_same_bits(history[3], history[2])
