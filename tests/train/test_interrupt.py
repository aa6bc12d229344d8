"""Ctrl-C: handlers come and go, the answer waits for nothing, the second one ends the process."""

import signal
import subprocess
import sys

import pytest

from train.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_and_handlers_come_back(number):
    before = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with Interrupt() as interrupted:
        assert not interrupted
        signal.raise_signal(number)
        assert interrupted
    assert (signal.getsignal(number), signal.set_wakeup_fd(-1)) == before


# The main thread sits in one call that no Python handler can interrupt, as in a compilation.
BUSY = """
import ctypes, signal, sys
from train.interrupt import Interrupt
libc = ctypes.CDLL(None)
with Interrupt() as interrupted:
    print("ready", flush=True)
    while libc.getchar() != ord("x"):
        pass
    print("asked" if interrupted else "not asked", flush=True)
"""


@pytest.fixture
def busy():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", BUSY], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def answer(process):
    assert process.stderr.readline() == "\n"
    return process.stderr.readline()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_answer_comes_while_the_main_thread_is_busy(busy, number):
    busy.send_signal(number)
    assert answer(busy) == "stopping after this step; Ctrl-C again stops at once\n"
    assert busy.communicate("x", timeout=30) == ("asked\n", "")
    assert busy.returncode == 0


@pytest.mark.process
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_a_busy_process(busy, first):
    busy.send_signal(first)
    assert "stopping after this step" in answer(busy)
    busy.send_signal(signal.SIGINT)
    assert "stopped at once; the same command goes on from the last checkpoint" in answer(busy)
    assert busy.wait(timeout=30) == 130


@pytest.mark.process
def test_a_second_request_of_a_scheduler_is_no_reason_to_hurry(busy):
    for _ in range(2):
        busy.send_signal(signal.SIGTERM)
    assert "stopping after this step" in answer(busy)
    assert busy.communicate("x", timeout=30) == ("asked\n", "")
