"""The benchmark of the classifier: what is made, what is asked, how it is judged."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.classifier import (
    cost,
    examples,
    judging,
    leaderboard,
    rules,
    tables,
    tasks,
    training,
)
from benchmarks.classifier.run import main
from lbw_optax import law
from lbw_optax.law import classifier, telemetry
from lbw_optax.law.classifier import Kind
from lbw_optax.law.control import Bounds

RNG = np.random.default_rng(0)
LOSS = 1 + 3 * 0.98 ** np.arange(300.0) + 0.05 * RNG.standard_normal((6, 300))
NORM = np.exp(0.2 * RNG.standard_normal((6, 300)))
LOSS[1, 150] += 3.0  # a hard batch
LOSS[2, 200:] += 5.0  # a divergence
LOSS[3, 250:] = np.nan


@pytest.fixture(scope="module")
def logs():
    return examples.of_log(LOSS.astype(np.float32), NORM, np.full(LOSS.shape, True))


@pytest.fixture(scope="module")
def asked(logs):
    return examples.of(logs)


def test_what_judges_has_a_family_or_an_optimizer_that_was_never_seen():
    train = tasks.settings("train") + tasks.settings("valid")
    seen = {task.family for task in train}, {task.optimizer for task in train}
    assert seen == (set(tasks.SEEN), set(tasks.SEEN_OPTIMIZERS))
    for task in tasks.settings("unseen"):
        assert task.family not in seen[0] or task.optimizer not in seen[1]
    names = [task.name for split in ("train", "valid", "unseen") for task in tasks.settings(split)]
    assert len(set(names)) == len(names)
    assert abs(sum(tasks.FAULTS.values()) - 1) < 1e-9
    assert tasks.TITLES.keys() == tasks.FAULTS.keys()


def test_labels_are_what_came_of_each_step(logs, asked):
    assert logs.diverges.tolist() == [False, False, True, True, False, False]
    assert logs.ends[2:4].tolist() == [221, 250]
    assert asked.until[2, 215] == 6
    assert not asked.asked[2, 221:].any()
    assert asked.asked[2, :221].all()
    assert asked.kind[1, 150] == Kind.HARD_BATCH
    assert asked.kind[2, 200] == Kind.UNSTABLE_DYNAMICS
    assert (asked.kind[0] == -1).mean() > 0.98


def test_nothing_is_asked_before_a_fault_that_nothing_announces(logs):
    struck = logs._replace(strikes=np.full(6, 100))
    window = examples.of(struck).asked[0]
    assert np.flatnonzero(~window).tolist() == list(range(50, 100))


def test_a_log_is_read_step_by_step_as_the_law_reads_it(logs, asked):
    """The tiles against the law itself, one step after the other."""
    run, bounds = 2, Bounds(min_scale=1.0)
    held, advance = law.init(bounds), jax.jit(lambda x, seen: law.step(x, seen, bounds)[0])
    learning = law.init(bounds, adapts=True)
    for t in range(260):
        seen = telemetry.init()._replace(**{name: x[run, t] for name, x in logs.seen.items()})
        held, learning = advance(held, seen), advance(learning, seen)
    cells = training.cells(classifier.shipped(), asked.inputs[run, :260])
    np.testing.assert_allclose(cells[-1], held.classifier.cells, atol=1e-4)
    source = leaderboard.Source("made", False, logs, asked, np.full(6, "none"))
    assert np.any(learning.classifier.adapted.shift)
    for adapts, after in (False, held), (True, learning):
        said = leaderboard._risk(classifier.shipped(), source, adapts=adapts)
        np.testing.assert_allclose(said.soon[run, 259], after.classifier.risk.soon, rtol=1e-3)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_published_rules_are_what_they_say(seed):
    x = np.random.default_rng(seed).standard_normal((2, 300)) + 3
    got = rules.window_z(x, rules.WINDOW)
    assert np.isnan(got[:, : rules.WINDOW]).all()
    for t in (rules.WINDOW, 200, 299):
        before = x[:, t - rules.WINDOW : t]
        expected = (x[:, t] - before.mean(1)) / before.std(1, ddof=1)
        np.testing.assert_allclose(got[:, t], expected, rtol=1e-6)
    got, (mean, variance) = rules.memory_z(x), (x[:, :25].mean(1), x[:, :25].var(1))
    for t in range(25, 40):
        np.testing.assert_allclose(got[:, t], (x[:, t] - mean) / np.sqrt(variance), rtol=1e-6)
        kept = np.minimum(x[:, t], mean + 2.5 * np.sqrt(variance))
        mean = 0.97 * mean + 0.03 * kept
        variance = 0.97 * variance + 0.03 * (kept - mean) ** 2


def test_an_alarm_counts_in_the_fifty_steps_before_and_not_after(logs):
    def judged(*steps):
        scores = np.zeros(LOSS.shape)
        for step in steps:
            scores[2, step] = 1.0
        return judging.judge([(logs, scores)], threshold=0.5)

    assert judged(171).caught == judged(221).caught == 0.5
    assert judged(171).lead == 50
    assert judged(215, 218).lead == 6
    assert judged(215).lead_to_rise == logs.begins[2] - 215
    assert judged(222).caught == judged(170).caught == 0
    healthy = judging.judge([(logs, np.where(np.arange(300) == 7, 1.0, 0.0) + 0 * LOSS)], 0.5)
    assert healthy.false_alarms == pytest.approx(1e5 / 300)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_ranking_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.3
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    if pairs:
        assert judging.auroc(scores, labels) == pytest.approx(np.mean(pairs))


def test_training_is_the_same_twice_and_learns(asked, monkeypatch):
    monkeypatch.setattr(training, "EPOCHS", 30)
    monkeypatch.setattr(training, "BATCH", 3)
    first, again = training.train([asked]), training.train([asked])
    jax.tree.map(np.testing.assert_array_equal, first, again)

    def said(weights):
        return leaderboard._risk(weights, source).soon[2, 213:221].mean()

    runs = examples.of_log(LOSS.astype(np.float32), NORM, np.full(LOSS.shape, True))
    source = leaderboard.Source("made", False, runs, asked, np.full(6, "none"))
    assert said(first) > 0.5 > said(training.train([asked._replace(until=0 * asked.until)]))


def test_the_leaderboard_has_all_predictors_and_its_tables_can_be_made(
    logs, asked, monkeypatch, tmp_path
):
    made = leaderboard.Source("decoder", False, logs, asked, np.array([*["none"] * 5, "drift"]))
    real = made._replace(name="wmt", real=True)
    result = leaderboard.judged([made, real], [made, real], classifier.shipped())
    assert result["predictors"].keys() == {"classifier", *rules.RULES}
    assert result["sizes"]["unseen"]["made"] == {"runs": 6, "steps": 1800, "diverge": 2}
    window = result["predictors"]["window"]["published"]["made"]
    assert window["caught"] == 1
    assert json.dumps(result)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--traces", "nowhere"], "holds no algoperf.npz and no nanogpt.npz"),
        (["train"], "--traces"),
        (["guess", "--traces", "."], "invalid choice"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_learning_in_the_run_is_judged_beside_the_shipped_one(logs, asked):
    made = leaderboard.Source("decoder", False, logs, asked, np.full(6, "none"))
    real = made._replace(name="wmt", real=True)
    result = leaderboard.compared([real], [made, real], classifier.shipped())
    usual = leaderboard.judged([real], [made, real], classifier.shipped())
    ours = usual["predictors"]["classifier"]
    assert result["shipped"]["matched"] == ours["matched"]
    assert result["shipped"]["calibration"] == usual["calibration"]
    for one, other in (("shipped", "adapted"), ("adapted", "shipped")):
        own = result[one]["matched"]["made"]["threshold"]
        assert result[other]["other"]["made"]["threshold"] == own
    assert result["adapted"]["ranking"] != result["shipped"]["ranking"]
    assert json.dumps(result)


def test_a_step_takes_time_that_is_told(monkeypatch):
    monkeypatch.setattr(cost, "STEPS", 100)
    monkeypatch.setattr(cost, "TIMES", 1)
    assert min(cost.microseconds().values()) > 0


def test_every_part_of_the_page_can_be_made():
    parts = tables.targets, tables.leaderboard, tables.families, tables.calibration, tables.adapted
    for make in parts:
        assert "| ---" in make()
