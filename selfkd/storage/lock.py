"""Lock of a run folder: one driver at a time; the lock of a dead driver expires."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from selfkd.errors import LockedError
from selfkd.storage.files import load_json, save_json

BEAT_SECONDS = 5.0
"""Seconds between two heartbeats of a driver."""
STALE_SECONDS = 20.0
"""Seconds without a heartbeat after which a driver of another machine or container is dead."""
_SETTLE_SECONDS = 0.2
_FILE = "lock.json"

log = logging.getLogger(__name__)


class Lock:
    """Context manager that locks a run folder for this driver.

    A file in the folder names the holder and is rewritten every `BEAT_SECONDS`, so that the lock
    works on any storage. A dead holder is detected at once on its own machine, by its process, and
    elsewhere, such as in another container, by missing heartbeats. Clocks are not compared.

    Args:
        folder: Run folder.

    Raises:
        LockedError: On entering: another driver holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.lost = False
        """Whether another driver has taken over the folder; the main thread is then interrupted."""

    def __enter__(self) -> Self:
        holder = _read(self._path)
        if holder is not None and _lives(self._path, holder):
            raise LockedError(
                f"{self._path.parent} is being worked on by another driver, process "
                f"{holder['pid']} on {holder['host']}: wait for it or stop it"
            )
        self._write(0)
        time.sleep(_SETTLE_SECONDS)
        if not self._is_mine():
            raise LockedError(
                f"{self._path.parent} was taken by another driver at the same moment: wait for it"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, beat: int) -> None:
        me = {"pid": os.getpid(), "started": _started(os.getpid())}
        save_json(self._path, {**_location(), **me, "token": self._token, "beat": beat})

    def _is_mine(self) -> bool:
        holder = _read(self._path)
        return holder is not None and holder["token"] == self._token

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if not self._is_mine():
                    self.lost = True
                    log.error("%s was taken by another driver: this one stops", self._path.parent)
                    _interrupt_main()
                    return
                self._write(beat)
            except OSError as error:  # the run's own writes decide whether it can continue
                log.warning("%s: %s", self._path, error)


def _interrupt_main() -> None:
    """Interrupt as Ctrl-C does; as SIGTERM where SIGINT is ignored, as in a background job."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _thread.interrupt_main()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the holder of the lock; None where the file is missing or damaged."""
    try:
        holder: dict[str, Any] = load_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return holder


def _lives(path: Path, holder: dict[str, Any]) -> bool:
    here = _location()  # facts that the lock does not have are not compared
    if all(holder.get(key, value) == value for key, value in here.items()):
        return bool(_started(holder["pid"]) == holder["started"] is not None)
    log.warning(
        "waiting %.0f s to see whether the driver on %s still lives", STALE_SECONDS, holder["host"]
    )
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECONDS / 4))
        now = _read(path)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _location() -> dict[str, str | None]:
    """Return what identifies this process namespace; None for a fact that is not available.

    The host name is not enough: machines of one image may share it, and so do containers on the
    network of their host.
    """
    boot, processes = None, None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "processes": processes}


def _started(pid: int) -> str | None:
    """Return the start time of a process on this machine; None where it does not run.

    The process id alone may have been reused by another process.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:  # without /proc the process id has to do
        os.kill(pid, 0)
    except OSError:
        return None
    return str(pid)
