"""A run directory belongs to one set of options; the log survives what it is told."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lbw_optax import REGIMES
from train import logs, rundir
from train.options import Options


@pytest.fixture
def options(tmp_path):
    return Options("tiny", tmp_path / "runs" / "one", seed=3)


def test_a_directory_is_made_once_and_used_again_for_the_same_options(options):
    rundir.claim(options, 0)
    kept = json.loads((options.out / "config.json").read_text())
    assert kept["seed"] == 3
    assert Path(kept["out"]) == options.out
    rundir.claim(options, 0)
    rundir.claim(dataclasses.replace(options, eval_every=7, track=()), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"microbatches": 4},
        {"remat": True},
        {"loss_chunk": 8},
        {"save_every": 20},
        {"max_distance": 90},
        {"eval_every": 7},
        {"eval_targets": 99},
        {"final_eval_targets": 99},
        {"track": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_rounding_or_cadence_is_free_and_told(options, change):
    rundir.claim(options, 0)
    ((name, value),) = change.items()
    changed = dataclasses.replace(options, **change)
    (said,) = rundir.check(changed)
    assert said.startswith(f"{name} is {list(value) if value == () else value!r}, was ")
    rundir.claim(changed, 0)
    assert rundir.check(changed) == []  # it is what the run has now
    assert rundir.read(options.out / "config.json")["seed"] == 3


def begun(options, newest):
    """A run directory whose newest checkpoint is of this step."""
    rundir.claim(options, 0)
    rundir.write_json(options.out / "journal.json", {"checkpoints": {"0": "good", newest: "good"}})


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "newest", "is_free"),
    [
        ("constant", 0.0, 200, 0, True),
        ("constant", 0.1, 200, 20, True),  # past both warm-ups
        ("constant", 0.1, 200, 15, False),  # past 10 steps, not past 20
        ("constant", 0.001, 104, 0, True),  # no warm-up in either
        ("constant", 0.0, 99, 0, False),
        ("cosine", 0.0, 200, 50, False),
        ("linear", 0.0, 200, 50, False),
    ],
)
def test_more_steps_are_free_where_no_rate_changes(
    options, schedule, warmup, steps, newest, is_free
):
    options = dataclasses.replace(options, schedule=schedule, warmup=warmup, steps=100)
    begun(options, newest)
    longer = dataclasses.replace(options, steps=steps)
    if is_free:
        assert rundir.check(longer) == [f"steps is {steps}, was 100"]
    else:
        with pytest.raises(ValueError, match=f"steps is 100 there and {steps} here"):
            rundir.check(longer)


def test_a_run_of_an_older_version_has_the_defaults_of_what_it_does_not_name(options):
    rundir.claim(options, 0)
    kept = rundir.read(options.out / "config.json")
    del kept["encoding"], kept["final_eval_targets"]
    rundir.write_json(options.out / "config.json", kept)
    assert rundir.check(options) == []
    with pytest.raises(ValueError, match="encoding is 'utf-8' there and 'latin-1' here"):
        rundir.check(dataclasses.replace(options, encoding="latin-1"))


def test_all_differences_of_another_run_are_listed(options):
    rundir.claim(options, 0)
    other = dataclasses.replace(options, seed=4, learning_rate=0.5, schedule="linear", remat=True)
    for refuse in (rundir.check, lambda options: rundir.claim(options, 0)):
        with pytest.raises(ValueError, match="another --out") as raised:
            refuse(other)
        for difference in (
            "seed is 3 there and 4 here",
            "learning_rate is 0.0001 there and 0.5 here",
            "schedule is 'cosine' there and 'linear' here",
        ):
            assert difference in str(raised.value)
        assert str(raised.value).count(" there and ") == 3


def test_too_little_room_is_named_before_anything_is_written(options):
    with pytest.raises(ValueError, match=r"has room for .* GB, and the checkpoints .* 1e\+09 GB"):
        rundir.claim(options, 10**18)
    assert not (options.out / "config.json").exists()


def test_another_file_of_that_name_is_named(options):
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text("{ cut")
    with pytest.raises(ValueError, match=r"config.json is not the config.json of a run"):
        rundir.check(options)


def test_the_log_gives_the_newest_line_of_every_step(tmp_path):
    with logs.Logs(tmp_path, track=()) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": np.float32(step), "regime": np.int32(1), "skips": 1})
    with logs.Logs(tmp_path, track=()) as log:  # resumed after step 1
        log.write(2, {"loss": 20.0, "valid_perplexity": np.inf})
    found = logs.history(tmp_path)
    np.testing.assert_array_equal(found["step"], [1, 2, 3])
    np.testing.assert_array_equal(found["loss"], [1, 20, 3])
    np.testing.assert_array_equal(found["regime"], [REGIMES[1], "", REGIMES[1]])
    np.testing.assert_array_equal(found["skips"], [1, np.nan, 1])
    np.testing.assert_array_equal(found["valid_perplexity"], [np.nan] * 3)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install --group train")
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401 (the writer is real)
    from tensorboardX.proto.event_pb2 import Event

    with logs.Logs(tmp_path, track=("tensorboard",)) as log:
        log.write(1, {"loss": 2.5, "scale": 0.5, "time": 1.7e9})
        log.write(2, {"loss": math.nan, "regime": 3, "gradient_norm": 0.25, "mfu": 0.5})
        log.write(3, {"valid_perplexity": 8.0, "learning_rate": 0.125})
    (path,) = (tmp_path / "tensorboard").iterdir()
    steps = {event.step: event.summary.value for event in events(path, Event) if event.step}
    found = {step: {v.tag: v.simple_value for v in values} for step, values in steps.items()}
    assert found == {
        1: {"loss/train": 2.5, "guard/scale": 0.5},
        2: {
            "loss/train": pytest.approx(math.nan, nan_ok=True),
            "guard/regime": 3,
            "signals/gradient_norm": 0.25,
            "run/mfu": 0.5,
        },
        3: {"loss/valid_perplexity": 8.0, "run/learning_rate": 0.125},
    }


def test_a_line_of_the_log_is_on_disk_at_once(tmp_path):
    """What a kill cuts off are steps that no checkpoint holds."""
    with logs.Logs(tmp_path, track=()) as log:
        log.write(1, {"loss": 2.0})
        assert logs.history(tmp_path)["loss"].tolist() == [2.0]


def events(path, kind):
    """TensorBoard's records: length, its checksum, content, its checksum."""
    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(kind.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


@pytest.mark.parametrize("name", ["wandb", "a_tracker_that_is_not_there"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setitem(logs._TRACKERS, name, logs._service(name))
    monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setitem(logs._MODULES, name, lambda: logs._service_module(name))
    for ask in (logs.require, lambda track: logs.Logs(tmp_path, track=track)):
        with pytest.raises(ImportError, match=f"--track {name} needs {name}: pip install {name}"):
            ask((name,))
