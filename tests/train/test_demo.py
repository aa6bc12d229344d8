"""The demo as a user runs it: in a process of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support
from matplotlib.image import imread

from train import demo, mishap

pytestmark = pytest.mark.process

ROOT = Path(demo.__file__).parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "train.demo"]
TEXT = "def double(x):\n    return 2 * x\n\n\nfor i in range(10):\n    print(i, double(i))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("demo")
    for split in ("train", "valid", "test"):
        (place / f"{split}.txt").write_text(f"# {split}\n" + TEXT * 60)
    return place


@pytest.fixture(scope="module")
def environment(place):
    return support.environment(LBW_CACHE=str(place / "cache"))


@pytest.fixture(scope="module")
def finished(place, environment):
    out = place / "runs" / "demo"
    command = [*COMMAND, "--quick", "--seed", "3", "--data-dir", str(place), "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done, out


def test_the_table_shows_every_pair(finished):
    lines = finished[0].stdout.splitlines()
    for title in demo.TITLES.values():
        start = next(i for i, line in enumerate(lines) if line.startswith(title))
        assert lines[start].split()[-2:] == ["AdamW", "guard"]
        assert ["tuned" in line for line in lines[start + 1 : start + 4]] == [True, False, False]
        assert all(line.count("×") >= 2 for line in lines[start + 1 : start + 4])


def test_progress_names_loss_scale_regime_and_time_left(finished):
    guarded = [line for line in finished[0].stderr.splitlines() if "scale" in line]
    assert guarded
    for line in guarded:
        assert "loss" in line
        assert line.endswith("left")
        assert any(regime in line for regime in demo.lbw_optax.REGIMES)


def test_the_json_holds_the_table_and_where_it_comes_from(finished):
    done, out = finished
    document = json.loads((out / "demo.json").read_text())
    assert {"commit", "law", "versions", "machine", "seed", "settings", "tokens", "seconds"} < set(
        document
    )
    assert document["seed"] == 3
    runs = document["runs"]
    assert len(runs) == 14
    for run in runs:
        perplexity, ratio = run["perplexity"], run["ratio_to_tuned_adamw"]
        said = "nan    nan×" if perplexity is None else f"{perplexity:.2f} {ratio:>6.2f}×"
        assert said in done.stdout
        undone = sum(r["from_step"] - r["to_step"] for r in run["rollbacks"])
        assert len(run["history"]["loss"]) == demo.QUICK.steps(_task(run)) + undone
        assert ("scale" in run["history"]) == (run["method"] == "guard")
        assert run["seconds"] > 0


def _task(run):
    return "lora" if run["task"] == demo.MISHAP else run["task"]


def test_the_last_run_goes_back_once_and_passes_over_the_bad_batches(finished):
    run = json.loads((finished[1] / "demo.json").read_text())["runs"][-1]
    (rollback,) = run["rollbacks"]
    assert rollback["reason"] == "skips"
    lost = [loss is None for loss in run["history"]["loss"]]
    first = demo.QUICK.lora_steps // 2
    assert lost == [first <= call < first + mishap.LENGTH for call in range(len(lost))]
    actions = [event["action"] for event in run["events"]]
    assert (actions.count("skip"), actions.count("rollback")) == (mishap.LENGTH, 1)
    assert "went back from step" in finished[0].stdout


def test_adamw_alone_is_lost_at_the_same_batches(finished):
    bare, guarded = json.loads((finished[1] / "demo.json").read_text())["runs"][-2:]
    assert (bare["task"], bare["method"], guarded["method"]) == (demo.MISHAP, "adamw", "guard")
    first = demo.QUICK.lora_steps // 2
    lost = [loss is None for loss in bare["history"]["loss"]]
    assert lost == [False] * first + [True] * (demo.QUICK.lora_steps - first)
    assert bare["perplexity"] is None
    assert np.isfinite(guarded["perplexity"])


def test_pairs_start_alike(finished):
    runs = json.loads((finished[1] / "demo.json").read_text())["runs"]
    for task in demo.TITLES:
        assert len({run["history"]["loss"][0] for run in runs if run["task"] == task}) == 1


def test_the_figure_is_there(finished):
    image = imread(finished[1] / "demo.png")
    assert 0.005 < np.mean(image[..., :3] < 0.9) < 0.5


# A job that a script puts in the background ignores SIGINT, and so do its children, tests included.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("train.demo", run_name="__main__", alter_sys=True)
"""


def interrupted(place, out, environment, when):
    """What the demo prints if Ctrl-C comes after a line of standard error that holds `when`."""
    arguments = ["--quick", "--data-dir", str(place), "--out", str(out)]
    command = [sys.executable, "-W", "error", "-c", INTERRUPTIBLE, *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert any(when in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in errors
    return output, errors


def test_interrupted_while_the_first_step_is_compiled_it_says_so(tmp_path, place, environment):
    told = {**environment, "JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    output, errors = interrupted(place, tmp_path, told, "Compiling jit(train_step)")
    assert errors.splitlines()[-1] == "train.demo: stopped before its end"
    assert (output, list(tmp_path.iterdir())) == ("", [])


def test_interrupted_it_keeps_what_is_finished(finished, place, environment):
    out = finished[1]
    output, errors = interrupted(place, out, environment, "test perplexity")
    assert "stopping after this step" in errors
    kept = json.loads((out / "demo.json").read_text())["runs"]
    assert 1 <= len(kept) < 14
    assert f"Stopped: {len(kept)} of 14 runs" in output
    assert imread(out / "demo.png").ndim == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--seed", "two"], "'two' is not a whole number"),
        (["--data-dir", "nowhere"], "there is no directory nowhere: give one"),
        (["--out", __file__], "cannot write"),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, sentence, place, monkeypatch, capsys):
    monkeypatch.setenv("LBW_CACHE", str(place / "cache"))
    if "--data-dir" not in arguments:
        arguments = [*arguments, "--data-dir", str(place)]
    with pytest.raises(SystemExit) as stopped:
        demo.main([*arguments, "--quick"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last
    assert "Traceback" not in last


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("data-dir", "out", "seed", "quick", "tune"))
    assert "LBW_CACHE" in text
