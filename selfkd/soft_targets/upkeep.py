"""Upkeep of a folder of stores: what exists, which runs use it, what can be removed.

Stores are of cached logits, or of text that teachers have written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfkd.results import from_row
from selfkd.soft_targets.manifest import Manifest, load_manifest, store_path
from selfkd.storage.files import is_temporary, load_json, remove_file, retry_io, save_json
from selfkd.storage.remote import RemotePath, as_path

_DAY = 86_400.0  # seconds
_HASH = re.compile(r"[0-9a-f]{16}")
_OWN = re.compile(
    r"manifest\.json|tokens\.safetensors|used_by/\w+\.json|view_\d+/shard_\d+\.safetensors"
    r"|shard_\d+\.jsonl?"
)
_SHARD = re.compile(r"view_(\d+)/shard_(\d+)\.safetensors")
TEXT = "shard_*.jsonl"
"""Pattern of the files of text in a store."""
_UNKNOWN = "who uses the store is unknown"


@dataclass(frozen=True)
class StoreInfo:
    """State of a store on disk."""

    path: Path
    """Folder of the store."""
    manifest: Manifest | None
    """Manifest; None where it is damaged, and of text."""
    is_text: bool
    bytes: int
    """Size of all files in bytes."""
    present: int
    """Number of existing shards, not verified."""
    expected: int
    """Number of shards of all views; 0 without a manifest, the existing ones of text."""
    users: list[Path]
    """Existing run folders that use the store."""
    damaged: list[str]
    """What is wrong with its manifest and with its records of users."""
    leftovers: list[Path]
    """Temporary files of running or killed writers."""

    @property
    def unused(self) -> bool:
        """Whether it is whole, and no existing run uses it."""
        return not (self.users or self.damaged)


def remember_user(root: Path, teacher: str, data: str, run: Path) -> None:
    """Record that a run uses a store, before the store is written.

    Args:
        root: Folder of all stores.
        teacher: Hash of the teacher.
        data: `data_key` of the cached logits.
        run: Run folder.
    """
    run = run.absolute()
    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    path = store_path(root, teacher, data) / "used_by" / f"{name}.json"
    if not retry_io(path, path.exists):
        save_json(path, {"run": str(run)})


def list_stores(root: Path) -> list[StoreInfo]:
    """Return the stores of a folder, sorted by path."""
    return [_info(root, path) for path in _stores(root)]


def unused(root: Path) -> list[StoreInfo]:
    """Return the stores that no existing run uses."""
    return [info for info in list_stores(root) if info.unused]


def remove_store(path: Path) -> None:
    """Remove a store: the files that selfkd writes, and its folders where they are empty then.

    The manifest goes last, without which a folder is no store.
    """
    found = _files(path)
    for file in sorted(found, key=lambda file: file.name == "manifest.json"):
        if _OWN.fullmatch(file.relative_to(path).as_posix()) or is_temporary(file):
            remove_file(file)
    if not isinstance(path, RemotePath):
        for place, _, _ in sorted(os.walk(path), reverse=True):
            with contextlib.suppress(OSError):  # it has files of others
                os.rmdir(place)


def sweep(root: Path, *, seconds: float = _DAY) -> list[Path]:
    """Remove temporary files of killed writers; return the removed files.

    Args:
        root: Folder of all stores.
        seconds: Age from which files are removed; a day when not given.
    """
    removed = []
    for store in _stores(root):
        for path, (_, changed) in _files(store).items():
            if is_temporary(path) and time.time() - changed > seconds:
                remove_file(path)
                removed.append(path)
    return removed


def _stores(root: Path) -> Iterator[Path]:
    """Yield what may be the folders of stores, behind no symlink: their manifests tell."""
    for path in sorted(root.glob("*/*/")):
        local = not isinstance(path, RemotePath)
        if not _HASH.fullmatch(path.name) or (
            local and (path.is_symlink() or path.parent.is_symlink())
        ):
            continue
        logits = (path / "manifest.json").exists() or any(path.glob("view_*/"))
        if logits or any(path.glob(TEXT)):
            yield path


def _files(folder: Path) -> dict[Path, tuple[int, float]]:
    """Return size and modification time of all files, without those that vanish meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                stat = path.stat()
                found[path] = (stat.st_size, stat.st_mtime)
        except FileNotFoundError:
            continue
    return found


def _info(root: Path, path: Path) -> StoreInfo:
    files, damaged, manifest = _files(path), [], None
    texts = len(list(path.glob(TEXT)))
    is_text = texts > 0 and not (path / "manifest.json").exists()
    try:
        manifest = None if is_text else load_manifest(root, path.parent.name, path.name)
    except (FileNotFoundError, ValueError) as error:
        damaged.append(str(error).removesuffix(": remove it and resume"))
    matches = [_SHARD.fullmatch(file.relative_to(path).as_posix()) for file in files]
    shards = [(int(match[1]), int(match[2])) for match in matches if match]
    if manifest is not None:
        shards = [(v, s) for v, s in shards if v < manifest.views and s < manifest.shards]
    users, unknown = _users(root, path)
    return StoreInfo(
        path=path,
        manifest=manifest,
        bytes=sum(size for size, _ in files.values()),
        is_text=is_text,
        present=texts if is_text else len(shards),
        expected=texts if manifest is None else manifest.views * manifest.shards,
        users=users,
        damaged=damaged + unknown,
        leftovers=[file for file in files if is_temporary(file)],
    )


def _users(root: Path, path: Path) -> tuple[list[Path], list[str]]:
    """Return the existing runs that use a store, and why others may use it."""
    folder, users, unknown = path / "used_by", [], []
    local = not isinstance(path, RemotePath)
    if local and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        return [], [f"{folder} must be a folder, with the names of runs: {_UNKNOWN}"]
    for file in sorted(folder.glob("*")):
        if file.name.startswith("."):  # being written
            continue
        try:
            users += _user(root, file)
        except (OSError, ValueError) as error:
            unknown.append(str(error))
    return sorted(users), unknown


def _user(root: Path, file: Path) -> list[Path]:
    """Return the run that a record names; none where it is gone.

    Raises:
        ValueError: The record is damaged, or names a run that cannot be looked for from here.
    """
    try:
        run = as_path(from_row(dict[str, str], load_json(file))["run"])
        if not isinstance(run, RemotePath) and not run.is_absolute():
            raise ValueError(f"run must be an absolute path, got {run}")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): {_UNKNOWN}") from None
    if isinstance(run, RemotePath):
        if not isinstance(root, RemotePath):
            raise ValueError(f"{file} names {run}: whether that is there is not asked")
        return [run] if run.exists() else []
    try:
        run.stat()  # unlike `exists`, which finds nothing where it may not look
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} names a run that cannot be looked for ({error})") from None
    return [run]
