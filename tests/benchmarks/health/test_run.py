"""The runs of the health benchmark, and its command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import records
from benchmarks.health import results, run, training
from benchmarks.health.methods import METHODS
from benchmarks.health.tasks import tasks
from lbw_optax.law.control import LAW

STEPS = 60
TASK = dataclasses.replace(tasks()["two-parameters"], steps=STEPS)


def poisoned(value, now):
    return jnp.where(now.batch >= 10, jnp.nan, 1.0) * value


SICK = dataclasses.replace(
    TASK,
    losses={"model": lambda p, models, now: poisoned(TASK.losses["model"](p, models, now), now)},
)


@pytest.fixture
def short(monkeypatch):
    known = {"short": TASK, "sick": SICK}
    for module in (run, results):
        monkeypatch.setattr(module, "tasks", lambda: known)


def plain(seed):
    """A loop as a user would write it."""
    key, tx = jax.random.key(seed), optax.adam(TASK.rate)
    x, w = np.linspace(-1, 1, 50, dtype=np.float32), jnp.zeros(2)
    state, ends = tx.init(w), []
    for step in range(STEPS):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key, step), (50,))
        g = jax.grad(lambda w: jnp.mean((w[0] * x + w[1] - 3 * x - 7 + noise) ** 2))(w)  # noqa: B023
        updates, state = tx.update(g, state)
        w = optax.apply_updates(w, updates)
        if step + 1 in training.measured_at(STEPS):
            ends.append(float(jnp.mean((w[0] * x + w[1] - 3 * x - 7) ** 2)) + 0.01)
    return np.mean(ends)


def test_a_bare_run_is_that_of_a_plain_loop():
    found = training.train(TASK, 3, guarded=False)
    assert found.metric == pytest.approx(plain(3), rel=1e-5)
    assert found[1:] == (STEPS, 0, [], None, 1)


def command(out, *arguments):
    run.main(["--out", str(out), *arguments])
    return records.read(out)


def test_every_method_runs_and_a_second_run_runs_what_lacks(short, tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    out = tmp_path / "health.jsonl"
    first = command(out, "--tasks", "short", "--seeds", "1", "--methods", "bare", "guard")
    found = command(out, "--tasks", "short", "--seeds", "1")
    assert found[:2] == first
    assert "2 cells are there, 1 to run" in capsys.readouterr().err
    assert [r["method"] for r in found] == list(METHODS)
    assert [r["law"] for r in found] == [None, LAW, LAW]
    bare, guard, managed = found
    assert "skipped" not in bare
    assert managed["rollbacks"] == []
    # Nothing has happened, so that the manager has changed nothing.
    for record in (guard, managed):
        assert (record["calls"], record["skipped"], record["ended"]) == (STEPS, 0, None)
    assert guard["metric"] == managed["metric"]
    assert {"commit", "machine", "versions"} <= set(bare)


@pytest.mark.parametrize("method", ["guard", "guard-rollback"])
def test_that_the_guard_gives_up_is_seen(short, method):
    """With a manager, too, whose last word it is."""
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    record = run.measure(run.cell_of("sick", method, 0))
    assert 10 < record["ended"] <= STEPS
    assert record["skipped"] >= 20
    if method == "guard":
        assert record["metric"] is not None  # of the weights that it has kept
    else:
        assert record["metric"] is None
        assert record["calls"] >= record["ended"]


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["--tasks", "gann"], "did you mean gan"), (["--methods", "gard"], "did you mean guard")],
)
def test_a_wrong_name_gets_one_sentence(arguments, near, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert near in said
    assert said.count("\n") == 1
