"""Optimizers and schedules by name, against Optax's own and a closed form."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbw_optax
from train import recipes
from train.options import Options

OPTIONS = Options(
    "tiny", Path("x"), steps=40, learning_rate=0.1, warmup=0.25, weight_decay=0.1, clip=0.5
)
PARAMS = {"w": jnp.array([1.0, -2.0, 3.0])}


def of(**changes):
    return dataclasses.replace(OPTIONS, **changes)


def closed_form(kind, step):
    if step < 10:
        return 0.01 + (0.1 - 0.01) * step / 10
    share = (step - 10) / 30
    return (
        0.1
        * {"constant": 1.0, "linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2}[kind]
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_their_closed_form_and_end_at_the_last_step(kind):
    schedule = recipes.schedule(of(schedule=kind))
    for step in range(41):
        assert float(schedule(step)) == pytest.approx(closed_form(kind, step), rel=1e-5, abs=1e-9)


def test_without_a_warmup_the_first_step_has_the_whole_rate():
    assert float(recipes.schedule(of(warmup=0.0))(0)) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [1.0, -0.1, 3.0])
def test_a_warmup_that_is_no_share_is_named(warmup):
    with pytest.raises(ValueError, match="--warmup"):
        recipes.schedule(of(warmup=warmup))


def reference(clipped):
    schedule = recipes.schedule(OPTIONS)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(0.5), adamw) if clipped else adamw


def walk(tx, steps=5):
    """Parameters after a few steps of a quadratic whose gradients are larger than the clip."""
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        gradients = jax.tree.map(lambda p: 4 * p, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ["adamw", "adamw+clip"])
def test_without_the_guard_the_updates_are_those_of_optax(name):
    params, state = walk(recipes.optimizer(of(optimizer=name)))
    expected, _ = walk(reference(name.endswith("+clip")))
    np.testing.assert_array_equal(params["w"], expected["w"])
    seen = lbw_optax.metrics(state)  # the guard looks on
    assert int(seen["age"]) == 5
    assert float(seen["relative_step"]) > 0


@pytest.mark.parametrize("name", ["lbw", "lbw+clip"])
def test_with_the_guard_they_are_scaled(name):
    params, state = walk(recipes.optimizer(of(optimizer=name)), steps=1)
    expected, _ = walk(reference(name.endswith("+clip")), steps=1)
    scale = lbw_optax.metrics(state)["scale"]
    np.testing.assert_allclose(
        params["w"] - PARAMS["w"], scale * (expected["w"] - PARAMS["w"]), 1e-4
    )
