"""A run directory belongs to one set of options; the log survives what it is told."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest

from train import logs, rundir
from train.interrupt import Interrupt
from train.options import Options, parse


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


def test_all_differences_of_another_run_are_listed(options):
    rundir.claim(options, 0)
    other = dataclasses.replace(options, seed=4, learning_rate=0.5, schedule="linear")
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
            log.write(step, {"loss": np.float32(step), "regime": np.int32(1)})
    with logs.Logs(tmp_path, track=()) as log:  # resumed after step 1
        log.write(2, {"loss": 20.0, "valid_perplexity": np.inf})
    found = logs.history(tmp_path)
    np.testing.assert_array_equal(found["step"], [1, 2, 3])
    np.testing.assert_array_equal(found["loss"], [1, 20, 3])
    np.testing.assert_array_equal(found["regime"], [1, np.nan, 1])
    np.testing.assert_array_equal(found["valid_perplexity"], [np.nan] * 3)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install 'lbw_optax[train]'")
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401 (the writer is real)
    from tensorboardX.proto.event_pb2 import Event

    with logs.Logs(tmp_path, track=("tensorboard",)) as log:
        log.write(1, {"loss": 2.5, "scale": 0.5})
        log.write(2, {"loss": math.nan, "regime": 3})
    (path,) = (tmp_path / "tensorboard").iterdir()
    steps = {event.step: event.summary.value for event in events(path, Event) if event.step}
    found = {step: {v.tag: v.simple_value for v in values} for step, values in steps.items()}
    assert found == {
        1: {"loss": 2.5, "scale": 0.5},
        2: {"loss": pytest.approx(math.nan, nan_ok=True), "regime": 3},
    }


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
    with pytest.raises(ImportError, match=f"--track {name} needs {name}: pip install {name}"):
        logs.Logs(tmp_path, track=(name,))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupted:
        assert not interrupted
        signal.raise_signal(number)
        assert interrupted
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


PRESETS = {"one": Options("m", Path("a")), "two": Options("m", Path("b"), steps=7)}


def parsed(*arguments):
    return parse(Options, PRESETS, arguments, prog="train.x", description="Trains.")


@pytest.mark.parametrize("given", [["--preset", "two"], ["--preset=two"]])
def test_a_preset_sets_defaults_that_arguments_override(given):
    assert parsed() == PRESETS["one"]
    assert parsed(*given) == PRESETS["two"]
    assert parsed(*given, "--steps", "9") == parsed("--steps", "9", *given)
    assert parsed(*given, "--steps", "9") == dataclasses.replace(PRESETS["two"], steps=9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "three"], "there is no such preset; there are one, two"),
        (["--preset"], "there is no such preset; there are one, two"),
        (["--steps", "many"], "--steps"),
        (["--optimizer", "sgd"], "'sgd'"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_arguments_that_mean_nothing_are_named(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--preset", "two", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "one, two" in shown
    assert "default: 7" in shown
