"""How a command is stopped: SIGTERM is what Ctrl-C is, and a command leaves within seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Self

from selfkd.storage.temporary import remove_all

INTERRUPTED = 130
"""Exit code of a command that was stopped."""
LEAVE_SECONDS = 2.5
"""Seconds from a signal after which a command leaves, whatever it still does."""
AGAIN_SECONDS = 0.5
"""Seconds after which another signal is a second wish; batch systems send one to each process."""


class _Command:
    """A command that a signal ends, in this process.

    Args:
        say: Callback that says that the run was stopped.
    """

    def __init__(self, say: Callable[[], object]) -> None:
        self._say = say
        self._saying = threading.Lock()
        self._said = threading.Event()
        self._at: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Self:
        # seen by a thread though the main thread may be in a call, as of Ray, that takes long
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._outer = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        threading.Thread(target=self._limit, args=(reads,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._outer)
        sys.unraisablehook = self._hook
        os.close(self._writes)

    def _limit(self, reads: int) -> None:
        with os.fdopen(reads, "rb", buffering=0) as pipe:
            while heard := pipe.read(1):
                if heard[0] in (signal.SIGINT, signal.SIGTERM):
                    if not self._over.wait(timeout=LEAVE_SECONDS):
                        self.leave()
                    return

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._at is None:
            self._at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._at > AGAIN_SECONDS:
            self.leave()

    def _raise_again(self, lost: Any) -> None:
        """Interrupt once more where a callback, as of an import, has ignored that."""
        if self._at is None or lost.exc_type is not KeyboardInterrupt:
            self._hook(lost)
        else:
            self._at = None
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()

    def say_once(self) -> None:
        if self._saying.acquire(blocking=False):
            try:
                self._say()
            finally:
                self._said.set()

    def leave(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.say_once()
        self._said.wait(timeout=AGAIN_SECONDS)  # the main thread may be at it, on a busy machine
        leave_now(INTERRUPTED)


_command: _Command | None = None


@contextmanager
def interruptible(say: Callable[[], object] | None = None) -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is, and afterwards what it was before.

    Args:
        say: Callback of a process that ends with its command, which says that it was stopped. Such
            a process has left `LEAVE_SECONDS` after a signal, or at a second one.
    """
    global _command
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    outer = _command
    try:
        with nullcontext() if say is None else _Command(say) as command:
            _command = command or outer
            _heed_signals()
            yield
    finally:
        _command = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed_signals() -> None:
    """Set the handlers."""
    signal.signal(signal.SIGTERM, _interrupt if _command is None else _command.interrupt)
    # a shell's background job ignores Ctrl-C; a Python caller may have a handler
    if _command is not None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _command.interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say_stopped(say: Callable[[], object]) -> None:
    """Say once that a command was stopped.

    Args:
        say: Callback that says it, for a Python caller's run.
    """
    if _command is None:
        say()
    else:
        _command.say_once()


def inside_command() -> bool:
    """Return whether this process ends with the command that it runs."""
    return _command is not None


def inside_job() -> bool:
    """Return whether this process is the driver of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def leave_now(code: int) -> None:
    """End this process and what it has started of Ray, without the exit handlers of Ray and W&B.

    Those of Ray wait, up to a minute where Ray has died; W&B's process may have got the signal.

    Args:
        code: Exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "ray" in sys.modules and (private := sys.modules.get("selfkd.execution.ray_private")):
        private.kill_started(everything=True)
    with contextlib.suppress(OSError):
        remove_all()
    os._exit(code)
