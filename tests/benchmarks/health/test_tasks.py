"""The sound tasks: that each can be trained, and that what they are judged by is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.health import agents, fields
from benchmarks.health.pictures import pictures
from benchmarks.health.task import Now
from benchmarks.health.tasks import tasks

KEY = jax.random.key(0)


def now(task, models, step=0):
    memory = task.memory(models)
    return Now(jnp.int32(step), jnp.int32(step), jax.random.fold_in(KEY, step), memory)


@pytest.mark.parametrize("name", tasks())
def test_losses_and_metric_are_scalars(name):
    """And no shape is broadcast by chance: rank promotion raises in the tests."""
    task = tasks()[name]

    def look(key):
        models = task.start(key)
        moment = now(task, models)
        losses = [loss(models[one], models, moment) for one, loss in task.losses.items()]
        task.remember(moment.memory, models, moment.step)
        return losses, task.metric(models)

    losses, metric = jax.eval_shape(look, KEY)
    assert {x.shape for x in (*losses, metric)} == {()}
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in (*losses, metric))


def test_there_are_at_least_twenty():
    assert len(tasks()) >= 20
    assert len({task.title for task in tasks().values()}) == len(tasks())


def test_the_classes_of_the_pictures_can_be_told_apart():
    """By the nearest of the pictures to train on."""
    train, test = pictures()
    distance = (train.x**2).sum(1)[None] - 2 * test.x @ train.x.T
    assert np.mean(train.y[distance.argmin(1)] == test.y) > 0.9


def test_a_rare_class_comes_as_often_as_it_says():
    """A model that answers nine with certainty has no loss in its batches, and a large one else."""
    task, every = tasks()["rare-10"], 10
    models = jax.tree.map(jnp.zeros_like, task.start(KEY))
    models["model"][-1]["b"] = jnp.zeros((1, 10)).at[0, 9].set(50.0)

    @jax.vmap
    def losses(step):
        return task.losses["model"](models["model"], models, now(task, models, step))

    rare = (jax.jit(losses)(jnp.arange(3 * every)) < 1).tolist()
    assert [sum(rare[i : i + every]) for i in range(0, 3 * every, every)] == [1, 1, 1]


def test_the_solution_solves_the_equation():
    t = jnp.linspace(0, 2, 9)
    u, slope = jax.jit(jax.vmap(jax.value_and_grad(fields.solution)))(t)
    np.testing.assert_allclose(slope + 2 * u, jnp.sin(3 * t), atol=1e-5)
    assert u[0] == pytest.approx(1)


def test_the_values_are_those_of_going_right():
    q = agents.best_values()
    steps = np.arange(agents.PLACES - 1)[::-1]  # to the end, after one step to the right
    end = 1 / (1 - agents.DISCOUNT)
    np.testing.assert_allclose(q[:-1, 1], agents.DISCOUNT**steps * end, rtol=1e-4)
    np.testing.assert_allclose(q[-1, 1], end, rtol=1e-4)


def test_the_loss_of_another_unit_has_the_same_metric():
    one, other = tasks()["pinn"], tasks()["pinn-1e3"]

    @jax.jit
    def look(key):
        models = one.start(key)
        losses = [t.losses["model"](models["model"], models, now(t, models)) for t in (one, other)]
        return losses, [t.metric(models) for t in (one, other)]

    (loss, in_other_unit), metrics = jax.device_get(look(KEY))
    assert in_other_unit == pytest.approx(1e3 * loss, rel=1e-5)
    assert metrics[0] == metrics[1]
