"""The scripts as a user runs them: processes of their own, killed, interrupted, run again."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import support
from flax import nnx
from matplotlib.image import imread

pytest.importorskip("transformers", reason="needs transformers: pip install --group train")
pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from small_model import SMALL

import lbw_optax
from train import data, hub, logs, model, weights

pytestmark = pytest.mark.process

ROOT = Path(data.__file__).parent.parent
TEXT = "def double(x):\n    return 2 * x\n\n\nfor i in range(10):\n    print(i, double(i))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, and a small model with its tokenizer in Hugging Face's format."""
    place = tmp_path_factory.mktemp("scripts")
    rng = np.random.default_rng(0)
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        numbers = rng.integers(10, size=(lines, 3))
        text = "".join(f"for i in range({a}):\n    print({b} * i + {c})\n" for a, b, c in numbers)
        (place / "text").mkdir(exist_ok=True)
        (place / "text" / f"{split}.txt").write_text(f"# {split}\n{text}")
    weights.save(model.Decoder(SMALL, rngs=nnx.Rngs(0)), place / "model")
    text = (place / "text" / "train.txt").read_text()
    hub.save_tokenizer(data.train_tokenizer([text], SMALL.vocab_size), 0, place / "model")
    return place


@pytest.fixture(scope="module")
def environment(place):
    """One device, and one cache of tokens and of compiled programs for all processes."""
    return support.environment(
        LBW_CACHE=str(place / "cache"),
        JAX_COMPILATION_CACHE_DIR=str(place / "programs"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    )


# A checkpoint that a kill has cut off is warned about.
STRICT = ("-W", "error", "-W", "default::RuntimeWarning")


def command(script, place, out, *arguments):
    return [
        *(sys.executable, *STRICT, "-m", f"train.{script}", "--preset", "tiny"),
        *("--data", str(place / "text"), "--out", str(out), "--track", *arguments),
    ]


def finish(command, environment):
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(place, environment):
    out = place / "runs" / "tiny"
    arguments = ["--steps", "12", "--base-steps", "12", "--eval-every", "4", "--scan"]
    return finish(command("qwen_lora", place, out, *arguments), environment), out


def test_the_tiny_preset_runs_from_nothing_to_an_adapter(finished):
    _, out = finished
    base = weights.load(out / "base" / "model")
    weights.load_adapter(base, out / "adapter")
    assert base.config == model.PRESETS["tiny"]
    adapter = nnx.to_pure_dict(nnx.state(base, nnx.LoRAParam))
    assert np.any(adapter["layers"][0]["self_attn"]["q_proj"]["lora_B"])


def test_a_run_directory_holds_config_log_events_figure_and_numbers(finished):
    done, out = finished
    for directory in (out, out / "base"):
        config = json.loads((directory / "config.json").read_text())
        assert config["steps"] == 12
        assert (directory / "events.jsonl").exists()
        assert 0.005 < np.mean(imread(directory / "figure.png")[..., :3] < 0.9) < 0.5
        history = logs.history(directory)
        assert history["step"].tolist() == list(range(1, 13))
        assert np.all(np.isfinite(history["loss"]))
        result = json.loads((directory / "result.json").read_text())
        assert {"commit", "law", "machine", "options", "context", "stride"} < set(result)
        for split, perplexity in result["perplexity"].items():
            assert f"{split} perplexity {perplexity:.3f}" in done.stderr
            assert history[f"{split}_perplexity"][-1] == perplexity
    assert np.isfinite(logs.history(out)["valid_perplexity"][[3, 7, 11]]).all()
    assert np.isnan(logs.history(out)["valid_perplexity"][4])
    assert history["tokens_per_second"][-1] > 0
    assert 0 < history["mfu"][-1] < 1


def test_an_estimate_comes_before_anything_else_and_a_measured_one_later(finished):
    lines = finished[0].stderr.splitlines()
    assert "M parameters" in lines[0]
    assert "a device (parameters" in lines[0]
    assert lines[1].startswith("12 steps of 512 tokens")
    assert "a guess, until the first steps are timed" in lines[1]
    assert lines[2].startswith("first a base is pre-trained, in ")
    measured = [line for line in lines if line.startswith("measured over the last steps: ")]
    assert len(measured) == 2  # the base's and the run's own
    # How many are left when it is said is for the clock to decide.
    assert re.search(r"the \d+ steps that are left take about \d", measured[1])


def test_a_run_ends_with_where_its_results_are(finished):
    done, out = finished
    lines = [line.split() for line in done.stderr.splitlines()[-6:]]
    assert lines == [
        ["adapter", str(out / "adapter")],
        ["result", str(out / "result.json")],
        ["figure", str(out / "figure.png")],
        ["report", str(out / "report.html")],
        ["log", str(out / "log.jsonl")],
        ["events", str(out / "events.jsonl")],
    ]
    assert all(Path(path).exists() for _, path in lines)


def test_the_log_has_rate_time_and_regime_by_name(finished):
    found = logs.history(finished[1])
    assert set(found["regime"]) <= set(lbw_optax.REGIMES)
    assert np.all(found["learning_rate"] == np.float32(1e-3))  # the preset's, constant
    assert np.all(np.diff(found["time"]) >= 0)
    assert abs(found["time"][-1] - (finished[1] / "result.json").stat().st_mtime) < 600


def test_a_finished_run_says_so_and_does_nothing_again(finished, place, environment):
    _, out = finished
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = ["--steps", "12", "--base-steps", "12", "--eval-every", "3", "--scan"]  # other cadence
    done = finish(command("qwen_lora", place, out, *again), environment)
    lines = done.stderr.splitlines()
    assert lines[0] == f"{out} is finished: all 12 steps are made"
    assert lines[1].split() == ["adapter", str(out / "adapter")]
    assert "perplexity" not in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_full_training_leaves_a_model_that_transformers_describes(place, environment):
    from transformers import AutoConfig, AutoTokenizer

    out = place / "runs" / "full"
    given = ["--model", str(place / "model"), "--steps", "6", "--microbatches", "2", "--packing"]
    finish(command("tinyllama_full", place, out, *given), environment)
    assert AutoConfig.from_pretrained(out / "model").num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == data.END
    before, after = (weights.load(path / "model") for path in (place, out))
    assert not np.array_equal(before.embed_tokens.embedding[...], after.embed_tokens.embedding[...])


LONG = ("--steps", "60", "--save-every", "5", "--max-distance", "30", "--eval-every", "0")


def long_run(place, out):
    return command("qwen_lora", place, out, "--model", str(place / "model"), *LONG)


@pytest.fixture(scope="module")
def uninterrupted(place, environment):
    out = place / "runs" / "whole"
    finish(long_run(place, out), environment)
    return out


def wait_for_step(process, out, step):
    """Until the log holds this step; the file grows while the process runs."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if (out / "log.jsonl").exists() and len(logs.history(out).get("step", [])) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


# A job that a script puts in the background ignores SIGINT, and so do its children, tests included.
INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_and_then_killed_ends_bitwise_as_the_uninterrupted_one(
    number, place, environment, uninterrupted
):
    out = place / "runs" / f"stopped-{number}"
    arguments = long_run(place, out)
    process = started(interruptible(arguments), environment)
    wait_for_step(process, out, 13)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("stopping after this step") == 1
    said = errors.splitlines()[-1]
    assert "the same command goes on from there" in said
    saved = json.loads((out / "journal.json").read_text())["checkpoints"]
    assert f"stopped after step {max(map(int, saved))}," in said

    process = started(arguments, environment)
    wait_for_step(process, out, 37)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "result.json").exists()

    finish(arguments, environment)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
    found, expected = logs.history(out), logs.history(uninterrupted)
    for metric in ("step", "loss", "scale", "gradient_norm", "regime"):
        np.testing.assert_array_equal(found[metric], expected[metric], err_msg=metric)
    results = [json.loads((d / "result.json").read_text()) for d in (out, uninterrupted)]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1  # it never started anew


def interruptible(arguments):
    script = arguments.index("-m")
    return [*arguments[:script], "-c", INTERRUPTIBLE, *arguments[script + 1 :]]


def read_until(process, part):
    """Lines of standard error up to the one that holds this."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if part in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.fixture
def compiling(place, environment, tmp_path):
    """A run while its first step is compiled; JAX tells when it begins and when it ends."""
    told = {**environment, "JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    out = tmp_path / "run"
    with started(interruptible(long_run(place, out)), told) as process:
        read_until(process, "Compiling jit(train_step)")
        process.send_signal(signal.SIGINT)
        said = read_until(process, "stopping after this step")
        assert not any("Finished XLA compilation" in line for line in said)
        yield process, out
        process.kill()


def test_ctrl_c_is_answered_while_the_step_is_compiled(compiling):
    process, out = compiling
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Finished XLA compilation of jit(train_step)" in errors
    assert "stopped after step 1, and saved; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert "nothing was saved" not in errors
    assert len(logs.history(out)["step"]) == 1
    assert "1" in json.loads((out / "journal.json").read_text())["checkpoints"]


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_compilation(compiling):
    process, out = compiling
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "stopped at once; the same command goes on from the last checkpoint" in errors
    assert "Finished XLA compilation of jit(train_step)" not in errors
    assert "Traceback" not in errors
    assert list(json.loads((out / "journal.json").read_text())["checkpoints"]) == ["0"]


@pytest.mark.slow
def test_ctrl_c_in_the_run_of_the_base_says_one_thing(place, environment, tmp_path):
    out = tmp_path / "run"
    arguments = command("qwen_lora", place, out, "--steps", "12", "--base-steps", "4000", "--scan")
    with started(interruptible(arguments), environment) as process:
        wait_for_step(process, out / "base", 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    said = [line for line in errors.splitlines() if "stopp" in line]
    assert len(said) == 2, errors
    assert said[0] == "stopping after this step; Ctrl-C again stops at once"
    assert said[1].endswith("and saved; the same command goes on from there")
    assert "Traceback" not in errors
    assert not (out / "config.json").exists()


def test_ctrl_c_before_the_first_step_saves_nothing(place, environment, tmp_path):
    out = tmp_path / "run"
    with started(interruptible(long_run(place, out)), environment) as process:
        read_until(process, "M parameters")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    said = "train.qwen_lora: stopped before the first step; nothing was saved"
    assert errors.splitlines()[-1] == said
    assert "Traceback" not in errors
    assert not out.exists()


def started(command, environment):
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
