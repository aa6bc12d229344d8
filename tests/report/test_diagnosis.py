"""What `diagnose` sees, against faults that were planted and against the guard's own decisions."""

import csv
import json

import numpy as np
import optax
import pytest
from support import gradients_of, run_of, small_params

import lbw_optax
from lbw_optax.report import columns, words
from lbw_optax.report.diagnosis import of_columns

STEPS = 400


def healthy(seed=0, steps=STEPS):
    """A loss that falls to 2 and a gradient norm about 1, with the noise of batches."""
    noise = np.random.default_rng(seed).normal(size=(2, steps))
    loss = 2 + 2 * np.exp(-np.arange(steps) / 80) + 0.05 * noise[0]
    return {"loss": loss, "gradient_norm": np.exp(0.2 * noise[1])}


def spoiled(**changes):
    """A healthy log, but for these: name=(slice, change of the values there)."""
    log = healthy()
    for name, (where, change) in changes.items():
        log[name][where] = change(log[name][where])
    return log


def times(factor):
    return lambda x: factor * x


def plus(*rise):
    return lambda x: x + (np.linspace(*rise, len(x)) if len(rise) > 1 else rise[0])


LOSE = times(np.nan)
LOST = ("diverged", "loss", 200)


@pytest.mark.parametrize(
    ("changes", "verdict", "signal", "step"),
    [
        ({}, "healthy", None, None),
        ({"gradient_norm": (slice(200, 201), times(50))}, "jumps", "gradient_norm", 200),
        ({"gradient_norm": (slice(200, 201), LOSE)}, "jumps", "nonfinite_gradients", 200),
        ({"loss": (slice(200, 201), plus(3))}, "jumps", "loss", 200),
        ({"loss": (slice(200, 203), LOSE)}, "jumps", "nonfinite_loss", 200),
        ({"loss": (slice(200, 230), plus(4))}, "recovered", "loss", 200),
        ({"loss": (slice(200, None), plus(4))}, "diverged", "loss", 200),
        # A hundredth of the highest, and far above all that came before.
        ({"loss": (slice(200, None), lambda x: 40 + 4000 * (np.arange(len(x)) < 30))}, *LOST),
        ({"loss": (slice(200, None), LOSE)}, "diverged", "nonfinite_loss", 200),
        ({"loss": (slice(200, None), plus(0, 4))}, "diverged", "rollback", None),
        ({"loss": (slice(100, None), plus(0, 1))}, "risen", None, None),
    ],
)
def test_a_planted_fault_is_found_where_it_is(changes, verdict, signal, step):
    found = lbw_optax.diagnose(spoiled(**changes))
    assert found.verdict == verdict
    assert found.entries == STEPS
    first = found.findings[0] if found.findings else None
    assert (first and first.signal) == signal
    if step is not None:
        assert first.step == step
        assert f"step {step}" in found.sentence
    assert ("restore a checkpoint" in found.sentence) == (verdict in ("diverged", "risen"))
    gone = verdict == "jumps" and signal in ("loss", "gradient_norm")
    assert ("What to do: nothing" in found.sentence) == gone


@pytest.mark.parametrize(("at", "gone"), [(STEPS - 2, True), (STEPS - 1, False)])
def test_a_jump_of_the_last_entry_is_not_said_to_be_gone(at, gone):
    found = lbw_optax.diagnose(spoiled(loss=(slice(at, at + 1), plus(3))))
    assert found.verdict == "jumps"
    assert ("What to do: nothing" in found.sentence) == gone
    assert "look at the batches of step" in found.sentence


def test_a_loss_that_explodes_in_the_last_entries_is_told():
    found = lbw_optax.diagnose(spoiled(loss=(slice(STEPS - 2, None), plus(1e9))))
    assert "the last one is 1e+09;" in found.sentence


@pytest.mark.parametrize(
    ("change", "most"), [(plus(0), 0), (lambda x: np.where(np.arange(len(x)), x, np.nan), 20)]
)
def test_the_classifiers_alarm_is_counted_in_entries(change, most):
    found = lbw_optax.diagnose(spoiled(loss=(slice(200, None), change)))
    assert (found.alarm is None) == (most == 0) == ("alarm" not in found.sentence)
    if found.alarm is not None:
        assert (found.alarm.step, found.alarm.risk) == (200, 1.0)
        assert 1 <= found.alarm.times <= most
        many = words.plural(found.alarm.times, "entry")
        assert f"alarm stands in {many}, first at step 200:" in found.sentence


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("logged_at", [slice(1, None), slice(20, None), slice(9, None, 10)])
def test_a_norm_that_is_logged_later_or_seldom_is_no_jump(logged_at, unit, tmp_path):
    log = healthy()
    lines = [{"step": i, "loss": x} for i, x in enumerate(log["loss"])]
    for line, norm in list(zip(lines, log["gradient_norm"], strict=True))[logged_at]:
        line["grad_norm"] = unit * norm
    place = tmp_path / "log.jsonl"
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lbw_optax.diagnose(place).findings == ()


@pytest.mark.parametrize("unit", [1e-300, 1e38, 1e300])
def test_a_finite_number_that_single_precision_does_not_hold_is_finite(unit, recwarn):
    log = {name: x * unit for name, x in healthy().items()}
    assert lbw_optax.diagnose(log).findings == ()
    assert not recwarn.list


@pytest.mark.parametrize("seed", range(5))
def test_in_a_healthy_log_nothing_is_found(seed):
    found = lbw_optax.diagnose(healthy(seed, steps=5000))  # more than a piece
    assert found.verdict == "healthy"
    assert found.findings == ()


def test_a_slow_rise_is_dated_to_where_it_begins():
    found = lbw_optax.diagnose(spoiled(loss=(slice(200, None), plus(0, 4))))
    (told,) = [word for word in found.sentence.split() if word.isdigit() and word != "0"][1:2]
    assert abs(int(told) - 200) <= 40


def test_an_isolated_jump_long_before_is_not_taken_for_the_cause():
    log = spoiled(loss=(slice(300, None), plus(4)), gradient_norm=(slice(90, 91), times(50)))
    found = lbw_optax.diagnose(log)
    assert found.sentence.startswith("The trouble begins at step 300: the loss jumped")
    assert "1 entry had stood out before" in found.sentence


def test_entries_near_each_other_are_one_finding_with_a_count():
    found = lbw_optax.diagnose(spoiled(loss=(slice(200, 240), LOSE)))
    nonfinite = [x for x in found.findings if x.signal == "nonfinite_loss"]
    assert [(x.step, x.last_step, x.times) for x in nonfinite] == [(200, 239, 40)]


def test_it_finds_what_a_guard_that_watched_the_run_has_found():
    """The guard's own decisions on the same gradients and losses, step for step."""
    run = run_of(lbw_optax.lbw_guard(optax.sgd(0.0), mode="observe"))
    params = small_params()
    state, good = run.init(params), gradients_of(params)
    rng = np.random.default_rng(1)
    factors = np.exp(0.1 * rng.normal(size=120)).astype(np.float32)
    factors[[40, 41, 90]] = [80, np.nan, 3000]
    losses = (3 + 0.05 * rng.normal(size=120)).astype(np.float32)
    losses[[60, 61, 100]] = [np.nan, np.inf, 9]
    norm = np.sqrt(sum(np.square(g).sum() for g in good.values()))
    events = []
    for factor, loss in zip(factors, losses, strict=True):
        gradients = {name: g * factor for name, g in good.items()}
        _, state = run.update(gradients, state, params, value=loss)
        events = lbw_optax.events(state)
    acted = [e for e in events if e.action in ("skip", "clip") and e.signal != "loss"]
    told = [(e.step, e.signal) for e in acted]
    found = lbw_optax.diagnose({"loss": losses, "grad_norm": factors * norm}).findings
    steps = [
        (step, x.signal)
        for x in found
        if x.signal not in ("loss", "rollback")
        for step in sorted({x.step, x.last_step})
    ]
    assert sorted(steps) == sorted(told)
    assert {step for step, _ in told} == {40, 41, 60, 61, 90}
    spike = next(x for x in found if x.signal == "gradient_norm")
    event = next(e for e in events if e.action == "clip")
    np.testing.assert_allclose([spike.value, spike.threshold], [event.value, event.threshold], 1e-3)


def as_json_lines(log, place):
    lines = [
        dict(zip(log, (float(x) for x in row), strict=True))
        for row in zip(*log.values(), strict=True)
    ]
    text = "".join(json.dumps({"step": i + 1} | line) + "\n" for i, line in enumerate(lines))
    return write(place / "log.jsonl", text)


def as_csv(log, place):
    with (place / "history.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["_step", "train/loss", "train/grad_norm", "note"])
        table.writerows(
            [i + 1, *row, "good"] for i, row in enumerate(zip(*log.values(), strict=True))
        )
    return place / "history.csv"


def as_trainer_state(log, place):
    rows = zip(*log.values(), strict=True)
    history = [{"step": i + 1, "loss": a, "grad_norm": b} for i, (a, b) in enumerate(rows)]
    # Evaluations have lines of their own, and the last line is the mean of the whole run.
    history[100:100] = [{"step": 100, "eval_loss": 99.0}]
    history += [{"step": STEPS, "train_loss": 50.0}]
    text = json.dumps({"global_step": STEPS, "log_history": history})
    return write(place / "trainer_state.json", text)


def as_tensorboard(log, place):
    tensorboard = pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with tensorboard.SummaryWriter(str(place), max_queue=1) as writer:
        for i, (a, b) in enumerate(zip(*log.values(), strict=True)):
            writer.add_scalar("train/loss", a, i + 1)
            writer.add_scalar("train/grad_norm", b, i + 1)
    return place


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("form", [as_json_lines, as_csv, as_trainer_state, as_tensorboard])
def test_a_log_says_the_same_in_every_form(form, tmp_path):
    log = spoiled(loss=(slice(300, 303), LOSE), gradient_norm=(slice(200, 201), times(50)))
    found = lbw_optax.diagnose(form(log, tmp_path))
    # With float32 numbers, as TensorBoard has them.
    expected = lbw_optax.diagnose(log | {"step": np.arange(STEPS) + 1})
    assert found.verdict == expected.verdict == "jumps"
    assert [x[:3] for x in found.findings] == [x[:3] for x in expected.findings]
    assert [x.step for x in found.findings] == [201, 301]
    assert found.entries == STEPS
    assert found.complaints == ()


def test_a_line_for_each_metric_of_a_step_is_one_entry(tmp_path):
    rows = [({"step": i, "loss": 2.0}, {"step": i, "grad_norm": 1.0}) for i in range(30)]
    text = "".join(json.dumps(line) + "\n" for row in rows for line in row)
    assert lbw_optax.diagnose(write(tmp_path / "log.jsonl", text)).entries == 30


def test_damaged_lines_are_named_and_passed_over(tmp_path):
    lines = as_json_lines(healthy(), tmp_path).read_text().splitlines()
    lines[7] = lines[7][:20]
    lines[50:56] = ["[1]"] * 6
    found = lbw_optax.diagnose(write(tmp_path / "log.jsonl", "\n".join(lines)))
    assert found.entries == STEPS - 7
    assert len(found.complaints) == 6
    assert "log.jsonl, line 8, is damaged" in found.complaints[0]
    assert "2 more lines" in found.complaints[-1]
    assert found.verdict == "healthy"


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("none.jsonl", None, FileNotFoundError, "no such file"),
        ("empty.jsonl", "", ValueError, "no line that can be read"),
        ("a.jsonl", '{"step": 1, "accuracy": 2}\n', ValueError, r"\(step, accuracy\): call one"),
        ("a.csv", "step,accuracy\n1,2\n", ValueError, "neither a loss nor a gradient norm"),
        ("a.json", '{"loss": 2}', ValueError, "no list log_history"),
        ("a.json", "[[[", ValueError, "no list log_history"),
        ("a.wandb", "", ValueError, "export the run's history as CSV"),
        ("a.csv", '"' + 200_000 * "x", ValueError, "no table of comma-separated"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(name, content, error, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=said):
        lbw_optax.diagnose(tmp_path / name)


def test_a_run_that_has_made_no_step_is_told_so():
    """As one that has made a directory for TensorBoard, and no more."""
    with pytest.raises(ValueError, match="run has no entry with a number yet: has the run made"):
        of_columns({}, "run")


@pytest.mark.parametrize("log", [{"loss": np.ones((2, 2))}, {"loss": [1.0], "step": [1, 2]}])
def test_arrays_of_another_shape_are_refused(log):
    with pytest.raises(ValueError, match="of one length"):
        lbw_optax.diagnose(log)


def test_without_its_reader_a_tensorboard_log_is_refused_with_what_to_do(tmp_path, monkeypatch):
    for module in ("tensorboard.compat.proto.event_pb2", "tensorboardX.proto.event_pb2"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    path = write(tmp_path / "events.out.tfevents.1", "")
    with pytest.raises(ImportError, match="pip install tensorboard"):
        lbw_optax.diagnose(path)


def test_numbers_are_read_as_they_are_meant():
    read = columns.of_rows(
        [
            {"step": 1, "train": {"loss": "2.5"}, "regime": 2, "grad_norm": None},
            {"step": 2, "train": {"loss": "NaN"}, "regime": "nominal"},
        ]
    )
    assert read["loss"].tolist() == [2.5, np.inf]
    assert read["gradient_norm"][0] == np.inf
    assert np.isnan(read["gradient_norm"][1])
    assert read["regime"].tolist() == ["unstable", "nominal"]


@pytest.mark.parametrize("log", [[1.0, 2.0], None, 3])
def test_what_is_no_log_gets_a_sentence(log):
    with pytest.raises(TypeError, match="pass the losses as"):
        lbw_optax.diagnose(log)
