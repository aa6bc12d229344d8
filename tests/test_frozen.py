"""Leaves that the optimizer inside never updates count for nothing, however they are frozen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import run_of

import lbw_optax
from lbw_optax import lbw_guard

TRAINED = {"a": True, "b": True, "base": False, "table": False}
FROZEN = {name: not trained for name, trained in TRAINED.items()}
LABELS = {name: "trained" if trained else "frozen" for name, trained in TRAINED.items()}


def adamw():
    return optax.adamw(0.1)


IDIOMS = {
    "partition": lambda: optax.partition(
        {"trained": adamw(), "frozen": optax.set_to_zero()}, LABELS
    ),
    "masked": lambda: optax.chain(adamw(), optax.masked(optax.set_to_zero(), FROZEN)),
    "masked, then scaled": lambda: optax.chain(
        optax.partition({"trained": adamw(), "frozen": optax.set_to_zero()}, LABELS),
        optax.scale(0.5),
    ),
    "masked before it": lambda: optax.chain(
        optax.masked(optax.set_to_zero(), FROZEN), optax.adam(0.1)
    ),
    "partition, then clipped": lambda: optax.chain(
        optax.partition({"trained": adamw(), "frozen": optax.set_to_zero()}, LABELS),
        optax.clip_by_global_norm(1e6),
    ),
    "selective": lambda: optax.transforms.selective_transform(adamw(), freeze_mask=FROZEN),
}


def params():
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 4), "b": (4, 16), "base": (16, 16), "table": (300, 16)}
    return {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}


def gradients(step, bad=1.0):
    rng = np.random.default_rng([1, step])
    drawn = {name: rng.normal(size=p.shape).astype("f") for name, p in params().items()}
    return {
        **drawn,
        "base": np.float32(bad) * drawn["base"],
        "table": np.float32(bad) * drawn["table"],
    }


ALONE = {
    "masked, then scaled": lambda: optax.chain(adamw(), optax.scale(0.5)),
    "masked before it": lambda: optax.adam(0.1),
}
"""What trains the leaves that are left, where that is not AdamW as it is."""


@functools.cache
def runs(idiom):
    """Around all leaves, and around the trained ones alone; compiled once."""
    return run_of(lbw_guard(IDIOMS[idiom]())), run_of(lbw_guard(ALONE.get(idiom, adamw)()))


@pytest.mark.parametrize("bad", [1.0, 1e6, np.nan], ids=["sound", "jumps", "nan"])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_frozen_leaf_changes_nothing(idiom, bad):
    """The trained leaves end where a guard that knows of no others leads them."""
    run, alone = runs(idiom)
    whole, part = params(), {name: x for name, x in params().items() if TRAINED[name]}
    state, part_state = run.init(whole), alone.init(part)
    for step in range(12):
        given = gradients(step, bad if step % 3 == 0 else 1.0)
        own = {name: g for name, g in given.items() if TRAINED[name]}
        whole, state = run.step(whole, state, given, np.float32(1))
        part, part_state = alone.step(part, part_state, own, np.float32(1))
    chex.assert_trees_all_close({name: whole[name] for name in part}, part, rtol=1e-4, atol=1e-6)
    for name in ("base", "table"):
        np.testing.assert_array_equal(whole[name], params()[name])
    found, expected = lbw_optax.metrics(state), lbw_optax.metrics(part_state)
    names = ("skips", "gradient_norm", "parameter_norm", "relative_step", "overshoot")
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)


def test_a_leaf_that_is_updated_by_nothing_but_its_own_zero_gradient_counts():
    """Only what can never be updated is left out."""
    tx = lbw_guard(optax.masked(optax.adamw(0.1), {"a": True, "b": False}))
    weights = {"a": jnp.ones(3), "b": jnp.ones(4)}
    zero = {"a": jnp.zeros(3), "b": jnp.ones(4)}
    _, state = tx.update(zero, tx.init(weights), weights, value=1.0)
    np.testing.assert_allclose(lbw_optax.metrics(state)["gradient_norm"], 2.0)
    bad = {"a": jnp.full(3, jnp.nan), "b": jnp.ones(4)}
    _, state = tx.update(bad, state, weights, value=1.0)
    assert int(lbw_optax.metrics(state)["skips"]) == 1


def test_a_frozen_leaf_that_reaches_others_by_a_common_norm_counts():
    """A NaN in it would be in every update: the step is left out, to the bit."""
    tx = lbw_guard(optax.chain(optax.clip_by_global_norm(1.0), IDIOMS["partition"]()))
    run, whole = run_of(tx), params()
    whole, state = run.step(whole, run.init(whole), gradients(0), np.float32(1))
    after, new = run.step(whole, state, gradients(1, np.nan), np.float32(1))
    chex.assert_trees_all_equal(after, whole)
    chex.assert_trees_all_equal(new.inner_state, state.inner_state)
    assert int(lbw_optax.metrics(new)["skips"]) == 1


def test_where_nothing_is_updated_everything_counts():
    tx, weights = lbw_guard(optax.masked(optax.set_to_zero(), {"a": True})), {"a": jnp.ones(4)}
    _, state = jax.jit(tx.update)(weights, tx.init(weights), weights, value=1.0)
    assert float(lbw_optax.metrics(state)["gradient_norm"]) == 2.0
