"""Progress where standard error is no terminal: plain lines with the time left."""

import functools
import os
import re
import subprocess
import sys
import termios

import numpy as np

from lbw_optax import REGIMES
from train.progress import Progress, describe

METRICS = {"loss": np.float32(2.5), "scale": np.float32(0.25), "regime": np.int32(1)}


def test_lines_name_run_step_loss_scale_regime_and_time_left(capsys):
    with Progress(10, every=-1.0) as progress:
        progress.start("LoRA, guard", steps=5)
        progress.step(0, METRICS)  # compiled: no time is known yet
        progress.step(1, METRICS)
        progress.note("a line that stays")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("LoRA, guard  step 2/5  loss 2.500  scale 0.250  stressed  ")
    assert first.endswith(" left")
    assert second == "a line that stays"


def test_lines_come_no_more_often_than_asked(capsys):
    with Progress(10, every=3600.0) as progress:
        for step in range(10):
            progress.step(step, METRICS)
    assert capsys.readouterr().err == ""


def test_without_a_guard_there_is_only_a_loss():
    assert describe({"loss": np.float32(np.nan)}) == "loss nan"
    for number, regime in enumerate(REGIMES):
        assert describe(METRICS | {"regime": number}).endswith(regime)


def test_steps_of_an_earlier_process_are_not_waited_for(monkeypatch, capsys):
    now = iter(np.arange(100.0))
    monkeypatch.setattr("train.progress.time.monotonic", lambda: next(now))
    with Progress(1000, every=-1.0) as progress:
        progress.start("resumed", steps=1000)
        progress.move(990)
        for step in range(990, 995):
            progress.step(step, METRICS)
    assert capsys.readouterr().err.splitlines()[-1].startswith("resumed  step 995/1000")
    left = progress._left()
    assert "00:00" < left < "01:00"


TERMINAL = """
from train.progress import Progress
metrics = {"loss": 2.5, "scale": 0.25, "regime": 1}
with Progress(20) as progress:
    progress.start("run", 20)
    progress.move(4)
    for step in range(4, 15):
        progress.step(step, metrics)
    progress.move(-6)
    for batch in progress.batches("valid split", [1, 2, 3]):
        pass
    for step in range(9, 20):
        progress.step(step, metrics)
"""


def test_on_a_terminal_the_bar_ends_at_100_percent_also_after_a_rollback():
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=theirs) as process:
        os.close(theirs)
        shown = b"".join(iter(functools.partial(read, ours), b"")).decode()
    os.close(ours)
    assert process.returncode == 0
    bars = re.findall(r"run +(\d+)%", shown)
    assert bars[-1] == "100"
    assert max(map(int, bars)) == 100
    assert "valid split" in shown


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # how a terminal says that nobody writes to it any more
        return b""


def test_an_evaluation_says_how_far_it_is(capsys):
    with Progress(10, every=-1.0) as progress:
        progress.start("run", steps=5)
        assert list(progress.batches("test split", "abc")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"run  test split: batch {done}/3" for done in (1, 2, 3)]
