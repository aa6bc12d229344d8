"""A bad stretch of data: the guard goes back once and passes over it, AdamW alone is lost."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from lbw_optax import lbw_guard
from train import loop, mishap

STEPS = 60
ADAMW = optax.adamw(0.01)


def loss_fn(params, frozen, batch):
    return jnp.mean((params - batch) ** 2)


def batch(index):
    return np.random.default_rng([0, index]).normal(size=16).astype(np.float32)


TASK = mishap.Flawed(loss_fn, batch, STEPS)


def test_the_guard_goes_back_and_every_step_undone_is_told():
    tx, params, calls, undone = lbw_guard(ADAMW), jnp.ones(16), [], []
    found = mishap.survive(
        TASK,
        params,
        None,
        tx,
        tx.init(params),
        lambda step, metrics: calls.append(step),
        undone.append,
    )
    (rollback,) = found.rollbacks
    assert undone == [rollback.from_step - rollback.to_step]
    assert len(calls) == len(found.history["loss"]) == STEPS + sum(undone)
    lost = np.flatnonzero(~np.isfinite(found.history["loss"]))
    assert lost.tolist() == list(TASK.bad)
    assert np.isfinite(found.params).all()


def test_adamw_alone_is_lost_from_the_first_bad_batch_on():
    fit = loop.fit(TASK.loss, jnp.ones(16), ADAMW, TASK.weighed, STEPS)
    assert np.isfinite(fit.history["loss"]).tolist() == [step < STEPS // 2 for step in range(STEPS)]
