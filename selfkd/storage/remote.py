"""Paths in storage that is no folder of this machine: any file system that pyarrow knows."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/+")
_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]+:/+[^/[]*:(?!\d+(/|$))", re.IGNORECASE)  # a port is none
PLAIN_URI = (
    "must have no user:password@ in its URI, which would be written to files and logs: the "
    "environment gives it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or the machine's own role"
)
_WHOLE_OBJECTS = ("s3", "gcs", "abfs")  # where an upload is seen whole or not at all
_CHUNK = 2**22


def as_path(text: str | Path) -> Path:
    """Return the path that a user or a ledger wrote: a local one, or a URI such as `s3://a/b`.

    Raises:
        ValueError: the URI has a password in it.

    >>> as_path("s3://bucket/runs") / "a", as_path("runs").name
    (RemotePath('s3://bucket/runs/a'), 'runs')
    """
    if has_password(str(text)):
        raise ValueError(f"a path {PLAIN_URI}")
    return RemotePath(text) if _REMOTE.match(str(text)) else Path(text)


def has_password(text: str) -> bool:
    """Say whether a URI has a password before its host, or what is no host with a port.

    >>> has_password("s3://key:secret@bucket/a"), has_password("hdfs://user@host:8020/a:b@c")
    (True, False)
    """
    return _PASSWORD.match(text) is not None


class RemotePath(PosixPath):
    """A path of a pyarrow file system, with as much of `pathlib` as a run folder needs.

    Whatever else is asked of it ends in a TypeError, never in a local file of a strange name.
    """

    def __str__(self) -> str:
        scheme, rest = self.parts[:1], self.parts[1:]
        if scheme and scheme[0].endswith(":"):
            return f"{scheme[0]}//{'/'.join(rest)}"
        return "/".join(self.parts) or "."

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no local file: fetch it first")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (str(self),)

    @property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        scheme, bucket, *rest = self.parts
        system, root = _file_system(f"{scheme}//{bucket}")
        return system, posixpath.normpath(posixpath.join(root, *rest))

    def _info(self) -> Any:
        system, path = self._place
        return system.get_file_info(path)

    def absolute(self) -> RemotePath:
        """Return this path: a URI is absolute."""
        return self

    def expanduser(self) -> RemotePath:
        """Return this path: a URI has no home."""
        return self

    def is_file(self, **_: bool) -> bool:
        """Say whether there is such a file."""
        return bool(self._info().is_file)

    def is_dir(self, **_: bool) -> bool:
        """Say whether there is anything under this name."""
        return bool(self._info().type.name == "Directory")

    def exists(self, **_: bool) -> bool:
        """Say whether there is such a file, or anything under this name."""
        return bool(self._info().type.name != "NotFound")

    def stat(self, **_: bool) -> os.stat_result:
        """Return size and time of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(f"no such file: {self}")
        time = info.mtime.timestamp() if info.mtime else 0.0
        return os.stat_result((0, 0, 0, 0, 0, 0, info.size, time, time, time))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the folder where folders are things of their own."""
        system, path = self._place
        if system.type_name not in _WHOLE_OBJECTS:
            system.create_dir(path, recursive=True)

    def read_bytes(self) -> bytes:
        """Return what the file holds."""
        system, path = self._place
        with system.open_input_stream(path) as stream:
            return bytes(stream.read())

    def read_text(self, *_: Any, **__: Any) -> str:
        """Return what the file holds, as text."""
        return self.read_bytes().decode()

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Make an empty file."""
        system, path = self._place
        with system.open_output_stream(path):
            pass

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        system, path = self._place
        try:
            system.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rglob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield what is below this path and matches the pattern's last parts."""
        return (path for path, _ in self._below() if path.match(pattern))

    def glob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield what matches a pattern of single parts; one that ends in / wants folders."""
        depth = len(self.parts) + len(PurePosixPath(pattern).parts)
        for path, folder in self._below():
            if len(path.parts) == depth and path.match(pattern) and (folder or pattern[-1] != "/"):
                yield path

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield what is in this folder."""
        return (path for path, _ in self._below(recursive=False))

    def _below(self, *, recursive: bool = True) -> Iterator[tuple[RemotePath, bool]]:
        from pyarrow.fs import FileSelector

        system, path = self._place
        wanted = FileSelector(path, recursive=recursive, allow_not_found=True)
        for info in system.get_file_info(wanted):
            below = posixpath.relpath(info.path, path)
            yield self / below, info.type.name == "Directory"

    def upload(self, local: Path) -> None:
        """Put a local file here, seen whole or not at all."""
        system, path = self._place
        direct = system.type_name in _WHOLE_OBJECTS
        beside = path if direct else f"{posixpath.dirname(path)}/.{self.name}.{os.getpid()}"
        with open(local, "rb") as source, system.open_output_stream(beside) as stream:
            while chunk := source.read(_CHUNK):
                stream.write(chunk)
        if not direct:
            system.move(beside, path)

    def download(self, local: Path) -> None:
        """Write the file to a local one."""
        system, path = self._place
        with system.open_input_stream(path) as stream, open(local, "wb") as target:
            while chunk := stream.read(_CHUNK):
                target.write(chunk)

    def copy_to(self, target: RemotePath) -> None:
        """Copy the file within its file system."""
        system, path = self._place
        system.copy_file(path, target._place[1])

    def remove_tree(self) -> None:
        """Remove all that is below."""
        system, path = self._place
        system.delete_dir(path)


@lru_cache(maxsize=64)
def _file_system(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI's start, and the path that stands for it there."""
    import pyarrow
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"storage must be a folder, or a URI that pyarrow knows (s3://, gs://, abfs://, …), "
            f"got {uri}: {error}"
        ) from None
    return system, path
