"""Atomic files, local or remote, with retries while the storage fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from selfkd.errors import ConfigError
from selfkd.storage.remote import RemotePath

if TYPE_CHECKING:
    from tenacity import RetryCallState


def _seconds(text: str) -> float:
    """Return a number of seconds; NaN for what is none."""
    try:
        return float(text) if 0 <= float(text) <= sys.float_info.max else math.nan
    except ValueError:
        return math.nan


PATIENCE = _seconds(os.environ.get("SELFKD_PATIENCE", "120"))
"""Seconds to retry for while the storage is full, read-only or unreachable."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors of a full disk, or quota."""
_TRANSIENT = {
    *(*NO_ROOM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ENOTCONN),
}
_PERMANENT = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds
LARGEST_TEXT = 64 * 2**20
"""Largest number of bytes of a text file that is read."""
_DEEPEST = 32  # levels of nesting of a JSON file
_DIGITS = 20  # of a whole number of 64 bits
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # names given by `replace`

_run_folders: list[Path] = []

log = logging.getLogger(__name__)
T = TypeVar("T")


def make_no_folder_again(run: Path | None) -> None:
    """Let this process write to a run folder only while it is there: half a run helps nobody.

    Args:
        run: Run folder at work, with its `run_id`; None where none is any more.
    """
    _run_folders[:] = [] if run is None or isinstance(run, RemotePath) else [run]


def replace(path: Path, write: Callable[[str], object], *, patience: float | None = None) -> None:
    """Write a file atomically; retry while the storage is full or unreachable.

    Args:
        path: File to create or replace; its folder is created.
        write: Function that writes to the local file whose name it is given.
        patience: Seconds to retry for; `PATIENCE` when not given.

    Raises:
        ConfigError: The environment variable SELFKD_PATIENCE is no time.
        OSError: The file cannot be written; a previous file of that name is unchanged.
    """
    if math.isnan(PATIENCE):  # said at the first file of a run, not where this module is imported
        given = os.environ.get("SELFKD_PATIENCE")
        raise ConfigError(f"SELFKD_PATIENCE must be seconds, 0 or more, got {given!r}")
    retry_io(path, lambda: _replace(path, write), patience=patience)


def _replace(path: Path, write: Callable[[str], object]) -> None:
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="selfkd-") as folder:
            temporary = Path(folder) / path.name
            write(str(temporary))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.upload(temporary)
        return
    for run in _run_folders:
        if path.is_relative_to(run) and not (run / "run_id").exists():
            raise FileNotFoundError(errno.ENOENT, "the run folder was removed or moved", str(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(str(temporary))
        _set_mode(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _names_another(error, temporary):
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
        raise


def _names_another(error: OSError, temporary: Path) -> bool:
    """Whether an error does not name the file that was to be written, but could."""
    unnamed = error.filename in (None, str(temporary)) or error.errno in _TRANSIENT
    return unnamed and error.errno is not None


def _set_mode(file: Path, mode: int) -> None:
    """Give a new file the mode of any other: safetensors makes it readable by its owner only.

    A file with a second name is somebody's own, and a share may refuse.
    """
    with contextlib.suppress(OSError):
        found = file.stat()
        if found.st_nlink == 1 and found.st_mode != mode:
            file.chmod(mode)


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
    default = 0.0 if math.isnan(PATIENCE) else PATIENCE  # what only reads need not be refused
    patience = default if patience is None else patience
    try:
        return work()
    except OSError as error:
        if not _is_transient(path, error):
            raise
        first = [error]
    # imported where storage has failed: it is read on machines that have little but torch, too
    from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_exponential

    def again() -> T:
        if first:
            raise first.pop()
        return work()

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error: object = state.outcome.exception()
            if isinstance(error, OSError) and error.errno is not None:
                error = f"[Errno {error.errno}] {error.strerror}"  # without the file's name
            log.warning("%s: %s: trying again for %.0f s", path, error, patience)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: _is_transient(path, error)),
        wait=wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
        stop=stop_before_delay(patience),
        before_sleep=warn,
        reraise=True,
    )
    return retrying(again)


def _is_transient(path: Path, error: BaseException) -> bool:
    if not isinstance(error, OSError):
        return False
    if isinstance(path, RemotePath):  # pyarrow reports network failures without an errno
        permanent = isinstance(error, FileNotFoundError | PermissionError)
        return not permanent and not any(text in str(error) for text in _PERMANENT)
    return error.errno in _TRANSIENT


def fetch(path: Path) -> Path:
    """Return a local path with the same content: the path itself, or a copy of a remote file.

    Copies are cached in `cache_folder()` by URI, size and time.

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


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    with fetch(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the folder of local copies, created readable by the user alone.

    It is that of SELFKD_CACHE, else selfkd in XDG_CACHE_HOME, else ~/.cache/selfkd.
    """
    given, usual = os.environ.get("SELFKD_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    base = Path(usual) if os.path.isabs(usual) else Path.home() / ".cache"
    folder = Path(given) if given else base / "selfkd"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def save_text(path: Path, text: str, *, patience: float | None = None) -> None:
    """Write a text file atomically."""
    content = text.encode()
    replace(path, lambda temporary: Path(temporary).write_bytes(content), patience=patience)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, whatever the locale.

    Args:
        path: Regular file of at most `LARGEST_TEXT` bytes.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, too large, or a pipe or device; the message names it.
    """

    content = retry_io(path, lambda: _read(path))
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"{path} must have at most {LARGEST_TEXT:,} bytes, and has more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None


def _read(path: Path) -> bytes:
    if isinstance(path, RemotePath):
        return path.read_bytes(LARGEST_TEXT + 1)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} must be a file, and is a folder, pipe or device")
    with open(path, "rb") as file:
        return file.read(LARGEST_TEXT + 1)


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, nested too deeply, or has a number beyond 64 bits; the
            message names it.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None


def parse_json(text: str) -> Any:
    """Parse JSON whose numbers fit 64 bits, and which is nested at most 32 levels deep.

    Raises:
        ValueError: The text is no such JSON.

    >>> parse_json("[1e400]")
    Traceback (most recent call last):
    ValueError: numbers must fit 64 bits, got 1e400
    """
    try:
        value = json.loads(text, parse_float=_fits, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any, left: int = _DEEPEST) -> None:
    """Check that plain data are not nested so deeply that their readers would fail.

    Args:
        value: Plain data.
        left: Number of levels that they may have.

    Raises:
        ValueError: They have more.
    """
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        if isinstance(part, dict | list):
            if not left:
                raise ValueError("nested too deeply")
            check_depth(part, left - 1)


def _fits(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"numbers must fit 64 bits, got {text[:20]}")
    return number


def _whole(text: str) -> int:
    if len(text) > _DIGITS or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"numbers must fit 64 bits, got {text[:20]}")
    return int(text)


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
            os.link(os.path.realpath(source), temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    if isinstance(target, RemotePath):
        replace(target, lambda temporary: shutil.copyfile(source, temporary))
    elif isinstance(source, RemotePath):
        replace(target, lambda temporary: source.download(Path(temporary)))
    else:
        replace(target, write)


def remove_file(path: Path) -> None:
    """Remove a file where it exists; transient storage errors are retried.

    Raises:
        OSError: The error is permanent, or lasted too long.
    """
    retry_io(path, lambda: path.unlink(missing_ok=True))


def remove_tree(folder: Path) -> None:
    """Remove a folder with its contents, but nothing that a symlink leads to."""
    if isinstance(folder, RemotePath):
        retry_io(folder, folder.remove_tree)
    else:
        retry_io(folder, lambda: shutil.rmtree(folder))


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name that `replace` gives to what is being written."""
    return _TEMPORARY.fullmatch(path.name) is not None


def temporaries(folder: Path) -> Iterator[Path]:
    """Yield the temporary files of running or killed writers in a folder of this machine."""
    for place, _, names in os.walk(folder):
        yield from filter(is_temporary, (Path(place, name) for name in names))


def odd_entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what a folder of this machine holds besides its own files and folders.

    Args:
        folder: Folder that is looked through, with all folders in it.

    Yields:
        Path, and what it is: a symlink that leads out of the folder, or a pipe or device.
    """
    whole = os.path.realpath(folder)
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                real = os.path.realpath(entry.path) if entry.is_symlink() else None
                if real is not None and not Path(real).is_relative_to(whole):
                    yield Path(entry.path), f"a symlink to {real}"
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file() and os.path.exists(entry.path) and not entry.is_dir():
                    yield Path(entry.path), "a pipe or device"


def inside(folder: Path, name: str) -> Path:
    """Return the file of a name that was read from a folder's own files.

    Args:
        folder: Folder that the file must be in.
        name: Relative path of the file; it and every symlink on it stay within the folder.

    Raises:
        ValueError: The name leads out of the folder.

    >>> inside(Path("run"), "a/../b").as_posix()
    'run/b'
    >>> inside(Path("run"), "../../.netrc")
    Traceback (most recent call last):
    ValueError: ../../.netrc must be a file within run
    """
    path = folder / os.path.normpath(name)
    outside = os.path.isabs(name) or "://" in name or ".." in path.parts[len(folder.parts) :]
    if not outside and not isinstance(path, RemotePath):
        outside = not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if outside or "\0" in name:
        raise ValueError(f"{name} must be a file within {folder}")
    return path
