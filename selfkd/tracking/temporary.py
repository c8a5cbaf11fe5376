"""W&B's temporary folders, which a killed process leaves: removed by the next one."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "selfkd-wandb-"
LOCK = "lock"
"""File of a folder that its process has locked for as long as it lives."""
_MAKERS = ("wandb", "wandb.sdk.artifacts.artifact", "wandb.sdk.data_types._private")


def import_wandb() -> None:
    """Import W&B with its temporary folders in one of this process's own."""
    if "wandb" in sys.modules:
        return
    with contextlib.suppress(OSError):
        remove_left()
    with _own_folder():
        for name in _MAKERS:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Let temporary folders be made in a new one, which ends with the process."""
    before = tempfile.tempdir
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / f".{LOCK}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / f".{LOCK}").rename(folder / LOCK)  # which is never seen without its owner's lock
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def remove_left() -> None:
    """Remove such folders of this user's whose process has ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
