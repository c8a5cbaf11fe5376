"""Paths in remote storage: any file system that pyarrow supports."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/+")
_PASSWORD = re.compile(  # not a port
    r"[a-z][a-z0-9+.-]+:/+[^/[]*(:|%3a)(?!\d+(/|$))", re.IGNORECASE
)
_NAMED = r"(?!(?:hdfs|viewfs|abfss?|file):)"  # the others have no names before @, but tokens
_TOKEN = re.compile(rf"{_NAMED}[a-z][a-z0-9+.-]+:/+[^/]*@", re.IGNORECASE)
_QUERY = re.compile(r"[a-z][a-z0-9+.-]+:/+[^?#]*[?#]", re.IGNORECASE)
_ENVIRONMENT = (
    "which would be written to files and logs: the environment gives it (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY), or the machine's own role"
)
PLAIN_URI = f"must have no user:password@ in its URI, {_ENVIRONMENT}"
_ATOMIC_UPLOADS = ("s3", "gcs", "abfs")  # type names of object stores
_CHUNK = 2**22


def as_path(text: str | Path) -> Path:
    """Return a `Path` for a local path, a `RemotePath` for a URI such as `s3://bucket/runs`.

    Args:
        text: Local path or URI.

    Raises:
        ValueError: The URI contains a password or a query.

    >>> as_path("s3://bucket/runs") / "a", as_path("runs").name
    (RemotePath('s3://bucket/runs/a'), 'runs')
    """
    if fault := secret_fault(str(text)):
        raise ValueError(f"a path {fault}")
    return RemotePath(text) if _REMOTE.match(str(text)) else Path(text)


def secret_fault(text: str) -> str | None:
    """Return why a path may carry a secret: `user:password@`, `token@`, a query or a fragment.

    >>> secret_fault("s3://bucket/a?secret_key=x").partition(",")[0]
    'must be a URI that has no query'
    >>> secret_fault("hdfs://user@host:8020/a:b@c")
    """
    if _PASSWORD.match(text) or _TOKEN.match(text):
        return PLAIN_URI
    if _QUERY.match(text):
        plain = re.split("[?#]", text)[0]
        return f"must be a URI that has no query, got {plain!r} with one, {_ENVIRONMENT}"
    return None


def without_secrets(text: str) -> str:
    """Return a text whose URIs have neither user:password nor query.

    >>> without_secrets("got s3://key:secret@bucket/a?token=x, and more")
    'got s3://…@bucket/a?…, and more'
    """
    begin, user = r"(?<![a-z0-9+.-])", r"[^/\s@'\"]*"
    secret = rf"{begin}([a-z][a-z0-9+.-]+:/+){user}(?::|%3a){user}@"
    text = re.sub(secret, r"\1…@", text, flags=re.I)
    text = re.sub(rf"{begin}{_NAMED}([a-z][a-z0-9+.-]+:/+){user}@", r"\1…@", text, flags=re.I)
    return re.sub(r"([a-z][a-z0-9+.-]+:/+[^\s?#'\"]*[?#])[^\s'\",;]+", r"\1…", text, flags=re.I)


class RemotePath(PosixPath):
    """Path in a pyarrow file system, with the methods of `pathlib` that a run folder needs.

    Other methods raise a TypeError rather than act on a local file of that name.
    """

    def __str__(self) -> str:
        scheme, rest = self.parts[:1], self.parts[1:]
        if scheme and scheme[0].endswith(":"):
            return f"{scheme[0]}//{'/'.join(rest)}"
        return "/".join(self.parts) or "."

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a local file: fetch it first")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (str(self),)

    @property
    def _location(self) -> tuple[Any, str]:
        """File system, and the path in it."""
        scheme, bucket, *rest = self.parts
        system, root = _file_system(f"{scheme}//{bucket}")
        return system, posixpath.normpath(posixpath.join(root, *rest))

    def _info(self) -> Any:
        system, path = self._location
        return system.get_file_info(path)

    def absolute(self) -> RemotePath:
        """Return this path, as a URI is absolute."""
        return self

    def expanduser(self) -> RemotePath:
        """Return this path, as a URI has no home folder."""
        return self

    def is_file(self, **_: bool) -> bool:
        """Return whether the path is a file."""
        return bool(self._info().is_file)

    def is_dir(self, **_: bool) -> bool:
        """Return whether the path is a folder, or a prefix of other files."""
        return bool(self._info().type.name == "Directory")

    def exists(self, **_: bool) -> bool:
        """Return whether the path is a file, a folder, or a prefix of other files."""
        return bool(self._info().type.name != "NotFound")

    def stat(self, **_: bool) -> os.stat_result:
        """Return size and modification time of a file; the other fields are 0.

        Raises:
            FileNotFoundError: The file does not exist.
        """
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(f"no such file: {self}")
        time = info.mtime.timestamp() if info.mtime else 0.0
        return os.stat_result((0, 0, 0, 0, 0, 0, info.size, time, time, time))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Create the folder, where the file system has folders."""
        system, path = self._location
        if system.type_name not in _ATOMIC_UPLOADS:
            system.create_dir(path, recursive=True)

    def read_bytes(self, most: int | None = None) -> bytes:
        """Return the content of the file, or its first bytes."""
        system, path = self._location
        with system.open_input_stream(path) as stream:
            return bytes(stream.read(most))

    def read_text(self, *_: Any, **__: Any) -> str:
        """Return the content of the file as text in UTF-8."""
        return self.read_bytes().decode()

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Create an empty file."""
        system, path = self._location
        with system.open_output_stream(path):
            pass

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file.

        Raises:
            FileNotFoundError: The file does not exist, and `missing_ok` is false.
        """
        system, path = self._location
        try:
            system.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rglob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield all files and folders below this path whose last parts match the pattern."""
        return (path for path, _ in self._below() if path.match(pattern))

    def glob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield matches of a pattern without `**`; one that ends in / matches folders only."""
        depth = len(self.parts) + len(PurePosixPath(pattern).parts)
        for path, folder in self._below():
            if len(path.parts) == depth and path.match(pattern) and (folder or pattern[-1] != "/"):
                yield path

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield the files and folders of this folder."""
        return (path for path, _ in self._below(recursive=False))

    def _below(self, *, recursive: bool = True) -> Iterator[tuple[RemotePath, bool]]:
        from pyarrow.fs import FileSelector

        system, path = self._location
        wanted = FileSelector(path, recursive=recursive, allow_not_found=True)
        for info in system.get_file_info(wanted):
            below = posixpath.relpath(info.path, path)
            yield self / below, info.type.name == "Directory"

    def upload(self, local: Path) -> None:
        """Copy a local file to this path, atomically."""
        system, path = self._location
        atomic = system.type_name in _ATOMIC_UPLOADS
        temporary = path if atomic else f"{posixpath.dirname(path)}/.{self.name}.{os.getpid()}"
        with open(local, "rb") as source, system.open_output_stream(temporary) as stream:
            while chunk := source.read(_CHUNK):
                stream.write(chunk)
        if not atomic:
            system.move(temporary, path)

    def download(self, local: Path) -> None:
        """Copy the file to a local path."""
        system, path = self._location
        with system.open_input_stream(path) as stream, open(local, "wb") as target:
            while chunk := stream.read(_CHUNK):
                target.write(chunk)

    def copy_to(self, target: RemotePath) -> None:
        """Copy the file to another path of the same file system."""
        system, path = self._location
        system.copy_file(path, target._location[1])

    def remove_tree(self) -> None:
        """Remove the folder with its contents."""
        system, path = self._location
        system.delete_dir(path)


@lru_cache(maxsize=64)
def _file_system(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI's scheme and host, and the root path in it."""
    import pyarrow
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"storage must be a folder, or a URI that pyarrow supports (s3://, gs://, abfs://, …), "
            f"got {uri}: {error}"
        ) from None
    return system, path
