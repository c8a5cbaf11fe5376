"""Runs in W&B: online where the host answers, else in files; nothing waits long.

What is logged is in a file on this machine before it is sent. A run that could not be sent whole is
sent again from its file at the end, or by the user's `wandb sync`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb

from selfkd.errors import cut_text, describe_error
from selfkd.tracking.host import answers
from selfkd.tracking.log_file import has_end
from selfkd.tracking.run import LoggedRun
from selfkd.tracking.surroundings import (
    clean_environment,
    of_no_other_run,
    own_folders,
    own_surroundings,
)

START_SECONDS = 10.0
"""Time in which a run must start."""
TRANSMIT_SECONDS: float | None = None
"""Time between two requests of a run; W&B's own default when not given."""
WRITE_SECONDS = 5.0
"""Time in which a run that has ended must be in its file."""
PROBE_SECONDS = 10.0
"""Time for which a host that has answered is not tried again."""
MOST_RESTARTS = 3
"""Number of times that W&B's process is started again where it is killed."""

log = logging.getLogger(__name__)
_HOOKS = {"before": threading.excepthook}


class Session:
    """The runs of one process.

    Args:
        online: Whether to send them.
        url: URL of W&B's host.
        project: Project of all runs.
        entity: Owner of the project; W&B's default when not given.
        group: Group of all runs.
        folder: Folder that W&B writes to.
        wait: Most seconds to wait for a run to be sent at its end.
    """

    def __init__(
        self,
        *,
        online: bool,
        url: str,
        project: str,
        entity: str | None,
        group: str,
        folder: Path,
        wait: float,
    ) -> None:
        self.online = self.wanted_online = online
        self.unsent: dict[str, Path] = {}
        self.torn: dict[str, LoggedRun] = {}
        """Runs whose files may not be whole: their process was killed, or the disk was full."""
        self._processes: dict[str, Any] = {}
        self._ended_here: list[Any] = []
        self.page: str | None = None
        self._url, self._project, self._entity, self._group = url, project, entity, group
        self._folder, self._wait = folder, wait
        self._open: dict[str, LoggedRun] = {}
        self._finishing: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._answered = -PROBE_SECONDS
        self._warned = False
        self._restarts = MOST_RESTARTS
        self.lost: dict[str, tuple[int, str]] = {}
        """How many of what could not be logged beside the metrics, and why the first could not."""
        self._is_set_up = False
        self._own_folders = own_folders(folder / "wandb")
        os.environ.update(self._own_folders)
        own = logging.getLogger("wandb")
        own.propagate, self._level = False, own.level
        own.setLevel(logging.CRITICAL)  # its file has a traceback a line where the disk is full

    def open(
        self,
        run_id: str,
        *,
        name: str,
        axis: str,
        job_type: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        summaries: Mapping[str, str] | None = None,
        left_code: int = 1,
        packages: bool = False,
    ) -> LoggedRun:
        """Open a run.

        Args:
            run_id: Id, the same after a resume: what is logged then replaces what was.
            name: Name that is shown.
            axis: Metric that all others are drawn over.
            job_type: Job type of the run.
            config: Config of the run.
            tags: Tags of the run.
            summaries: Summaries of metrics, `min` or `max`; the last value of all others.
            left_code: Exit code of the run where it is still open at the end.
            packages: Whether the installed packages are listed in it, which takes W&B 0.2 s.
        """

        facts = {
            "id": run_id,
            "name": name,
            "job_type": job_type,
            "config": dict(config),
            "tags": list(tags),
        }

        def start() -> Any:
            run = self._start(facts, packages)
            self._processes[run_id] = _service_process()
            run.define_metric(axis)
            run.define_metric("*", step_metric=axis)
            for metric, kind in (summaries or {}).items():
                run.define_metric(metric, step_metric=axis, summary=kind)
            return run

        def log_from_now() -> LoggedRun:
            return LoggedRun(
                run_id, start, left_code=left_code, recover=self._restart, lose=self._lose
            )

        if not self._is_set_up:
            _set_up()
            self._is_set_up = True
        try:
            logged = log_from_now()
        except Exception:
            if not self._restart():
                raise
            logged = log_from_now()
        self._open[run_id] = logged
        if self.page is None and not logged.run.offline:
            self.page = f"{logged.run.project_url}/groups/{self._group}"
        return logged

    def _start(self, facts: Mapping[str, Any], packages: bool) -> Any:
        for left in (self._folder / "wandb").glob(f"*run-*-{facts['id']}"):
            shutil.rmtree(left, ignore_errors=True)
        mode: Literal["online", "offline"] = "online" if self._reaches() else "offline"
        try:
            return self._init(facts, packages, mode)
        except Exception as error:
            if mode == "offline":
                raise
            self._give_up(error)
            return self._start(facts, packages)

    def _init(
        self, facts: Mapping[str, Any], packages: bool, mode: Literal["online", "offline"]
    ) -> Any:
        with of_no_other_run():
            return wandb.init(
                project=self._project,
                entity=self._entity,
                group=self._group,
                dir=str(self._folder),
                mode=mode,
                reinit="create_new",
                settings=self._settings(packages=packages),
                **facts,
            )

    def _settings(self, *, packages: bool) -> Any:
        return wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=packages,
            x_transaction_log_flush_interval=2,
            x_file_stream_transmit_interval=TRANSMIT_SECONDS,
            x_graphql_retry_max=3,  # finish_timeout does not bound these
            x_graphql_retry_wait_min_seconds=1,
            x_graphql_retry_wait_max_seconds=4,
            x_graphql_timeout_seconds=10,
            x_file_transfer_retry_max=3,
            init_timeout=START_SECONDS,
            finish_timeout=self._wait,
            finish_timeout_raises=True,
            stop_fn=_ignore_stop,
        )

    def _reaches(self) -> bool:
        """Say whether the next run may go online; the host is tried now and then."""
        if not self.online:
            return False
        if time.monotonic() - self._answered > PROBE_SECONDS:
            if not answers(self._url):
                self._warn("W&B does not answer: its files are written, and sent at the end")
                return False
            self._answered = time.monotonic()
        return True

    def _warn(self, text: str) -> None:
        if not self._warned:
            log.warning("%s", text)
        self._warned = True

    def _give_up(self, error: Exception) -> None:
        """Go on offline: a run's id is free again only in a new process of W&B."""
        reason = str(error).partition("\n")[0]
        self._warn(f"W&B does not take this run ({reason}): tracking goes on offline")
        self.online = False
        self._ended_here.append(_service_process())
        _end_service()
        _set_up()
        for logged in self._open.values():
            logged.reopen()

    def _restart(self) -> bool:
        """Start W&B's process where it has ended, and log all of the open runs again."""
        if not self._restarts or not _has_ended(_service_process(), seconds=0.5):
            return False
        self._restarts -= 1
        log.warning("W&B's process has ended: it is started again")
        _end_service()
        _set_up()
        for logged in self._open.values():
            logged.reopen()
        return True

    def _lose(self, what: str, error: Exception) -> None:
        """Note that something beside the metrics could not be logged; say it once."""
        reason = cut_text(" ".join(describe_error(error).split()), 300)
        if what not in self.lost:
            log.warning("W&B: 1 %s could not be logged, all else goes on: %s", what, reason)
        number, first = self.lost.get(what, (0, reason))
        self.lost[what] = number + 1, first

    def finish(self, logged: LoggedRun, exit_code: int) -> None:
        """Close a run; the rest of it is sent meanwhile."""
        if logged.run.offline:
            if not self._finish(logged, exit_code) and self._restart():
                self._finish(logged, exit_code)
            self._open.pop(logged.run_id, None)
            return
        self._open.pop(logged.run_id, None)
        thread = threading.Thread(
            target=self._finish, args=(logged, exit_code), name="tracking-end", daemon=True
        )
        with self._lock:
            self.unsent[logged.run_id] = logged.folder
            self._finishing.append(thread)
        thread.start()

    def _finish(self, logged: LoggedRun, exit_code: int) -> bool:
        """Close a run; return whether all of it is in its file, and sent where it is to be sent."""
        try:
            logged.run.finish(exit_code=exit_code)
            if not logged.run.offline and _went_wrong(logged.folder):
                raise RuntimeError("W&B's process could not send all of it")
            torn = logged.run.offline and not self._is_written(logged)
        except Exception as error:  # noqa: BLE001 - it stays among the unsent
            log.debug("%s is not sent: %s", logged.run_id, error)
            process = self._processes[logged.run_id]
            torn = process not in self._ended_here and _has_ended(process, seconds=0.5)
            if not torn:
                return False
        if torn:
            self._warn(f"W&B: {logged.run_id} is not whole in its file: written again at the end")
            with self._lock:
                self.torn[logged.run_id] = logged
            return False
        with self._lock:
            self.torn.pop(logged.run_id, None)
            self._record_done(logged)
            if not logged.run.offline:
                del self.unsent[logged.run_id]
                _synced_file(logged.folder, logged.run_id).touch()  # which `wandb sync` then skips
            elif self.wanted_online:
                self.unsent[logged.run_id] = logged.folder
        return True

    def _is_written(self, logged: LoggedRun) -> bool:
        """Return whether all of a run is in its file, which W&B's process may still write."""
        path = _log_file(logged.folder, logged.run_id)
        end = time.monotonic() + (0.1 if self.torn else WRITE_SECONDS)
        while not has_end(path):
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def close(self) -> None:
        """Finish what is open and send what is not sent; wait for it, within bounds."""
        for logged in list(self._open.values()):
            with contextlib.suppress(Exception):  # W&B's process may have been stopped
                self.finish(logged, logged.left_code)
        end = time.monotonic() + self._wait + 1
        for thread in self._finishing:
            thread.join(max(0.0, end - time.monotonic()))
        for logged in list(self.torn.values()):
            with contextlib.suppress(Exception):
                self._restart()
                logged.reopen()
                self._finish(logged, logged.left_code)
        if any(thread.is_alive() for thread in self._finishing):
            self._ended_here.append(_service_process())
            _end_service()
        if self.unsent and answers(self._url):
            self._sync()
        for name in self._own_folders:
            os.environ.pop(name, None)
        if not self.torn:
            logging.getLogger("wandb").setLevel(self._level)  # for a Python caller's own runs

    def _sync(self) -> None:
        """Send the runs that are not sent yet, from their files."""
        command = [sys.executable, "-m", "wandb", "sync", "--include-online"]
        paths = [str(path) for path in self.unsent.values()]
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run(  # noqa: S603 - W&B's own command
                [*command, *paths],
                env=clean_environment(),
                capture_output=True,
                timeout=self._wait,
                check=False,
            )
        for run_id, path in list(self.unsent.items()):
            if _synced_file(path, run_id).exists():
                del self.unsent[run_id]

    @property
    def _ledger(self) -> Path:
        return self._folder / "wandb" / "done.txt"

    def _record_done(self, logged: LoggedRun) -> None:
        if logged.whole:
            with self._ledger.open("a", encoding="utf-8") as file:
                file.write(f"{logged.run_id}\n")

    def done(self) -> set[str]:
        """Return the ids of the runs that are whole, from this start and those before."""
        return (
            set(self._ledger.read_text(encoding="utf-8").split())
            if self._ledger.exists()
            else set()
        )


def _synced_file(folder: Path, run_id: str) -> Path:
    """Return the file by which `wandb sync` knows that a run has been sent."""
    return _log_file(folder, run_id).with_suffix(".wandb.synced")


def _log_file(folder: Path, run_id: str) -> Path:
    return folder / f"run-{run_id}.wandb"


def _went_wrong(folder: Path) -> bool:
    """Say whether W&B's process has logged an error; those of artifacts are nowhere else."""
    with contextlib.suppress(OSError):
        return '"level":"ERROR' in (folder / "logs" / "debug-internal.log").read_text(
            encoding="utf-8"
        )
    return False


def _ignore_stop() -> None:
    log.warning("a run was stopped in W&B: training goes on; Ctrl-C stops it, resumable")


def _set_up() -> None:
    """Start W&B's process where it is not, without the settings of another run."""
    from wandb.sdk import wandb_setup

    with own_surroundings():
        # `wandb.setup` starts it under a lock that its report of a failed start waits for
        wandb_setup._setup(wandb.Settings(silent=True), start_service=False).ensure_service()
    atexit.register(_forget_ended)  # before W&B's own, which fails where its process has ended
    if threading.excepthook is not _log_of_wandb:
        threading.excepthook, _HOOKS["before"] = _log_of_wandb, threading.excepthook


def _log_of_wandb(fault: threading.ExceptHookArgs) -> None:
    """Log what ends a thread of W&B's, which have no one to tell that their process was killed."""
    frames = traceback.walk_tb(fault.exc_traceback)
    if any(str(frame.f_globals.get("__name__")).startswith("wandb.") for frame, _ in frames):
        log.debug("a thread of W&B has ended: %r", fault.exc_value)
    else:
        _HOOKS["before"](fault)


def _service_process() -> Any:
    """Return W&B's process; None where it was not started by this one."""
    from wandb.sdk import wandb_setup

    with contextlib.suppress(Exception):
        return wandb_setup.singleton().assert_service()._proc._process
    return None


def _has_ended(process: Any, *, seconds: float = 0.0) -> bool:
    """Return whether a process ends within some seconds, as one does that was killed."""
    if process is None:
        return False
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _forget_ended() -> None:
    if _has_ended(_service_process()):
        _end_service()


def _end_service() -> None:
    """End W&B's process, which waits for a host that does not answer; its files are complete."""
    with contextlib.suppress(Exception):
        _service_process().kill()
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
