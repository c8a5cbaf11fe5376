"""Files that are whole or absent, here or in remote storage; a storage that fails is waited for."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selfkd.storage.remote import RemotePath

PATIENCE = float(os.environ.get("SELFKD_PATIENCE", "120"))
"""Seconds that a storage which is full, read-only or away is waited for."""
_PASSING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ENOTCONN),
}
_FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH")
_LONGEST_PAUSE = 5.0

log = logging.getLogger(__name__)
T = TypeVar("T")


def replace(path: Path, write: Callable[[str], object], *, patience: float | None = None) -> None:
    """Write a file atomically; where the storage is full or away, again for a while.

    Args:
        path: file to make or replace; its folder is made.
        write: gets the name of a local file and writes it.
        patience: seconds to try for; `PATIENCE` when not given.

    Raises:
        OSError: it cannot be written, or not yet; nothing is left under its name.
    """
    retry_io(path, lambda: _replace(path, write), patience=patience)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="selfkd-") as folder:
            beside = Path(folder) / path.name
            write(str(beside))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.upload(beside)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(str(beside))
        beside.chmod(mode)  # tempfile and safetensors make files that only their owner can read
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def retry_io(path: Path, work: Callable[[], T], *, patience: float | None = None) -> T:
    """Return what `work` returns; what may pass, such as a full disk, is tried again for a while.

    Args:
        path: that is worked on, for the message.
        work: raises OSError where the storage fails.
        patience: seconds; `PATIENCE` when not given.
    """
    patience = PATIENCE if patience is None else patience
    end, pause = time.monotonic() + patience, 0.1
    while True:
        try:
            return work()
        except OSError as error:
            if not _may_pass(path, error) or time.monotonic() + pause > end:
                raise
            if pause == 0.1:
                log.warning("%s: %s: trying again for %.0f s", path, error, patience)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _may_pass(path: Path, error: OSError) -> bool:
    if isinstance(path, RemotePath):  # pyarrow tells of a failing network without a number
        final = isinstance(error, FileNotFoundError | PermissionError)
        return not final and not any(text in str(error) for text in _FINAL)
    return error.errno in _PASSING


def fetch(path: Path) -> Path:
    """Return a local file with the content: the path itself, or a copy of a remote one.

    Copies are kept in SELFKD_CACHE (`~/.cache/selfkd` by default), by address, size and time.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not isinstance(path, RemotePath):
        return path
    stat = retry_io(path, path.stat)
    mark = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime}".encode()).hexdigest()[:32]
    copy = cache_folder() / mark / path.name
    if not copy.exists():
        retry_io(path, lambda: replace(copy, lambda beside: path.download(Path(beside))))
    return copy


def cache_folder() -> Path:
    """Return the folder of local copies; its files are the user's alone."""
    given = os.environ.get("SELFKD_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "selfkd"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_text(path: Path, text: str, *, patience: float | None = None) -> None:
    """Write a text file atomically."""
    replace(path, lambda beside: Path(beside).write_text(text), patience=patience)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is damaged; names it.
    """
    try:
        return json.loads(retry_io(path, path.read_text))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None


def link(source: Path, target: Path) -> None:
    """Let a file stand in a second place, whole or not at all, at no cost where links work."""
    if isinstance(source, RemotePath) and isinstance(target, RemotePath):
        retry_io(target, lambda: source.copy_to(target))
        return

    def write(beside: str) -> None:
        os.unlink(beside)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)

    if isinstance(target, RemotePath):
        replace(target, lambda beside: shutil.copyfile(source, beside))
    elif isinstance(source, RemotePath):
        replace(target, lambda beside: source.download(Path(beside)))
    else:
        replace(target, write)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)
