"""Lock of a run folder: one driver at a time; the lock of a dead driver expires."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.errors import LockedError, RunError
from selfkd.results.row import ROW, from_row
from selfkd.storage.files import retry_io, save_text
from selfkd.text import one_line

BEAT_SECONDS = 5.0
"""Seconds between two heartbeats of a driver."""
STALE_SECONDS = 20.0
"""Seconds without a heartbeat after which a driver of another machine or container is dead."""
_SETTLE_SECONDS = 0.2
_FILE, _RUN_ID = "lock.json", "run_id"
_LONGEST = 10_000
"""Bytes of a lock's file that are read."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=ROW)
class _Holder:
    """A driver as its lock names it; facts that the lock does not have are empty."""

    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    started: str | None
    token: str
    beat: int
    boot: str | None = ""
    processes: str | None = ""


class _Seen(NamedTuple):
    """A lock as it was read; a damaged one has no holder."""

    content: bytes
    holder: _Holder | None


class Lock:
    """Context manager that locks a run folder for this driver.

    A file in the folder names the holder and is rewritten every `BEAT_SECONDS`, so that the lock
    works on any storage. A dead holder is detected at once on its own machine, by its process, and
    elsewhere, such as in another container, by missing heartbeats. Clocks are not compared. A
    damaged lock may be that of a driver at work, whose next heartbeat repairs it.

    Args:
        folder: Run folder.

    Raises:
        LockedError: On entering: another driver holds the folder.
        RunError: On leaving by an error: the folder was removed or moved meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / _FILE
        self._token = secrets.token_hex(8)
        self._run_id: bytes | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.lost = False
        """Whether another driver has taken over the folder; the main thread is then interrupted."""
        self.gone = False
        """Whether the folder was removed or moved; the main thread is then interrupted."""

    def __enter__(self) -> Self:
        self._run_id = _content(self._folder / _RUN_ID)
        seen = _read(self._path)
        if seen is not None and _lives(self._path, seen):
            known = seen.holder
            driver = f", process {known.pid} on {one_line(known.host)}" if known else ""
            raise LockedError(
                f"{self._folder} is being worked on by another driver{driver}: wait for it or "
                "stop it"
            )
        self._write(0)
        time.sleep(_SETTLE_SECONDS)
        seen = _read(self._path)
        if seen is None or seen.holder is None or seen.holder.token != self._token:
            raise LockedError(
                f"{self._folder} was taken by another driver at the same moment: wait for it"
            )
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.gone or (error is not None and self._is_gone()):
            raise RunError(
                f"{self._folder} was removed or moved while the run went on: continue the run from "
                "where it lies now, or start a new one"
            ) from None
        if not self.lost:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, beat: int) -> None:
        me = {"pid": os.getpid(), "started": _started(os.getpid())}
        row = {**_location(), **me, "token": self._token, "beat": beat}
        # no patience: the next heartbeat tries again, and the end of the run waits for this one
        save_text(self._path, json.dumps(row, indent=1) + "\n", patience=0 if beat else None)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._renew(beat)
            except Exception as error:  # noqa: BLE001 - the run's own writes say if it can go on
                log.warning("%s: %s", self._path, error)
            if self.lost or self.gone:
                _interrupt_main()
                return

    def _renew(self, beat: int) -> None:
        """Write the lock again, also a missing or damaged one; not over that of another driver."""
        seen = _read(self._path, patience=0)
        if seen is not None and seen.holder is not None and seen.holder.token != self._token:
            self.lost = True
            log.error("%s was taken by another driver: this one stops", self._folder)
        elif self._is_gone():
            self.gone = True
        else:
            self._write(beat)

    def _is_gone(self) -> bool:
        """Whether the folder is not there, or another one; looks twice, as storage may lag."""
        if self._run_id is None:
            return False
        with contextlib.suppress(OSError):
            if _content(self._folder / _RUN_ID, patience=0) != self._run_id:
                time.sleep(_SETTLE_SECONDS)
                return _content(self._folder / _RUN_ID, patience=0) != self._run_id
        return False


def _interrupt_main() -> None:
    """Interrupt as Ctrl-C does; as SIGTERM where SIGINT is ignored, as in a background job."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


def _content(path: Path, *, patience: float | None = None) -> bytes | None:
    """Return the content of a file; None where there is none."""
    try:
        return retry_io(path, path.read_bytes, patience=patience)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(path: Path, *, patience: float | None = None) -> _Seen | None:
    """Return the lock; None where there is none."""
    content = _content(path, patience=patience)
    if content is None:
        return None
    try:
        return _Seen(content, from_row(_Holder, json.loads(content[:_LONGEST])))
    except (ValueError, RecursionError):
        return _Seen(content, None)


def _lives(path: Path, seen: _Seen) -> bool:
    holder = seen.holder
    if holder is not None:
        here = _location().items()  # facts that the lock does not have are not compared
        if all(getattr(holder, key) in ("", value) for key, value in here):
            return bool(_started(holder.pid) == holder.started is not None)
        driver = f"the driver on {one_line(holder.host)}"
        log.warning("waiting %.0f s to see whether %s still lives", STALE_SECONDS, driver)
    else:
        log.warning(
            "%s is damaged: waiting %.0f s to see whether a driver still writes it",
            *(path, STALE_SECONDS),
        )
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECONDS / 4))
        now = _read(path)
        if now is None:
            return False
        if now != seen:
            return True
    return False


def _location() -> dict[str, str | None]:
    """Return what identifies this process namespace; None for a fact that is not available.

    The host name is not enough: machines of one image may share it, and so do containers on the
    network of their host.
    """
    boot, processes = None, None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        processes = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "processes": processes}


def _started(pid: int) -> str | None:
    """Return the start time of a process on this machine; None where it does not run.

    The process id alone may have been reused by another process.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:  # without /proc the process id has to do
        os.kill(pid, 0)
    except OSError:
        return None
    return str(pid)
