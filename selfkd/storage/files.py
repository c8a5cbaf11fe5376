"""Atomic files, local or remote, with retries while the storage fails."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_exponential,
)

from selfkd.storage.remote import RemotePath

PATIENCE = float(os.environ.get("SELFKD_PATIENCE", "120"))
"""Seconds to retry for while the storage is full, read-only or unreachable."""
_TRANSIENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ENOTCONN),
}
_PERMANENT = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds

log = logging.getLogger(__name__)
T = TypeVar("T")


def replace(path: Path, write: Callable[[str], object], *, patience: float | None = None) -> None:
    """Write a file atomically; retry while the storage is full or unreachable.

    Args:
        path: File to create or replace; its folder is created.
        write: Function that writes to the local file whose name it is given.
        patience: Seconds to retry for; `PATIENCE` when not given.

    Raises:
        OSError: The file cannot be written; a previous file of that name is unchanged.
    """
    retry_io(path, lambda: _replace(path, write), patience=patience)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="selfkd-") as folder:
            temporary = Path(folder) / path.name
            write(str(temporary))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.upload(temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # tempfile and safetensors create files readable by their owner only
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def retry_io(path: Path, work: Callable[[], T], *, patience: float | None = None) -> T:
    """Return the result of `work`; transient storage errors, such as a full disk, are retried.

    Args:
        path: Path that `work` reads or writes; named in the warning, and decides by its kind which
            errors are transient.
        work: Function that raises OSError where the storage fails.
        patience: Seconds to retry for, with pauses of 0.1 s doubling to 5 s; `PATIENCE` when not
            given.

    Raises:
        OSError: The error is permanent, or lasted longer than `patience`.
    """
    patience = PATIENCE if patience is None else patience

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            log.warning("%s: %s: trying again for %.0f s", path, error, patience)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: _is_transient(path, error)),
        wait=wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
        stop=stop_before_delay(patience),
        before_sleep=warn,
        reraise=True,
    )
    return retrying(work)


def _is_transient(path: Path, error: BaseException) -> bool:
    if not isinstance(error, OSError):
        return False
    if isinstance(path, RemotePath):  # pyarrow reports network failures without an errno
        permanent = isinstance(error, FileNotFoundError | PermissionError)
        return not permanent and not any(text in str(error) for text in _PERMANENT)
    return error.errno in _TRANSIENT


def fetch(path: Path) -> Path:
    """Return a local path with the same content: the path itself, or a copy of a remote file.

    Copies are cached in SELFKD_CACHE (`~/.cache/selfkd` by default) by URI, size and time.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if not isinstance(path, RemotePath):
        return path
    stat = retry_io(path, path.stat)
    digest = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime}".encode()).hexdigest()[:32]
    copy = cache_folder() / digest / path.name
    if not copy.exists():
        retry_io(path, lambda: replace(copy, lambda temporary: path.download(Path(temporary))))
    return copy


def cache_folder() -> Path:
    """Return the folder of local copies, created readable by the user alone."""
    given = os.environ.get("SELFKD_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "selfkd"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_text(path: Path, text: str, *, patience: float | None = None) -> None:
    """Write a text file atomically."""
    replace(path, lambda temporary: Path(temporary).write_text(text), patience=patience)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged; the message names it.
    """
    try:
        return json.loads(retry_io(path, path.read_text))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None


def link(source: Path, target: Path) -> None:
    """Create a second path to a file, atomically: a hard link where possible, else a copy.

    Args:
        source: Existing file, local or remote.
        target: Path of the link or copy, local or remote.
    """
    if isinstance(source, RemotePath) and isinstance(target, RemotePath):
        retry_io(target, lambda: source.copy_to(target))
        return

    def write(temporary: str) -> None:
        os.unlink(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    if isinstance(target, RemotePath):
        replace(target, lambda temporary: shutil.copyfile(source, temporary))
    elif isinstance(source, RemotePath):
        replace(target, lambda temporary: source.download(Path(temporary)))
    else:
        replace(target, write)


def remove_tree(folder: Path) -> None:
    """Remove a folder with its contents."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)
