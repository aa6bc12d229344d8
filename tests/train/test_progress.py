"""Progress where standard error is no terminal: plain lines with the time left."""

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
