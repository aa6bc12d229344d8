"""A sound run whose loss rises, or whose batches are bad for a while, is never ended."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rollback_loop import QUICK, batch, mean_loss, nan_parameter, optimizer, plain, run, start

from lbw_optax import RollbackManager

STEPS = 330


@functools.partial(jax.jit, donate_argnums=0)
def update(tree: Any, data: Any, weight: jax.Array, shift: jax.Array) -> Any:
    """As `rollback_loop.update`, for another objective: weight * loss + shift."""
    (params, state), (x, y) = tree, data

    def loss_of(params: Any) -> jax.Array:
        return weight * jnp.mean((x @ params["w"] + params["b"] - y) ** 2) + shift

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer().update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state


Objective = Callable[[int], tuple[float, float]]


def after_update(tree: Any, index: int, objective: Objective) -> Any:
    return update(tree, batch(index), *map(np.float32, objective(index)))


OBJECTIVES: dict[str, Objective] = {
    "a_level_that_rises_now_and_then": lambda i: (1.0, 0.3 * (i // 50)),
    "a_term_without_a_gradient_annealed_in": lambda i: (1.0, 2.0 * min(max(i - 60, 0) / 200, 1.0)),
    "a_weight_annealed_up": lambda i: (1 + 4 * min(i / 200, 1.0), 0.0),
    "a_reward_of_another_unit": lambda i: (1e3, -2e3),
    "a_target_that_is_replaced": lambda i: (1.0, 0.2 * 3.0 ** (i // 60)),
}


@pytest.mark.filterwarnings("default:The guard asks .* goes on, for this reason is not certain")
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_objective_that_rises_by_itself_ends_nothing(tmp_path, objective):
    """A rollback or a warning may find out that the rise is the data's; the run is as good."""
    with RollbackManager(tmp_path) as rollback:
        step, tree = rollback.resume(start())
        while step < STEPS:
            tree = after_update(tree, rollback.data_step(step), objective)
            step, tree = rollback.step(step + 1, tree)
    assert len(rollback.history) <= 2
    without = start()
    for step in range(STEPS):
        without = after_update(without, step, objective)
    assert mean_loss(tree) < 1.05 * mean_loss(without)


def nan_rows() -> dict[int, Any]:
    """Rows of bad batches, each long enough to ask and too short to exhaust the guard."""
    x, y = batch(0)
    at = [i for start in (30, 90) for i in range(start, start + 23)]
    return {i: (x * np.float32(np.nan), y) for i in at}


ROWS = {"max_distance": 40, "bad_batches": nan_rows()}


def test_when_the_budget_is_spent_an_uncertain_reason_is_a_warning(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"budget of 1 .* spent.*goes on.*switch it off") as w:
        tree, rollback, _ = run(tmp_path, 130, **ROWS, max_rollbacks=1)
    assert [r.reason for r in rollback.history] == ["skips"]
    assert len([x for x in w if "budget" in str(x.message)]) == 1
    assert mean_loss(tree) < 1.1 * mean_loss(plain(80))


def test_what_is_switched_off_is_passed_over_and_a_nan_is_not(tmp_path: Path, recwarn: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, rollback, _ = run(tmp_path, 130, {60: nan_parameter}, **ROWS, reasons=())
    assert [r.reason for r in rollback.history] == ["parameters"]
    assert 60 < rollback.history[0].from_step <= 63


@pytest.mark.parametrize("reasons", ["loss", ("los",), ("request",), ("none",), None, 5])
def test_an_unknown_reason_is_refused(tmp_path, reasons):
    with pytest.raises(ValueError, match=r"reasons must be a collection of names out of .*skips"):
        RollbackManager(tmp_path, **QUICK, reasons=reasons)
