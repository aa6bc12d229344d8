"""The runner of the atlas: what it plans, that it goes on where it stopped, what it refuses."""

import math

import pytest
from support import refused

from benchmarks import records
from benchmarks.atlas import draw, run
from benchmarks.atlas.methods import METHODS, OWN, QUICK
from lbw_optax.law.control import LAW

# Not of text, so that nothing is tokenised.
TASK = next(t for t in draw.tasks("choose").values() if t.family == "classifier")
BEST = 5 * run.guess(TASK)


@pytest.fixture
def fake(monkeypatch):
    """Runs whose loss is best at five times the guess; the runs themselves are tested elsewhere."""
    done = []

    def measure(task, cell, directory, cache):
        done.append((cell["method"], cell["lr"], cell["seed"]))
        loss = (
            math.inf
            if (cell["lr"] or 0) > 10 * BEST
            else abs(math.log((cell["lr"] or BEST) / BEST))
        )
        finite = None if math.isinf(loss) else loss
        return {"before": 9.0, "loss": finite, "valid_curve": [], "guard": None, "seconds": 1.0}

    monkeypatch.setattr(run, "measure", measure)
    return done


def atlas(out, *arguments):
    run.main(["--tasks", TASK.name, "--out", str(out), *arguments])
    return records.read(out)


def test_the_rate_is_tuned_and_every_method_runs_at_its_multiples(tmp_path, fake):
    found = atlas(tmp_path / "a.jsonl", "--seeds", "1", "2")
    grid = [r for r in found if r["tuned"] is not None]
    (tuned,) = {r["tuned"] for r in grid}
    assert 0.6 < tuned / BEST < 1.7
    cells = {(r["method"], r["lr"] and round(r["lr"] / tuned), r["seed"]) for r in grid}
    expected = {
        (name, k, seed)
        for name, method in METHODS.items()
        if method.applies(TASK)
        for k in (TASK.multiples if method.takes_lr else [None])
        for seed in (1, 2)
    }
    assert cells == expected
    assert {r["law"] for r in grid} == {None, LAW}
    assert {r["seed"] for r in found if r["tuned"] is None} == {run.TUNING_SEED}


def test_a_second_run_runs_what_lacks_only(tmp_path, fake):
    out = tmp_path / "a.jsonl"
    first = atlas(out, "--methods", OWN, "--lrs", "1")
    fake.clear()
    assert atlas(out, "--methods", OWN, "--lrs", "1") == first
    assert fake == []
    again = atlas(out, "--methods", *QUICK, "--lrs", "1", "3")
    assert again[: len(first)] == first
    assert [method for method, _, _ in fake] == [OWN, "guard", "guard"]


def test_a_task_of_another_draw_is_another_task(tmp_path, fake, monkeypatch):
    out = tmp_path / "a.jsonl"
    first = atlas(out, "--methods", OWN, "--lrs", "1")
    changed = {TASK.name: TASK._replace(b2=0.5)}
    monkeypatch.setattr(run, "tasks", lambda half: changed)
    assert len(atlas(out, "--methods", OWN, "--lrs", "1")) == 2 * len(first)


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--tasks", "c99"], "no task of choose 'c99'"),
        (["--methods", "gard"], "did you mean guard"),
        (["--lrs", "31"], "did you mean 3"),
        (["--tasks", next(iter(draw.tasks("held-out")))], "no task of choose"),
    ],
)
def test_a_wrong_name_gets_one_sentence(arguments, near, capsys):
    assert near in refused(run.main, arguments, capsys)


def test_a_missing_directory_gets_one_sentence(tmp_path, capsys):
    name = next(n for n, t in draw.tasks("choose").items() if t.vocabulary == 256)
    refused(run.main, ["--tasks", name, "--data-dir", str(tmp_path / "nowhere")], capsys)


def test_the_held_out_half_is_said_to_be_looked_at_once(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    assert "looked at once" in " ".join(capsys.readouterr().out.split())
