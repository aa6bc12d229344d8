"""Options are read, and refused with one sentence, before anything is made."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train import pretrain, qwen_lora, tinyllama_full
from train.command import guarded_main, parse
from train.options import BELOW_ONE, SINGLE, Options, problems

ROOT = Path(pretrain.__file__).parent.parent
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
        ("--preset three", "--preset three: there is no such preset; there are one, two"),
        ("--preset", "--preset : there is no such preset; there are one, two"),
        ("--steps many", "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        ("--steps", "Missing value for argument '--steps'. Expected 1 values."),
        ("--loss-chunk x", "Error parsing --loss-chunk: no type matching"),
        ("--optimizer sgd", "invalid choice 'sgd' for argument '--optimizer'. Expected one of"),
        ("--packing true", "Unrecognized options: true"),
        ("--steps 0", "--steps 0 must be at least 1 (and below 2^31)"),
        ("--steps -3", "--steps -3 must be at least 1 (and below 2^31)"),
        ("--steps 2147483648", "--steps 2147483648 must be at least 1 (and below 2^31)"),
        ("--batch-size 0", "--batch-size 0 must be at least 1 (and below 2^31)"),
        ("--length 0", "--length 0 must be at least 1 (and below 2^31)"),
        ("--microbatches 0", "--microbatches 0 must be at least 1 (and below 2^31)"),
        ("--microbatches 3", "a batch of 16 sequences cannot be cut into 3 microbatches"),
        ("--save-every 0", "--save-every 0 must be at least 1 (and below 2^31)"),
        ("--eval-every -1", "--eval-every -1 must be at least 0 (and below 2^31)"),
        ("--final-eval-targets 0", "--final-eval-targets 0 must be at least 1 (and below 2^31)"),
        ("--loss-chunk 0", "--loss-chunk 0 must be at least 1 (and below 2^31)"),
        ("--mesh 0 1 1", "--mesh (0, 1, 1) needs at least 1 along each axis"),
        ("--seed -1", "--seed -1 must be at least 0 (and below 2^32)"),
        ("--learning-rate nan", "--learning-rate nan must be a finite number above 0"),
        ("--learning-rate inf", "--learning-rate inf must be a finite number above 0"),
        ("--learning-rate 0", "--learning-rate 0.0 must be a finite number above 0"),
        ("--learning_rate -1", "--learning-rate -1.0 must be a finite number above 0"),
        ("--learning-rate 1e-46", "--learning-rate 1e-46 is nothing that single precision holds"),
        ("--weight-decay 1e39", "--weight-decay 1e+39 is nothing that single precision holds"),
        ("--clip 3.4028236e38", "--clip 3.4028236e+38 is nothing that single precision holds"),
        ("--b2 0.99999998", "--b2 0.99999998 is 1 in single precision; use 0.9999999"),
        ("--warmup nan", "--warmup nan must be at least 0 and below 1"),
        ("--warmup 1", "--warmup 1.0 must be at least 0 and below 1"),
        ("--b1 1", "--b1 1.0 must be at least 0 and below 1"),
        ("--weight-decay -1", "--weight-decay -1.0 must be a finite number, 0 or above"),
        ("--clip 0", "--clip 0.0 must be a finite number above 0"),
        ("--encoding utf-7.5", "--encoding utf-7.5: Python knows no such encoding of text"),
        ("--encoding hex", "--encoding hex: Python knows no such encoding of text"),
        (
            "--steps 0 --length 0",
            "--steps 0 must be at least 1 (and below 2^31); --length 0",
        ),
    ],
)
def test_arguments_that_mean_nothing_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.x: {sentence}")


@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--steps", "3", "--out", " "]])
def test_an_empty_value_is_no_directory(given, capsys):
    """It would be the one in which the script was started."""
    with pytest.raises(SystemExit) as stopped:
        parsed(*given)
    assert stopped.value.code == 2
    said = "train.x: --out has an empty value: give one, or leave the option out\n"
    assert capsys.readouterr().err == said


def test_single_precision_is_that_of_numpy():
    """At its ends, a step of the last bit apart."""
    limits = np.finfo(np.float32)
    for end, beyond in ((limits.max, np.inf), (limits.tiny, 0.0)):
        outside = float(end) + (float(end) * 2.0**-24 if beyond else -float(end) * 2.0**-24)
        assert SINGLE.holds(float(end))
        assert not SINGLE.holds(outside)
    share = float(np.nextafter(np.float32(1), np.float32(0)))
    assert BELOW_ONE.holds(share)
    assert not BELOW_ONE.holds(share + 2.0**-25)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--lr=0.1", "--learning-rate"),
        ("--bs", "--batch-size"),
        ("--wd", "--weight-decay"),
        ("--stepz", "--steps"),
        ("--max_steps", "--steps"),
        ("--max-length", "--length"),
        ("--seq-len", "--length"),
        ("--output-dir", "--out"),
        ("--dataset", "--data"),
        ("--no-packng", "--packing"),
        ("--epochs", ""),
    ],
)
def test_an_unknown_option_names_the_near_ones(given, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(given, "3")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    unknown = given.partition("=")[0]
    assert line.startswith(f"train.x: {unknown}: there is no such option; ")
    assert ("did you mean" in line) == bool(meant)
    assert meant in line


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--rank", "0"], "--rank 0 must be at least 1 (and below 2^31)"),
        (["--alpha", "nan"], "--alpha nan must be a finite number above 0"),
        (["--dropout", "1"], "--dropout 1.0 must be at least 0 and below 1"),
        (["--targets"], "--targets () needs at least one name"),
        (["--base-steps", "0"], "--base-steps 0 must be at least 1 (and below 2^31)"),
    ],
)
def test_options_of_a_script_of_its_own_are_looked_at_too(given, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        qwen_lora.main(["--preset", "tiny", "--out", str(tmp_path / "run"), *given])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"train.qwen_lora: {sentence}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [pretrain, qwen_lora, tinyllama_full])
def test_presets_are_sound(script):
    assert [problems(preset) for preset in script.PRESETS.values()] == [[]] * len(script.PRESETS)


@pytest.mark.process
def test_out_of_memory_names_what_needs_less(capsys):
    with pytest.raises(SystemExit) as stopped:
        guarded_main("train.x", lambda: jnp.zeros(1 << 50).sum())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("train.x: out of memory: more --microbatches, ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("There is no room: free some."), "There is no room: free some."),
        (FileNotFoundError(2, "No such file", "a/b"), "No such file: a/b"),
        (OSError(28, "No space left"), "No space left: a file of the run"),
    ],
)
def test_an_error_of_a_file_is_one_sentence(error, said, capsys):
    def job():
        raise error

    with pytest.raises(SystemExit) as stopped:
        guarded_main("train.x", job)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"train.x: {said}\n"


def test_the_sentence_comes_within_seconds(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "train.qwen_lora", "--lr", "3"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train.qwen_lora: --lr: there is no such option; did you mean --learning-rate? "
        "--help lists all"
    ]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--preset", "two", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "one, two" in shown
    assert "default: 7" in shown
