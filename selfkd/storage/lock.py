"""A run folder's lock: one driver at a time, and a dead one does not hold it for ever."""

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
STALE_SECONDS = 20.0
"""A driver of another machine, or container, whose lock shows no new beat for so long is dead."""
_SETTLE_SECONDS = 0.2
_FILE = "lock.json"

log = logging.getLogger(__name__)


class Lock:
    """Holds a run folder for this driver; used with `with`.

    A file in the folder says who holds it and gets a new beat every few seconds, so it works on
    any storage. The holder's death shows at once on its own machine, where its process can be
    looked for, and elsewhere, such as in another container, by the missing beat. Clocks are not
    compared.

    Args:
        folder: the run folder.

    Raises:
        LockedError: when entered: another driver holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.lost = False
        """Whether another driver has taken the folder; the main thread is interrupted then."""

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
        save_json(self._path, {**_place(), **me, "token": self._token, "beat": beat})

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
            except OSError as error:  # what the run itself writes decides whether it can go on
                log.warning("%s: %s", self._path, error)


def _interrupt_main() -> None:
    """As Ctrl-C does, or where that is ignored, as in a script's background job, as SIGTERM."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _thread.interrupt_main()


def _read(path: Path) -> dict[str, Any] | None:
    """Return who holds the lock; no one where the file is missing or damaged."""
    try:
        holder: dict[str, Any] = load_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return holder


def _lives(path: Path, holder: dict[str, Any]) -> bool:
    here = _place()  # a lock of an older version tells less of its own
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


def _place() -> dict[str, str | None]:
    """Return what drivers share that see each other's processes; none of a fact that is not known.

    Machines of one image may have one name, and so have containers on the network of their host.
    """
    boot, processes = None, None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "processes": processes}


def _started(pid: int) -> str | None:
    """Return when a process of this machine began, None where it is not there.

    A number alone would be taken for another process that got it later.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:  # no /proc here: the number must do
        os.kill(pid, 0)
    except OSError:
        return None
    return str(pid)
