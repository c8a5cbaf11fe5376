"""Temporary folders whose owner can be seen to live, so that what a killed one left is removed."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_HELD = ".selfkd-held"
_PATTERN = "selfkd-*"
_ATTEMPTS, _PAUSE = 5, 0.1  # at removing a folder that ending processes still write to


_held: dict[Path, TemporaryFolder] = {}


def remove_all() -> None:
    """Remove all temporary folders of this process, which ends, and of those that it has ended."""
    parents = {folder.path.parent for folder in _held.values()}
    for folder in list(_held.values()):
        folder.remove()
    for parent in {*parents, Path(tempfile.tempdir or tempfile.gettempdir())}:
        sweep(parent, _PATTERN)


class TemporaryFolder:
    """Temporary folder of this process; also a context manager, which removes it.

    The process holds a lock (flock) on a file in the folder. The system releases it when the
    process ends, however that is, so that a later process removes what a killed one has left.

    Args:
        prefix: Beginning of its name; others of the same that nobody holds are removed.
        parent: Folder that it is created in; the one for temporary files when not given.
        path: Folder that is created instead.
    """

    def __init__(
        self, prefix: str = "selfkd-", *, parent: Path | None = None, path: Path | None = None
    ) -> None:
        if path is None:
            parent = parent or Path(tempfile.gettempdir())
            sweep(parent, f"{prefix}*")
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        else:
            path.mkdir(parents=True)
        self.path = path
        self._lock = os.open(path / f"{_HELD}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # without locks the folder is left if this is killed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(path / f"{_HELD}.new", path / _HELD)
        _held[path] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder; `sweep` removes what ending processes still write to it."""
        if _held.pop(self.path, None) is not None:
            _remove(self.path)
            os.close(self._lock)


def sweep(parent: Path, pattern: str) -> None:
    """Remove the temporary folders of processes that have ended, of this user and by this module.

    Args:
        parent: Folder that they lie in.
        pattern: Pattern of their names.
    """
    with contextlib.suppress(OSError):
        for path in parent.glob(pattern):
            with contextlib.suppress(OSError):
                _remove_dead(path)


def _remove_dead(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    lock = os.open(path / _HELD, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
            _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a folder, its lock last, so that a part that is left is removed by `sweep`."""
    for attempt in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            for child in path.iterdir():
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child, ignore_errors=True)
                elif child.name != _HELD:
                    child.unlink(missing_ok=True)
            if [child.name for child in path.iterdir()] in ([], [_HELD]):
                (path / _HELD).unlink(missing_ok=True)
                path.rmdir()
        if not path.exists():
            return
        if attempt < _ATTEMPTS - 1:
            time.sleep(_PAUSE)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Let all temporary files of this process lie in one folder, which is removed at the end."""
    folder = TemporaryFolder()
    try:
        with _files_in(folder):
            yield
    finally:
        folder.remove()
        sweep(folder.path.parent, _PATTERN)


def import_with_files(*modules: str, prefix: str = "selfkd-") -> None:
    """Import modules that make temporary files; they lie in one folder to the process' end.

    A process that is killed, as a worker of Ray is, would leave them for ever.

    Args:
        modules: Names of the modules, such as that of W&B, which timm imports; one that is not
            there, as in another version, is left out.
        prefix: Beginning of the folder's name.
    """
    folder = TemporaryFolder(prefix)
    atexit.register(folder.remove)
    with _files_in(folder):
        for module in modules:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)


@contextmanager
def _files_in(folder: TemporaryFolder) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(folder.path)
    try:
        yield
    finally:
        tempfile.tempdir = before
