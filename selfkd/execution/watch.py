"""Watch over the Ray of a run: a run whose Ray has died is ended; Ray would let it hang."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from selfkd.errors import RayLostError
from selfkd.execution.ray_private import (
    SERVERS,
    GcsClient,
    attached_node_lives,
    dead_children,
    raylet_listens,
    started,
)
from selfkd.execution.start import start_message

LOOK_SECONDS = 0.5  # between two looks at the processes that were started here
ASK_SECONDS = 1.0  # between two requests to the head of a cluster that was joined
REFUSED_SECONDS = 8.0  # without a process at the head's port, after which its cluster has ended
SILENT_SECONDS = 45.0  # without a response from the head; Ray itself ends the process after 60
STUCK_SECONDS = 5.0  # to leave Ray after its death; a call that waits for Ray never returns
START_SECONDS = 120.0  # limit for Ray to start

log = logging.getLogger(__name__)


_current: Watch | None = None


def check() -> None:
    """Raise where the Ray of this process has died.

    Raises:
        RayLostError: What has died.
    """
    if _current is not None:
        _current.check()


class Watch:
    """Thread that looks whether Ray lives, from its start to the end of the run.

    Args:
        address: Address of the head of a cluster that was joined; None where Ray is started here.
        stuck: Callback, from the thread, for a process that cannot leave a call of Ray in time.
    """

    def __init__(
        self, address: str | None, stuck: Callable[[RayLostError], object] | None = None
    ) -> None:
        self._address, self._stuck = address, stuck
        self._running, self._ended = threading.Event(), threading.Event()
        self._client: Any = None
        self._listened = False
        self._answered = time.monotonic()
        self._death: str | None = None
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        global _current
        _current = self

    def begin(self) -> None:
        """Begin to look: Ray has started."""
        self._running.set()

    def end(self) -> None:
        """Stop looking: Ray has been left."""
        global _current
        _current = None
        self._ended.set()
        self._running.set()

    def check(self) -> None:
        """Raise where Ray has died.

        Raises:
            RayLostError: What has died.
        """
        if self._address is None and self._running.is_set():
            self._death = self._death or _dead_process()
        if self._death is not None:
            raise RayLostError(self._death)

    def _look(self) -> None:
        self._look_while_it_starts()
        look = self._dead_cluster if self._address else _dead_process
        seconds = ASK_SECONDS if self._address else LOOK_SECONDS
        while self._death is None:
            if self._ended.wait(timeout=seconds):
                return
            self._death = self._death or look()
        if not self._ended.wait(timeout=STUCK_SECONDS) and self._stuck is not None:
            self._stuck(RayLostError(self._death))

    def _look_while_it_starts(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self._death is None and not self._running.wait(timeout=LOOK_SECONDS):
            reason = next((_describe(*dead) for dead in dead_children()), None)
            if reason is None and time.monotonic() > end:
                reason = f"it is not up after {START_SECONDS:g} s"
            if reason is not None and not self._running.is_set():
                self._death = start_message(reason, self._address)

    def _dead_cluster(self) -> str | None:
        """Return what has died of a cluster that was joined: its head, or the node of this process.

        A head that is started again in time, as one that keeps its state elsewhere, is waited for.
        """
        host, _, port = str(self._address).rpartition(":")
        refused = False
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ASK_SECONDS).close()
            self._client = self._client or GcsClient(address=self._address)
            lives = attached_node_lives(self._client, timeout=ASK_SECONDS)
            self._answered = time.monotonic()
            listens, listened = raylet_listens(), self._listened
            self._listened = listens
            if not lives or (listened and not listens):
                return (
                    "the node of the Ray cluster that this run is attached to has died, as where "
                    "its memory runs out"
                )
        except ConnectionRefusedError:
            refused = True
        except Exception as error:  # noqa: BLE001 - of several kinds: there is no response
            log.debug("%s: %s", self._address, error)
        own = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "0"))  # noqa: SIM112
        limit = max(own - 15.0, REFUSED_SECONDS if refused else SILENT_SECONDS)
        silent = time.monotonic() - self._answered
        if silent < limit:
            return None
        what = "has ended" if refused else f"has not answered for {silent:.0f} s"
        return f"the head of the Ray cluster at {self._address} {what}"


def _dead_process() -> str | None:
    """Return which process has died of the Ray that was started here."""
    for kind in SERVERS:
        for process in started().get(kind, ()):
            if (code := process.poll()) is not None:
                return _describe(kind, process.pid, code)
    return None


def _describe(kind: str, pid: int, code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    why = ", as by the system where memory runs out" if code == -9 else ""
    return f"Ray's {SERVERS[kind]}, process {pid} on this machine, {how}{why}"
