"""Start of Ray on this machine, on loopback only, and the ways to leave it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from selfkd.errors import ConfigError, RayLostError
from selfkd.execution.ray_private import (
    kill_started,
    on_loopback,
    own_handlers,
    say_no_deaths,
    session_name,
    sockets_fit,
    temporary_folder,
    usual_of_ray,
)
from selfkd.storage.temporary import TemporaryFolder, sweep

TUNE_SECONDS = 10.0  # limit for Tune to end its trials
LEAST_BYTES = 2**20  # that Ray's logs need, at the very least
_SHORT = "/tmp"  # noqa: S108 - where RAY_TMPDIR is not set and TMPDIR is too long
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def abandon(*, leave: bool, lost: bool) -> None:
    """Leave Ray after an interrupt or its death.

    Args:
        leave: Whether this process ends now.
        lost: Whether Ray has died.
    """
    if leave or lost:
        kill_started(everything=leave)
    if leave:
        return
    if lost:  # Ray would end the process of a Python caller after a minute of looking for it
        threading.Thread(target=ray.shutdown, name="shutdown", daemon=True).start()
    else:
        for thread in threading.enumerate():
            if thread.name == "tune":  # its calls of a Ray that is shut down would crash
                thread.join(timeout=TUNE_SECONDS)
        ray.shutdown()


class Session:
    """Session of a Ray that is started here: its name, and its folder, removed if this is killed.

    Raises:
        ConfigError: Ray's temporary folder cannot be used.
    """

    def __init__(self) -> None:
        self.name = session_name()
        self.temporary: str | None = None
        """Ray's temporary folder, where it is not the usual one."""
        usual = temporary_folder()
        short = Path(os.environ.get("RAY_TMPDIR") or _SHORT).absolute()
        try:
            if sockets_fit(usual):
                sweep(usual, "session_*")
                self.folder = TemporaryFolder(path=usual / self.name)
                if usual_of_ray() != str(usual):
                    self.temporary = str(usual)
            elif sockets_fit(short / "selfkd-ray-00000000"):  # TMPDIR of a batch system
                self.folder = TemporaryFolder("selfkd-ray-", parent=short)
                self.temporary = str(self.folder.path)
            else:
                raise ConfigError(
                    f"RAY_TMPDIR must be short, as Ray's sockets lie in it, got {short}: "
                    "set it to a short folder on this machine, or unset it"
                )
            _check_space(self.folder)
        except OSError as error:
            raise ConfigError(
                f"Ray's folder for temporary files must be writable, got {usual} "
                f"({error.strerror or error}): set RAY_TMPDIR to a short one on this machine"
            ) from None


def _check_space(folder: TemporaryFolder) -> None:
    """Write a file, as Ray waits half a minute for one of its own where the disk is full."""
    try:
        with tempfile.TemporaryFile(dir=folder.path) as file:
            file.write(bytes(LEAST_BYTES))
    except OSError:
        folder.remove()
        raise


def _have_token() -> None:
    """Set a token of this process where Ray cannot write one to the user's home."""
    known = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(
        map(os.environ.get, known)
    ):
        return
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _object_folder(session: Session) -> str | None:
    """Return the folder of Ray's objects, where its own is not there or cannot be written to."""
    if not _SHARED_MEMORY.parent.is_dir() or os.access(_SHARED_MEMORY, os.W_OK):
        return None
    return str(session.folder.path)


def start(session: Session | None, *, verbose: bool, address: str | None) -> None:
    """Start Ray, or join a cluster.

    Args:
        session: Session of a Ray that is started on this machine; None to join a cluster.
        verbose: Whether Ray and its workers may print.
        address: Address of the cluster.

    Raises:
        RayLostError: Ray did not start.
    """
    printed: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }
    if not verbose:
        say_no_deaths()
    try:
        with own_handlers():
            if session is None:
                ray.init(**printed)
                return
            _have_token()
            with on_loopback(session.name, whole=verbose):
                ray.init(
                    address="local",
                    include_dashboard=verbose,
                    _temp_dir=session.temporary,
                    _plasma_directory=_object_folder(session),
                    **printed,
                )
    except Exception as error:
        raise RayLostError(start_message(str(error) or type(error).__name__, address)) from error


def start_message(reason: str, address: str | None) -> str:
    """Return why Ray did not start, and the way out.

    Args:
        reason: What went wrong.
        address: Address of the cluster that was to be joined.
    """
    reason = " ".join(reason.split())[:500]
    if address is not None:
        return f"the Ray cluster at {address} could not be joined: {reason}"
    free = []
    for folder in (_SHARED_MEMORY, temporary_folder().parent):
        with contextlib.suppress(OSError):
            free.append(f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB in {folder}")
    return (
        f"Ray did not start on this machine: {reason}\n"
        f"It needs memory (ulimit -v), files (ulimit -n), processes (ulimit -u), space (free are "
        f"{', '.join(free)}) and a machine that is not too busy: free some, set RAY_TMPDIR to a "
        "short folder with space, or try again later; --verbose shows what Ray prints"
    )
