"""Alerts to a receiver on this machine: up, down, slow, busy, redirecting, and back again."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from receiver import SECRET, Receiver
from support import environment, storm

import lbw_optax
from lbw_optax.alerts import Alert
from lbw_optax.exporters import Webhook, webhook


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSE", 0.01)


@pytest.fixture
def closed_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}{SECRET}"


def alert(number=0, level="warning"):
    return Alert(level, f"Step {number}: skipped.", number, {"action": "skip", "step": number})


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_the_guard_does_arrives_as_the_audit_log_has_it(tmp_path):
    """Two rows of skips: each is told when it begins, and with its count when it has ended."""
    states = [state for _, state in storm(20, bad={*range(3, 8), 15})]
    path = tmp_path / "audit.jsonl"
    with Receiver() as receiver:
        with (
            Webhook(receiver.url) as hook,
            lbw_optax.AuditLog(path, on_event=hook) as audit,
        ):
            for step in (4, 12, 19):
                audit.record(step, states[step])
        assert hook.delivered == len(receiver.bodies)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    skips = [body for body in receiver.bodies if body["event"]["action"] == "skip"]
    assert [(x["step"], x["event"]["step"], x["event"].get("count")) for x in skips] == [
        (4, 3, 2),
        (12, 3, 5),
        (19, 15, None),
    ]
    assert [x["event"] for x in skips[1:]] == [x for x in lines if x["action"] == "skip"]
    assert skips[1]["text"] == (
        "Step 3: skipped 5 times, to step 7, because gradients are not finite."
    )
    assert set(receiver.requests) == {(SECRET, "application/json")}


def test_a_busy_receiver_is_asked_again(caplog):
    with Receiver([503, 429, 200]) as receiver:
        with Webhook(receiver.url) as hook:
            hook(alert(1))
            hook(alert(2))
        assert [body["step"] for body in receiver.bodies] == [1, 2]
    assert hook.lost == 0
    assert not caplog.records


@pytest.mark.parametrize(("answer", "tries"), [(404, 1), (302, 1), (307, 1), (500, webhook.TRIES)])
def test_a_receiver_that_refuses_is_named_once(caplog, answer, tries):
    with Receiver([answer]) as receiver:
        hook = Webhook(receiver.url)
        for i in range(3):
            hook(alert(i))
        assert not hook.close()
        assert len(receiver.requests) == 3 * tries
        assert all(path == SECRET for path, _ in receiver.requests)
    first, last = warnings_in(caplog)
    assert f"could not be delivered to 127.0.0.1 (it answers {answer})" in first
    assert last == "3 alerts were not delivered to 127.0.0.1."
    assert "secret" not in caplog.text


def test_a_receiver_that_is_down_does_not_stop_the_run(tmp_path, closed_port, caplog):
    """The run with the webhook is the run without, line by line."""
    for name, hooks in (("with", [Webhook(closed_port)]), ("without", [])):
        with lbw_optax.AuditLog(tmp_path / name, on_event=hooks) as audit:
            for step, state in storm(60, every=5):
                if step % 10 == 9:
                    audit.record(step, state)
        assert all(not hook.close() for hook in hooks)
        assert all(hook.lost > 10 for hook in hooks)
    said = [
        list(map(json.loads, (tmp_path / name).read_text().splitlines()))
        for name in ("with", "without")
    ]
    assert [x | {"time": 0} for x in said[0]] == [x | {"time": 0} for x in said[1]]
    about = [line for line in warnings_in(caplog) if "127.0.0.1" in line]
    assert len(about) == 2
    assert "ConnectionRefusedError" in about[0] or "Connection refused" in about[0]


def test_a_receiver_that_hangs_blocks_nobody_and_the_queue_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr(webhook, "MOST", 5)
    held = threading.Event()
    with Receiver(held=held) as receiver:
        hook = Webhook(receiver.url)
        began = time.monotonic()
        for i in range(1000):
            hook(alert(i))
        assert time.monotonic() - began < 5
        assert 994 <= hook.lost <= 995  # one is on its way
        assert not hook.close(seconds=0.1)
        assert time.monotonic() - began < 5
        held.set()
    assert "alerts were not delivered" in warnings_in(caplog)[-1]


def test_close_sends_what_waits_without_pauses(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSE", 1000.0)
    with Receiver([503, 200]) as receiver:
        hook = Webhook(receiver.url)
        for i in range(20):
            hook(alert(i))
        assert hook.close(seconds=20)
        assert [body["step"] for body in receiver.bodies] == list(range(20))
        hook(alert(21))  # closed
        assert not hook.close()
        assert hook.lost == 1


@pytest.mark.parametrize(
    ("least", "levels"),
    [
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_decides(least, levels):
    with Receiver() as receiver:
        with Webhook(receiver.url, least=least) as hook:
            for level in webhook.LEVELS:
                hook(alert(level=level))
        assert [body["level"] for body in receiver.bodies] == levels


def test_the_body_is_what_the_user_makes_of_it(caplog):
    with Receiver() as receiver:
        with Webhook(receiver.url, body=lambda x: {"content": x.sentence, "n": 1 / x.step}) as hook:
            hook(alert(0))
            hook(alert(2))
        assert receiver.bodies == [{"content": "Step 2: skipped.", "n": 0.5}]
    assert "body failed, ZeroDivisionError" in warnings_in(caplog)[0]


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("file:///etc/passwd", {}, "url must begin with http"),
        ("http://", {}, "url must begin with http"),
        ("chat.example/hook", {}, "url must begin with http"),
        ("https://me:secret@chat.example/hook", {}, "url must have no user or password"),
        ("https://chat.example/a hook?token=secret", {}, "url must be of ASCII, without spaces"),
        ("https://chat.example:99999/secret", {}, "url must have a port between"),
        ("http://chat.example", {"least": "fatal"}, "least must be one of"),
    ],
)
def test_arguments(url, options, said):
    with pytest.raises(ValueError, match=said) as error:
        Webhook(url, **options)
    assert "secret" not in str(error.value)


@pytest.mark.process
def test_what_is_left_is_sent_when_the_program_ends():
    code = (
        "import sys\n"
        "from lbw_optax.alerts import Alert\n"
        "from lbw_optax.exporters import Webhook\n"
        "hook = Webhook(sys.argv[1])\n"
        "for i in range(5): hook(Alert('error', 'stopped', i, {}))\n"
        "raise SystemExit(3)\n"
    )
    with Receiver() as receiver:
        ran = subprocess.run(
            [sys.executable, "-c", code, receiver.url], env=environment(), check=False
        )
        assert ran.returncode == 3
        assert [body["step"] for body in receiver.bodies] == list(range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_process_that_is_forked_off_neither_sends_nor_waits(monkeypatch):
    """It has the queue, and no thread; its lock may be held for ever."""
    held = threading.Event()
    with Receiver(held=held) as receiver:
        hook = Webhook(receiver.url)
        for i in range(3):
            hook(alert(i))
        with hook._changed:  # as the thread may hold it at that moment
            child = os.fork()
            if child == 0:
                os._exit(hook.close())
        assert os.waitpid(child, 0)[1] == 0
        held.set()
        assert hook.close(seconds=20)
        assert len(receiver.bodies) == 3
