"""The runs of the health benchmark, and its command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import refused

from benchmarks import records
from benchmarks.health import results, run, training
from benchmarks.health.methods import METHODS
from benchmarks.health.tasks import tasks
from lbw_optax.law.control import LAW

pytestmark = pytest.mark.process

STEPS, SOUND, SICK = 60, 1, 3
LINE = tasks()["two-parameters"]


def loss(models, now):
    """That of the line, but NaN from batch 10 on in a run that remembers to be sick."""
    nan = jnp.where((now.batch >= 10) & now.memory, jnp.nan, 1.0)
    return nan * LINE.losses["model"](models["model"], models, now)


# Sound and sick runs in one task, so that a guarded program is compiled once: by their seeds.
TASK = dataclasses.replace(
    LINE,
    steps=STEPS,
    start=lambda key: {"model": jnp.where(jax.random.bits(key) % 2, 0.0, 1e-3) * jnp.ones(2)},
    memory=lambda models: models["model"][0] > 0,
    remember=lambda memory, models, step: memory,
    losses={"model": lambda own, models, now: loss({"model": own}, now)},
)


@pytest.fixture
def short(monkeypatch):
    for module in (run, results):
        monkeypatch.setattr(module, "tasks", lambda: {"short": TASK})


def plain(seed, warm_up):
    """A loop as a user would write it."""
    key, tx = jax.random.key(seed), optax.adam(TASK.rate)
    x, w = np.linspace(-1, 1, 50, dtype=np.float32), jnp.zeros(2)
    state, ends = tx.init(w), []

    @jax.jit
    def update(step, w, state):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key, step), (50,))
        grads = jax.grad(lambda w: jnp.mean((w[0] * x + w[1] - 3 * x - 7 + noise) ** 2))(w)
        updates, state = tx.update(grads, state)
        return w + jnp.minimum((step + 1) / warm_up, 1) * updates, state

    for step in range(STEPS):
        w, state = update(step, w, state)
        if step + 1 in training.measured_at(STEPS):
            ends.append(np.mean((w[0] * x + w[1] - 3 * x - 7) ** 2) + 0.01)
    return np.mean(ends)


@pytest.mark.parametrize(("method", "warm_up"), [("bare", 1), ("warm-up", 10)])
def test_a_run_without_the_guard_is_that_of_a_plain_loop(method, warm_up):
    found = training.train(TASK, SOUND, METHODS[method])
    assert found.metric == pytest.approx(plain(SOUND, warm_up), rel=1e-5)
    assert found[1:] == (STEPS, 0, [], None, 1)


def command(out, *arguments):
    run.main(["--out", str(out), *arguments])
    return records.read(out)


def test_every_method_runs_and_a_second_run_runs_what_lacks(short, tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    out, seeds = tmp_path / "health.jsonl", ("--seeds", f"{SOUND}")
    first = command(out, *seeds, "--methods", "bare", "warm-up", "guard")
    found = command(out, *seeds)
    assert found[:3] == first
    assert "3 cells are there, 1 to run" in capsys.readouterr().err
    assert [r["method"] for r in found] == list(METHODS)
    assert [r["law"] for r in found] == [None, None, LAW, LAW]
    bare, warmed_up, guard, managed = found
    assert "skipped" not in bare
    assert "skipped" not in warmed_up
    assert managed["rollbacks"] == []
    # Nothing has happened, so that the manager has changed nothing.
    for record in (guard, managed):
        assert (record["calls"], record["skipped"], record["ended"]) == (STEPS, 0, None)
    assert guard["metric"] == managed["metric"]
    assert {"commit", "machine", "versions"} <= set(bare)


def test_that_the_guard_gives_up_is_seen(short):
    """With a manager, too, whose last word it is."""
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    methods = ("bare", "guard", "guard-rollback")
    bare, guard, managed = (run.measure(run.cell_of("short", m, SICK)) for m in methods)
    assert bare["metric"] is None
    assert guard["metric"] is not None  # of the weights that it has kept
    assert managed["metric"] is None  # of a run that did not come to its end
    for record in (guard, managed):
        assert 10 < record["ended"] <= STEPS
        assert record["skipped"] >= 20


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["--tasks", "gann"], "did you mean gan"), (["--methods", "gard"], "did you mean guard")],
)
def test_a_wrong_name_gets_one_sentence(arguments, near, capsys):
    assert near in refused(run.main, arguments, capsys)
