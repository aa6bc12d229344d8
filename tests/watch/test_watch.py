"""lbw-watch: what it reads, what it draws, and the orders that its keys give."""

import io
import json
import math
import os
import select
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rich", reason="needs rich: pip install 'lbw_optax[watch]'")

from rich.console import Console

from lbw_optax import orders
from lbw_optax.report import reading
from lbw_optax.watch import command
from lbw_optax.watch.following import Following
from lbw_optax.watch.screen import BARS, screen, sparkline, stretches


def line(step, loss=3.0, **more):
    usual = {"scale": 1.0, "regime": "nominal", "time": 100.0 + step}
    return {"step": step, "loss": loss, **usual, **more}


def write(run, *lines, name="log.jsonl"):
    with (run / name).open("a") as file:
        file.write("".join(json.dumps(x) + "\n" for x in lines))


def text(run, now=100.0, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(screen("mine", Following(run).look(), "keys", now, width, 5))
    return console.file.getvalue()


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    st.integers(1, 60),
    st.sampled_from([min, max]),
)
def test_a_sparkline_is_no_wider_than_asked_and_shows_the_extreme(values, width, of_many):
    drawn = sparkline(values, width, of_many)
    assert len(drawn) == min(width, len(values))
    assert [x for part in stretches(values, width) for x in part] == values
    extreme = of_many(values)
    at = next(i for i, part in enumerate(stretches(values, width)) if extreme in part)
    spread = len({of_many(part) for part in stretches(values, width)}) > 1
    assert drawn[at] == ((BARS[-1] if of_many is max else BARS[0]) if spread else BARS[0])


def test_what_is_not_finite_is_a_mark_of_its_own():
    assert sparkline([1.0, math.inf, math.nan, 2.0], 4) == "▁x █"
    assert sparkline([], 5) == ""


def test_lines_are_read_on_as_they_come_and_what_was_undone_is_forgotten(tmp_path):
    following = Following(tmp_path)
    assert following.look().steps == []
    write(tmp_path, line(1), line(2, loss=2.5))
    assert following.look().columns["loss"] == [3.0, 2.5]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert following.look().steps == [1, 2]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('ss": 2.0}\nnonsense\n')
    write(tmp_path, line(4), line(2, loss=9.0, valid_perplexity=7.0))  # a rollback
    seen = following.look()
    assert seen.steps == [1, 2]
    assert seen.columns["loss"] == [3.0, 9.0]
    # The same lines count as for the report.
    run = reading.read(tmp_path)
    counted = reading.kept(reading.steps(run.columns))
    assert run.columns["loss"][counted].tolist() == seen.columns["loss"]
    assert math.isnan(seen.columns["valid_perplexity"][0])


def test_a_number_that_no_float_holds_is_infinite_and_such_a_step_is_none(tmp_path):
    many = 10**400
    lines = [{"step": 1, "loss": many}, {"step": 2, "loss": -many}, {"step": many, "loss": 3.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = Following(tmp_path).look()
    assert (seen.steps, seen.columns["loss"]) == ([1, 2], [math.inf, -math.inf])


def test_the_screen_says_how_far_the_run_is_and_what_was_done(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 1000}')
    write(tmp_path, *(line(i, scale=0.5 if i > 20 else 1.0) for i in range(1, 41)))
    event = {"number": 0, "step": 21, "action": "cut", "signal": "overshoot", "regime": "stressed"}
    event |= {"value": 1.8, "threshold": 1.0, "scale_before": 1.0, "scale_after": 0.5}
    event |= {"rate_multiple": 0.5, "time": "2026-01-01T00:00:00+00:00"}
    asked = {"action": "order", "step": 30, "order": "hold", "scale": 0.5, "who": "ana@node7"}
    write(tmp_path, event, asked, {"action": "cut", "step": "x"}, name="events.jsonl")
    told = text(tmp_path, now=141.0)
    assert "step 40 of 1,000" in told
    assert "16 min 0 s to go" in told  # a step a second
    assert "ordered by ana@node7" in told
    assert "0.5" in told
    assert max(len(x) for x in told.splitlines()) <= 80
    assert "nothing written for 1 h" in text(tmp_path, now=100.0 + 40 + 3600)
    (tmp_path / "result.json").write_text("{}")
    assert "finished" in text(tmp_path, now=1e9)


def test_a_guard_that_asks_or_only_observes_is_told_of(tmp_path):
    held = {"step": 1, "action": "held", "signal": "overshoot", "rate_multiple": 0.02}
    write(tmp_path, held, name="events.jsonl")
    write(tmp_path, line(1, mode=0, rollback_asked=0))
    told = text(tmp_path, width=150)
    assert "asks to go back" not in told
    assert "the learning rate looks 50 times too high" in told
    write(tmp_path, line(2, mode=1, rollback_asked=4))
    told = text(tmp_path, width=150)
    assert "The guard only observes." in told
    assert "It asks to go back: the loss has risen and stays there." in told
    assert "the learning rate looks too high, by how much only a guard that governs" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "lbw-watch: nowhere is not a run directory"),
        (["ended", "--order", "hold"], "ended has finished: no process is left"),
        ([".", "--order", "hold", "--scale", "2"], "scale must be in (0, 1]"),
        ([".", "--order", "govern", "--scale", "0.5"], 'is for "hold" only'),
        ([".", "--scale", "0.5"], "--scale is for --order hold"),
    ],
)
def test_what_cannot_work_gets_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "result.json").write_text("{}")
    assert command.main(arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("lbw-watch: ")
    assert said in sentence


def test_a_run_that_was_told_to_go_on_has_not_finished(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 20}')
    (tmp_path / "result.json").write_text('{"options": {"steps": 10}}')
    assert command.main([str(tmp_path), "--order", "hold"]) == 0
    (tmp_path / "result.json").write_text('{"options": {"steps": 20}}')
    assert command.main([str(tmp_path), "--order", "hold"]) == 2


@pytest.mark.process
def test_keys_in_a_terminal_give_orders_and_q_ends(tmp_path):
    import pty  # where there are terminals

    write(tmp_path, line(1))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "30"}
    command = [sys.executable, "-m", "lbw_optax.watch", str(tmp_path)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, env=environment) as process:
        try:
            shown = _until(ours, "step 1")
            os.write(ours, b"hbxbb")  # a single b is a question
            shown += _until(ours, "Ordered: rollback")
            os.write(ours, b"q")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    given = [json.loads(x)["order"] for x in (tmp_path / orders.FILE).read_text().splitlines()]
    assert given == ["hold", "rollback"]
    assert "go back to the last proven state" in shown.lower()
    os.close(ours)
    os.close(theirs)


def _until(terminal, word):
    """What is shown until this word is."""
    shown, end = "", time.monotonic() + 60
    while word not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown
