"""How a command is stopped: SIGTERM is what Ctrl-C is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit code of a command that was stopped."""


class Stopped(KeyboardInterrupt):
    """The run was stopped, and that has been said."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is, and afterwards what it was before."""
    before = heed_sigterm()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def heed_sigterm() -> Any:
    """Return the handler that was there; none where this is not the thread that gets signals."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def inside_job() -> bool:
    """Return whether this process is the driver of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def leave_now() -> None:
    """End without W&B's exit handlers: its process got the signal of a stopped job, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
