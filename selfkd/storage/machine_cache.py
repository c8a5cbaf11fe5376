"""Files that the processes of a machine share: what is dear to make is made once, under a lock.

They lie in a folder that the user alone can write to, and nothing read from it is run. What cannot
be kept, for want of room or of rights, is made by each process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfkd.errors import ConfigError
from selfkd.storage.files import cache_folder, is_temporary, parse_json, replace

log = logging.getLogger(__name__)
Pixels = NDArray[np.uint8]

FOLDER = "images"
"""Name of the folder in `cache_folder()`."""
DEFAULT_GB = 20.0
"""Gigabytes that all files have together at most, unless SELFKD_CACHE_GB says otherwise."""
_SHARE = 0.5  # of the free bytes of the disk, which one more file takes at most
_PAGE = 4096  # bytes before the values
_LOCKS = 16  # files that are locked; names share them
_SECONDS = 60.0  # after which what a killed writer has left is removed


class _OutdatedError(Exception):
    """What was made is not what its name says."""


def cached_array(
    name: str,
    shape: Sequence[int],
    make: Callable[[], Iterable[Pixels]],
    is_valid: Callable[[], bool] = lambda: True,
) -> Pixels | str:
    """Return an array from its file, which is made where it is not there or is damaged.

    One process makes it while others wait. It is mapped into memory, which all of them share; what
    is written to the array stays with this process.

    Args:
        name: Hash of all that the values depend on, in hexadecimal digits.
        shape: Shape of the array, of one row at least.
        make: Function to the rows in order, in arrays of several; an error of it other than an
            OSError is raised.
        is_valid: Function that says, after they are made, whether the name is still true.

    Returns:
        The array, uint8; or why it cannot be kept, in words, empty where it is not to be.
    """
    size = _PAGE + math.prod(shape)
    try:
        limit = _limit()
        if size > limit:
            return ""
        folder = _folder()
        path = folder / f"{name}.u8"
        found = _mapped(path, shape)  # first without the lock, which a maker holds for long
        if found is None:
            with _locked(folder, name):
                found = _mapped(path, shape)
                if found is None:
                    _make_room(folder, size, limit)
                    replace(path, lambda file: _write(file, shape, make, is_valid), patience=0)
                    found = _mapped(path, shape)
    except _OutdatedError:
        return ""
    except OSError as error:
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return "its file cannot be read again" if found is None else found


def load_kept(name: str) -> Any:
    """Return what `save_kept` has kept under a name; None where there is nothing, or it is damaged.

    Args:
        name: Hash of what it is of, in hexadecimal digits.
    """
    try:
        if not _limit():
            return None
        with open(_opened(_folder() / f"{name}.json"), encoding="utf-8") as file:
            return parse_json(file.read())
    except (OSError, ValueError):
        return None


def save_kept(name: str, value: Any) -> None:
    """Keep plain data under a name, for other processes of this machine; or do not, where it fails.

    Args:
        name: Hash of what it is of, in hexadecimal digits.
        value: Plain data.
    """
    content = json.dumps(value).encode()
    with contextlib.suppress(OSError):
        limit = _limit()
        if len(content) <= limit:
            folder = _folder()
            _make_room(folder, len(content), limit)
            path = folder / f"{name}.json"
            replace(path, lambda file: Path(file).write_bytes(content), patience=0)


def _limit() -> float:
    """Return how many bytes all files may have together.

    Raises:
        ConfigError: The environment variable is no number.
    """
    given = os.environ.get("SELFKD_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ConfigError(f"SELFKD_CACHE_GB must be gigabytes, 0 or more, got {given!r}")
    return limit * 1e9


def _folder() -> Path:
    """Return the folder of the files, where it is this user's alone to write to.

    Raises:
        OSError: It cannot be made, or others can write to it.
    """
    try:
        parent = cache_folder()
    except RuntimeError as error:
        raise OSError(f"there is no home folder ({error}): set SELFKD_CACHE") from None
    folder = parent / FOLDER
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    for place, found in ((parent, parent.stat()), (folder, folder.lstat())):
        if not stat.S_ISDIR(found.st_mode):
            raise OSError(f"{place} must be a folder, and is a link or file")
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise OSError(
                f"{place} must be this user's alone to write to: chmod 700, or set "
                "SELFKD_CACHE to another folder"
            )
    return folder


def _opened(path: Path) -> int:
    """Open a file of this user's to read it.

    Raises:
        OSError: It is not there, a link, or of another user.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        os.close(file)
        raise OSError(f"{path} must be a file of this user's")
    return file


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    path = folder / f"lock-{int(name, 16) % _LOCKS:x}"
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:  # which is said once of all files
        raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say_waiting(folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@cache
def _say_waiting(folder: Path) -> None:
    log.warning("waiting for another process, which decodes images for %s", folder)


def _mapped(path: Path, shape: Sequence[int]) -> Pixels | None:
    """Map a file of values into memory; None where there is none, or it is damaged."""
    try:
        file = _opened(path)
    except FileNotFoundError:
        return None
    try:
        # held as long as the map is, so that the file of a run at work is not removed
        fcntl.flock(file, fcntl.LOCK_SH)
        size = math.prod(shape)
        header = os.pread(file, _PAGE, 0)
        if os.fstat(file).st_size != _PAGE + size:
            return None
        facts = json.loads(header)
        whole = mmap.mmap(file, _PAGE + size, access=mmap.ACCESS_COPY)
        if facts != {"shape": list(shape), "crc32": zlib.crc32(memoryview(whole)[_PAGE:])}:
            return None
        with contextlib.suppress(OSError):  # of a disk that can only be read
            os.utime(file)  # those that were not used for longest are removed first
        return np.frombuffer(whole, np.uint8, offset=_PAGE).reshape(shape)
    except ValueError:  # no JSON
        return None
    finally:
        os.close(file)


def _write(
    path: str,
    shape: Sequence[int],
    make: Callable[[], Iterable[Pixels]],
    is_valid: Callable[[], bool],
) -> None:
    checksum = 0
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(_PAGE)
        for rows in make():
            values = np.ascontiguousarray(rows).reshape(-1).data
            checksum = zlib.crc32(values, checksum)
            file.write(values)
        if not is_valid():
            raise _OutdatedError
        file.seek(0)
        file.write(json.dumps({"shape": list(shape), "crc32": checksum}).encode().ljust(_PAGE))


def _make_room(folder: Path, size: int, limit: float) -> None:
    """Remove the files that were not used for longest, none that is in use, until one more fits.

    Raises:
        OSError: It does not fit all the same.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process has renamed or removed it
                continue
            left = is_temporary(Path(entry.name)) and time.time() - facts.st_mtime > _SECONDS
            if left or entry.name.endswith((".u8", ".json")):
                found.append((not left, facts.st_mtime, facts.st_size, entry.path, left))
    total = sum(kept for *_, kept, _, _ in found)
    for _, _, kept, path, left in sorted(found):
        fits = total + size <= limit and size <= _SHARE * shutil.disk_usage(folder).free
        if (left or not fits) and _remove(path):
            total -= kept
    free = shutil.disk_usage(folder).free
    if total + size > limit or size > _SHARE * free:
        raise OSError(
            f"{folder} has no room for {size / 1e9:.2g} GB more: {total / 1e9:.2g} of "
            f"{limit / 1e9:g} GB are in use (SELFKD_CACHE_GB), {free / 1e9:.3g} GB are free"
        )


def _remove(path: str) -> bool:
    """Remove a file that no process has mapped, and say whether it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
