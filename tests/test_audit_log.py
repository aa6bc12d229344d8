"""The audit log: every intervention once, whole lines only, whatever happens to the file."""

import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import no_room, small_params, storm

import lbw_optax
from lbw_optax import AuditLog, lbw_guard
from lbw_optax.exporters import MetricsLog
from lbw_optax.law import control
from lbw_optax.law.events import SIZE


def lines(path):
    """Every line on its own must be valid JSON by the standard: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(name)

    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def numbers(path):
    """Of the interventions in the file; a line with a count stands for as many."""
    written = [line for line in lines(path) if "number" in line]
    return [line["number"] + i for line in written for i in range(line.get("count", 1))]


def test_audit_log_writes_each_intervention_once(tmp_path):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        for step, state in storm(100, every=5):
            if step % 10 == 9:
                audit.record(step, state)
        assert audit.record(100, state) == 0
        written = lines(path)  # complete without closing
    assert [line["number"] for line in written] == list(
        range(int(lbw_optax.metrics(state)["events"]))
    )
    read = ("recorded_at", "time", "rate_multiple")
    assert [{k: v for k, v in line.items() if k not in read} for line in written] == [
        {k: v for k, v in event._asdict().items() if v not in (None, "")}
        for event in lbw_optax.events(state)
    ]
    first = written[0]
    age = datetime.now(UTC) - datetime.fromisoformat(first.pop("time"))
    assert timedelta(0) <= age < timedelta(minutes=10)
    assert first == {
        "number": 0,
        "step": 0,
        "regime": "unstable",
        "signal": "nonfinite_gradients",
        "value": 3.0,
        "threshold": 0.0,
        "action": "skip",
        "scale_before": pytest.approx(control.FIRST_SCALE),
        "scale_after": pytest.approx(control.FIRST_SCALE),
        "rate_multiple": pytest.approx(control.FIRST_SCALE),
        "loss": 1.0,
        "recorded_at": 9,
    }


def test_reopened_audit_log_goes_on_without_duplicates(tmp_path):
    path = tmp_path / "audit.jsonl"
    for step, state in storm(90):
        if step % 30 == 29:
            with AuditLog(path) as audit:
                assert audit.record(step, state) == 30
                assert audit.record(step, state) == 0
    assert numbers(path) == list(range(90))


@pytest.mark.parametrize("torn", ['{"number": 10, "st', "{", '{"number": 10}'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    """As a kill in the middle of a write leaves it; the event itself is written again."""
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(20)]
    with AuditLog(path) as audit:
        audit.record(9, states[9])
    with path.open("a") as file:
        file.write(torn)
    with AuditLog(path) as audit:
        assert audit.record(19, states[19]) == 10
    assert numbers(path) == list(range(20))


def test_late_reading_says_how_many_are_lost(tmp_path):
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(SIZE + 20)]
    with AuditLog(path) as audit:
        assert audit.record(4, states[4]) == 5
        assert audit.record(SIZE + 19, states[-1]) == SIZE
    (lost,) = (line for line in lines(path) if line["action"] == "lost")
    del lost["time"], lost["rate_multiple"], lost["loss"]
    assert lost == {"action": "lost", "interventions": 15, "recorded_at": SIZE + 19}
    assert numbers(path) == [*range(5), *range(20, SIZE + 20)]
    with AuditLog(path) as audit:  # a "lost" line is no obstacle to going on
        assert audit.record(SIZE + 20, states[-1]) == 0


def test_after_a_restore_the_log_goes_on_from_there(tmp_path):
    """Back to the state after 5 events, of 10 written; what happens then is written again."""
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(10)]
    with AuditLog(path) as audit:
        audit.record(9, states[9])
        assert audit.record(4, states[4]) == 0
        assert audit.record(5, states[5]) == 1
    assert numbers(path) == [*range(10), 5]


def test_after_a_restore_a_reopened_log_goes_on_from_there(tmp_path):
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(10)]
    with AuditLog(path) as audit:
        audit.record(9, states[9])
        audit.record(4, states[4])
        audit.record(5, states[5])
    with AuditLog(path) as audit:
        assert audit.record(7, states[7]) == 2
    assert numbers(path) == [*range(10), 5, 6, 7]


def numbers_in(state):
    return [event.number for event in lbw_optax.events(state)]


def restored(path):
    return [line["from_number"] for line in lines(path) if line["action"] == "restored"]


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("steps", [3, 100])
def test_a_run_that_went_on_from_an_older_state(tmp_path, steps, reopened):
    """What happens then has the numbers of what is written; it is first read when some has."""
    path, saved = tmp_path / "audit.jsonl", tmp_path / "saved"
    states = [state for _, state in storm(60, bad=range(0, 60, 2))]
    saved.write_bytes(pickle.dumps(jax.device_get(states[19])))
    before, first_life = (len(numbers_in(state)) for state in (states[19], states[59]))
    audit = AuditLog(path)
    audit.record(59, states[59])
    if reopened:
        audit.close()
        audit = AuditLog(path)
    back = jax.tree.map(jnp.asarray, pickle.loads(saved.read_bytes()))
    *_, (_, state) = storm(steps, bad=range(1, steps, 2), state=back)
    again = range(before, int(lbw_optax.metrics(state)["events"]))
    assert (again.stop < first_life) == (steps == 3)
    with audit:
        assert audit.record(99, state) == len(again)
        assert audit.record(99, state) == 0
    with AuditLog(path) as audit:
        assert audit.record(99, state) == 0
    assert numbers(path) == [*range(first_life), *again]
    assert restored(path) == [before]


def test_a_restored_run_that_does_the_same_again_is_no_news(tmp_path):
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(60, bad=range(0, 60, 2))]
    with AuditLog(path) as audit:
        written = audit.record(49, states[49])
    with AuditLog(path) as audit:
        assert audit.record(39, states[49]) == 0
        assert audit.record(59, states[59]) == len(numbers_in(states[59])) - written
    assert restored(path) == []


def test_a_path_in_a_missing_folder(tmp_path):
    path = tmp_path / "missing" / "audit.jsonl"
    with pytest.raises(OSError, match="missing"):
        AuditLog(path)


def test_an_empty_log(tmp_path):
    with AuditLog(str(tmp_path / "audit.jsonl")) as audit:
        assert audit.record(0, lbw_guard(optax.sgd(0.1)).init(small_params())) == 0
    assert lines(tmp_path / "audit.jsonl") == []


# --- what a file may have been through ---------------------------------------------------------

WHOLE = b"".join(b'{"number": %d, "action": "cut"}\n' % i for i in range(3))
KEPT = {
    "blank_lines": WHOLE + b"\n\n",
    "a_list": WHOLE + b"[1]\n",
    "garbage": WHOLE + b"hello\n",
    "a_garbled_line_in_the_middle": b'{"number": 0, "ste\n' + WHOLE,
    "a_number_that_is_text": WHOLE + b'{"number": "9"}\n',
    "a_number_that_is_null": WHOLE + b'{"number": null}\n',
    "a_number_that_is_true": WHOLE + b'{"number": true}\n',
    "a_note_without_an_end": WHOLE + b"so far, so good",
    "nesting": WHOLE + b"[" * 100_000 + b"\n",
}
TORN = {
    "half_a_line": b'{"number": 3, "st',
    "half_a_letter": '{"number": 3, "signal": "ü'.encode()[:-1],
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("content", KEPT.values(), ids=KEPT)
def test_no_line_is_touched_and_the_log_goes_on(tmp_path, content):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(content)
    states = [state for _, state in storm(5)]
    with AuditLog(path) as audit:
        assert audit.record(4, states[4]) == 2
    written = path.read_bytes()
    assert written.startswith(content)
    row = json.loads(written.splitlines()[-1])
    assert (row["number"], row["count"]) == (3, 2)
    with AuditLog(path) as audit:
        assert audit.record(4, states[4]) == 0


@pytest.mark.parametrize("whole", [WHOLE, b""], ids=["", "alone"])
@pytest.mark.parametrize("tail", TORN.values(), ids=TORN)
def test_only_the_torn_line_is_cut_off(tmp_path, tail, whole):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(whole + tail)
    inode = path.stat().st_ino
    AuditLog(path).close()
    assert path.read_bytes() == whole
    assert path.stat().st_ino == inode


def test_a_torn_line_of_a_person_is_cut_off(tmp_path):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        audit.note(3, action="order", who="ana")
    content = path.read_bytes()
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        AuditLog(path).close()
        assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "step", [np.int64(7), np.float32(7), jnp.int32(7), 7.0], ids=lambda x: type(x).__name__
)
def test_numbers_of_any_kind_are_written(tmp_path, step):
    path = tmp_path / "audit.jsonl"
    ((_, state),) = storm(1)
    facts = {"rate": np.float32(0.5), "loss": [float("nan"), jnp.ones(2)], "of": {"n": np.int8(1)}}
    with AuditLog(path) as audit:
        audit.note(step, **facts)
        audit.record(step, state)
    note, event = lines(path)
    assert {k: note[k] for k in facts} == {"rate": 0.5, "loss": [None, [1.0, 1.0]], "of": {"n": 1}}
    assert note["recorded_at"] == event["recorded_at"] == 7


@pytest.mark.parametrize("step", [None, "7", 7.5, float("nan"), [7]], ids=str)
def test_what_is_no_step_is_refused_before_anything_is_to_be_written(tmp_path, step):
    (_, quiet), *_ = storm(1, bad=())
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        with pytest.raises(TypeError, match=r"is an integer, got"):
            audit.record(step, quiet)
        with pytest.raises(TypeError, match=r"is an integer, got"):
            audit.note(step)
        with pytest.raises(TypeError, match="holds numbers, words, lists and dicts, got b'x'"):
            audit.note(7, shard=b"x")


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b'{"lr": 1}',
        b'{\n "lr": 1\n}',
        b"hello\nworld\n",
        '{"number": 1}\n'.encode("utf-16"),
        b"\x89PNG\r\n\0",
    ],
)
def test_a_file_that_is_no_log_is_refused_and_left(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="notes is no audit log: pass another path"):
        AuditLog(path)
    assert path.read_bytes() == content


def assert_nothing_is_half_written(path, fails):
    """Full for a while: whole lines before, none meanwhile, and all of them after."""
    states = [state for _, state in storm(160, every=2)]
    told = []
    with AuditLog(path, on_event=told.append) as audit:
        audit.record(19, states[19])
        before, heard = path.read_bytes(), len(told)
        with fails(len(before) + 700):  # there is room for two lines and a half
            with pytest.warns(RuntimeWarning, match=r"audit\.jsonl cannot be written .*free space"):
                assert audit.record(39, states[39]) == 10
            assert len(told) > heard  # who listens hears it all the same
            for step in (79, 119, 159):  # longer than the state remembers; nothing is said twice
                audit.record(step, states[step])
                audit.note(step, action="order")
                assert path.read_bytes() == before
        assert audit.record(159, states[159]) == 0
    assert numbers(path) == list(range(80))
    assert path.read_text().count('"order"') == 3
    with AuditLog(path) as audit:
        assert audit.record(159, states[159]) == 0

    audit = AuditLog(path)
    written = path.read_bytes()
    with fails(len(written)):
        with pytest.warns(RuntimeWarning, match="the next call that can writes what is missing"):
            audit.note(160, action="order", why="x" * 5000)  # more than a page has left
        audit.note(161, action="order")
        with pytest.warns(RuntimeWarning, match="its last lines are lost, 2 of them"):
            audit.close()
    assert path.read_bytes() == written


def test_a_write_that_is_cut_short(tmp_path):
    assert_nothing_is_half_written(tmp_path / "audit.jsonl", no_room)


def test_a_full_disk(tmp_path):
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")

    @contextlib.contextmanager
    def fill(size):
        with contextlib.suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        yield
        (tmp_path / "filler").unlink()

    try:
        assert_nothing_is_half_written(tmp_path / "audit.jsonl", fill)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda path: shutil.rmtree(path.parent), "deleted.*open another"),
        (lambda path: path.rename(path.with_suffix(".1")), "moved.*truncate it in its place"),
    ],
    ids=["deleted", "moved"],
)
@pytest.mark.parametrize("make", [AuditLog, MetricsLog])
def test_a_log_that_is_no_longer_there_says_so_once(tmp_path, make, happens, said):
    path = tmp_path / "run" / "log.jsonl"
    path.parent.mkdir()

    def write(log, step):
        log(step, {"loss": 1.0}) if make is MetricsLog else log.note(step, action="seen")

    with make(path) as log:
        write(log, 1)
        happens(path)
        with pytest.warns(RuntimeWarning, match=rf"log\.jsonl has been {said}"):
            write(log, 2)
        write(log, 3)  # a warning would be an error
    assert not path.exists()


def test_a_torn_line_that_cannot_be_cut_off_costs_nothing(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(WHOLE + TORN["half_a_line"])
    with no_room(0):
        AuditLog(path).close()
    assert path.read_bytes() == WHOLE


# --- one log on one file -----------------------------------------------------------------------

HOLD = """
import sys
from lbw_optax import AuditLog
with AuditLog(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_two_logs_on_one_file(tmp_path):
    path = tmp_path / "audit.jsonl"
    with (
        AuditLog(path),
        pytest.raises(OSError, match=r"Another AuditLog is open on .*audit\.jsonl"),
    ):
        AuditLog(path)
    AuditLog(path).close()


@pytest.mark.process
def test_two_processes_on_one_file(tmp_path):
    path = tmp_path / "audit.jsonl"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as first:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(OSError, match="Another AuditLog is open"):
            AuditLog(path)
        first.kill()
        first.wait()
        AuditLog(path).close()


def test_a_log_that_is_closed(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.close()
    audit.close()
    with pytest.raises(ValueError, match=r"audit\.jsonl is closed"):
        audit.record(0, lbw_guard(optax.sgd(0.1)).init(small_params()))


def test_lines_of_several_guards_name_theirs(tmp_path):
    """Each goes on by itself when the log is opened again."""
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(4)]
    for step, (a, b) in enumerate([(1, 0), (3, 0), (3, 2)]):
        with AuditLog(path) as audit:
            audit.record(step, {"a": states[a], "b": states[b]})
    found = [
        (line["guard"], line["number"] + i)
        for line in lines(path)
        for i in range(line.get("count", 1))
    ]
    assert found == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]


# --- rows of skips -----------------------------------------------------------------------------


def rows(path):
    return [(line["step"], line.get("last_step"), line.get("count")) for line in lines(path)]


@pytest.mark.parametrize("every", [1, 3, 100])
def test_a_row_of_skips_is_one_line(tmp_path, every):
    """However often it is read, and written when it has ended."""
    path = tmp_path / "audit.jsonl"
    bad = [*range(3, 15), 20]
    with AuditLog(path) as audit:
        states = [state for _, state in storm(30, bad=bad)]
        for step in [*range(0, 30, every), 29]:
            audit.record(step, states[step])
        assert rows(path) == [(3, 14, 12), (20, None, None)]  # complete without closing


def test_a_row_without_an_end_is_written_after_64_steps(tmp_path):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        for step, state in storm(150):
            audit.record(step, state)
        assert rows(path) == [(0, 63, 64), (64, 127, 64)]
    assert rows(path) == [(0, 63, 64), (64, 127, 64), (128, 149, 22)]


def test_what_is_kept_back_at_a_kill_is_read_again(tmp_path):
    path = tmp_path / "audit.jsonl"
    states = [state for _, state in storm(20)]
    killed = AuditLog(path)
    killed.record(9, states[9])
    killed._file.close()  # as a kill does: `close` is not called
    assert rows(path) == []
    with AuditLog(path) as audit:
        assert audit.record(19, states[19]) == 20
    assert rows(path) == [(0, 19, 20)]


def test_what_is_written_is_said_to_the_logger(tmp_path, caplog):
    """The first of a row at once, its length when it has ended."""
    with caplog.at_level(logging.INFO, "lbw_optax"), AuditLog(tmp_path / "audit.jsonl") as audit:
        for step, state in storm(20, bad=[3, 4, 5]):
            audit.record(step, state)
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        "Step 3: skipped, because gradients are not finite.",
        "Step 3: skipped 3 times, to step 5, because gradients are not finite.",
    ]
    assert any("updates grow again" in sentence for sentence in said)


# --- what is told at once ------------------------------------------------------------------------


def test_an_alert_is_what_the_logger_says(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lbw_optax")
    told = []
    with AuditLog(tmp_path / "audit.jsonl", on_event=told.append) as audit:
        for step, state in storm(100, every=5):
            if step % 10 == 9:
                audit.record(step, state)
    assert [(x.level.upper(), x.sentence) for x in told] == [
        (record.levelname, record.getMessage()) for record in caplog.records
    ]
    assert [x.line for x in told] == lines(tmp_path / "audit.jsonl")
    assert {x.step for x in told} == {9, 19, 29, 39, 49, 59, 69, 79, 89, 99}


def test_what_an_earlier_process_wrote_is_no_news(tmp_path):
    path, told = tmp_path / "audit.jsonl", []
    states = [state for _, state in storm(20, every=4)]
    with AuditLog(path) as audit:
        audit.record(9, states[9])
    with AuditLog(path, on_event=told.append) as audit:
        audit.record(9, states[9])
        assert told == []
        audit.record(19, states[19])
    assert {x.line["step"] for x in told} == {12, 16}


def test_a_function_that_fails_harms_nothing(tmp_path, caplog):
    """Nor those after it; one warning names it."""

    def broken(alert):
        raise OSError("no route")

    told = []
    with AuditLog(tmp_path / "audit.jsonl", on_event=[broken, told.append]) as audit:
        for step, state in storm(6, every=2):
            assert audit.record(step, state) == (step % 2 == 0)
    assert [x.line["step"] for x in told] == [0, 2, 4]
    (warning,) = [r.getMessage() for r in caplog.records if "on_event" in r.getMessage()]
    assert "broken" in warning
    assert "OSError: no route" in warning


def test_on_event_must_be_a_function(tmp_path):
    with pytest.raises(TypeError, match="on_event must be a function, or several, got 'https"):
        AuditLog(tmp_path / "audit.jsonl", on_event=["https://chat.example"])
    assert not list(tmp_path.iterdir())
