"""Eight simulated devices: explicit and automatic sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import INNER, PLACEMENTS, assert_same_bits, guard_in, types

import lbw_optax

FSDP = {"bias": P(), "kernel": P("data"), "stacked": P(None, "data", "model")}
SHAPES = {"bias": (16,), "kernel": (64, 96), "stacked": (2, 32, 48)}
EXPLICIT = ["adamw", "sgd_momentum", "lion", "adam"]
over_placements = pytest.mark.parametrize("placement", PLACEMENTS)
over_placements_compiled = pytest.mark.parametrize(
    "placement", ["wrapped", pytest.param("chained", marks=pytest.mark.slow)]
)


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
