"""How a command leaves after a signal: within seconds, whatever it is doing, and said once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

COMMAND = """
import ctypes, os, signal, sys, time
from selfkd.cli import signals
signals.LEAVE_SECONDS = float(sys.argv[2])
signals.AGAIN_SECONDS = float(sys.argv[3])

def hang():
    lock = ctypes.create_string_buffer(64)
    lock_it = ctypes.CDLL(None).pthread_mutex_lock
    lock_it(lock)
    lock_it(lock)  # for ever, and no signal ends it, as a call of Ray

def callback():
    class Ignoring:
        def __del__(self):
            signal.pause()
    Ignoring()

def say():
    print("stopped", flush=True)

with signals.interruptible(say):
    try:
        print("ready", flush=True)
        if sys.argv[1] == "hangs":
            hang()
        if sys.argv[1] == "ignores":
            callback()
        signal.pause()
    except KeyboardInterrupt:
        signals.say_stopped(say)
        print("leaving", flush=True)
        if sys.argv[1] == "waits":
            while True:
                time.sleep(0.01)
        signals.leave_now(signals.INTERRUPTED)
"""


def stop(kind: str, numbers: Sequence[int], leave: float, again: float, *, group: bool) -> str:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, kind, str(leave), str(again)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    printed = ""
    for place, number in enumerate(numbers):
        if place:
            printed += process.stdout.readline() + process.stdout.readline()
        (os.killpg if group else os.kill)(process.pid, number)
    printed += process.communicate(timeout=600)[0]
    assert process.returncode == 130, printed
    return printed


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_said_once(number: int, group: bool) -> None:
    assert stop("leaves", [number], 600, 600, group=group) == "stopped\nleaving\n"


def test_an_interrupt_that_a_callback_ignores_is_raised_again() -> None:
    assert stop("ignores", [signal.SIGINT], 600, 600, group=False) == "stopped\nleaving\n"


@pytest.mark.parametrize("kind", ["hangs", "waits"])
def test_a_command_that_does_not_leave_is_left(kind: str) -> None:
    printed = stop(kind, [signal.SIGINT], 0.1, 600, group=False)
    assert printed.replace("leaving\n", "") == "stopped\n"


def test_a_second_signal_leaves_at_once() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM]
    assert stop("waits", numbers, 600, 0, group=False) == "stopped\nleaving\n"
