"""The stores of a folder: what is there, who uses it, what can go."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfkd.soft_targets.manifest import Manifest, load_manifest, store_path
from selfkd.storage.files import load_json, retry_io, save_json
from selfkd.storage.remote import as_path

_DAY = 86_400.0


_SHARD = re.compile(r"view_(\d+)/shard_(\d+)\.safetensors")


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # as selfkd.storage.files.replace names them


@dataclass(frozen=True)
class StoreInfo:
    """A store as it is found on disk."""

    path: Path
    manifest: Manifest | None
    """None where it is missing or damaged."""
    bytes: int
    """Of all its files."""
    present: int
    """Shards that are there, unchecked."""
    expected: int
    """Shards of all views; 0 without a manifest."""
    users: list[Path]
    """Run folders that asked for it and still exist."""
    leftovers: list[Path]
    """Temporary files, of writers at work or killed."""


def remember_user(root: Path, teacher: str, data: str, run: Path) -> None:
    """Note that a run uses a store; best before the store is written."""
    run = run.absolute()
    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    path = store_path(root, teacher, data) / "used_by" / f"{name}.json"
    if not retry_io(path, path.exists):
        save_json(path, {"run": str(run)})


def list_stores(root: Path) -> list[StoreInfo]:
    """Return what stores there are, by path."""
    return [_info(root, path) for path in _stores(root)]


def unused(root: Path) -> list[StoreInfo]:
    """Return the stores of which no user exists any more, or ever did."""
    return [info for info in list_stores(root) if not info.users]


def sweep(root: Path, *, seconds: float = _DAY) -> list[Path]:
    """Remove what killed writers left in stores, once it is so old; return what was removed."""
    removed = []
    for store in _stores(root):
        for path, (_, changed) in _files(store).items():
            if _TEMPORARY.fullmatch(path.name) and time.time() - changed > seconds:
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def _stores(root: Path) -> Iterator[Path]:
    for path in sorted(root.glob("*/*/")):
        if (path / "manifest.json").exists() or any(path.glob("view_*/")):
            yield path


def _files(folder: Path) -> dict[Path, tuple[int, float]]:
    """Return size and time of all files; those that vanish meanwhile are left out."""
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
    files = _files(path)
    try:
        manifest = load_manifest(root, path.parent.name, path.name)
    except (FileNotFoundError, ValueError):
        manifest = None
    matches = [_SHARD.fullmatch(file.relative_to(path).as_posix()) for file in files]
    places = [(int(match[1]), int(match[2])) for match in matches if match]
    if manifest is not None:
        views, shards = manifest.views, manifest.shards
        places = [(view, shard) for view, shard in places if view < views and shard < shards]
    records = [file for file in files if file.match("used_by/*.json")]
    runs = [as_path(load_json(file)["run"]) for file in records]
    return StoreInfo(
        path=path,
        manifest=manifest,
        bytes=sum(size for size, _ in files.values()),
        present=len(places),
        expected=0 if manifest is None else manifest.views * manifest.shards,
        users=sorted(run for run in runs if run.exists()),
        leftovers=[file for file in files if _TEMPORARY.fullmatch(file.name)],
    )
