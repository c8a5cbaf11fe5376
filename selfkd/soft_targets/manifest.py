"""Manifest and paths of a store of cached teacher logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from selfkd.results.fields import MOST
from selfkd.storage.files import load_json, retry_io, save_json

DEFAULT_SHARD = 16_384
"""Images a shard, by default."""
_VERSION = 1


def data_key(fingerprint: str, recipe: Mapping[str, Any], *, top_k: int | None = None) -> str:
    """Return the key of cached logits: a hash of the images, their views and `top_k`.

    Args:
        fingerprint: Hash of the images.
        recipe: JSON data that determines their augmented views.
        top_k: Number of largest logits cached of an image; all when None.

    >>> data_key("abc", {"jitter": 2}) == data_key("abc", {"jitter": 2}, top_k=5)
    False
    """
    parts = [fingerprint, dict(recipe), *([] if top_k is None else [{"top_k": top_k}])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a store: the logits of one teacher for the views of one data set.

    >>> recipe = {"flip": True}
    >>> manifest = Manifest(
    ...     teacher="9f0c", data=data_key("abc", recipe), fingerprint="abc", recipe=recipe,
    ...     views=8, images=50_000, classes=10,
    ... )
    >>> manifest.shards, manifest.rows(3)
    (4, range(49152, 50000))
    """

    teacher: str
    """Hash of the teacher."""
    data: str
    """`data_key` of fingerprint, recipe and top_k."""
    fingerprint: str
    """Hash of the images."""
    recipe: dict[str, Any]
    """JSON data that determines the augmented views."""
    views: int
    """Number of views of each image."""
    images: int
    """Number of images."""
    classes: int
    """Number of classes."""
    top_k: int | None = None
    """Number of largest logits cached of an image; all when None."""
    exact: bool = False
    """Whether all logits are kept in single precision as they are, for losses without a softmax."""
    shard_size: int = DEFAULT_SHARD
    """Images a shard; the last shard may have fewer."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Checkpoint and config from which the teacher logits can be reproduced."""

    def __post_init__(self) -> None:
        for name in ("views", "images", "classes", "shard_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, kind in (("teacher", str), ("fingerprint", str), ("origin", dict)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if self.top_k is not None and type(self.top_k) is not int:
            raise ValueError(f"top_k must be an integer or none, got {self.top_k!r}")
        if self.top_k is not None and not 1 <= self.top_k < self.classes:
            raise ValueError(f"top_k must be in [1, {self.classes - 1}], got {self.top_k}")
        if type(self.exact) is not bool or (self.exact and self.top_k is not None):
            raise ValueError(f"exact must be false where there is top_k, got {self.exact!r}")
        key = data_key(self.fingerprint, self.recipe, top_k=self.top_k)
        if self.data != key:
            raise ValueError(
                f"data must be {key}, the key of fingerprint, recipe and top_k, got {self.data}"
            )

    @property
    def shards(self) -> int:
        """Number of shards of a view."""
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """Return the images of a shard.

        Args:
            shard: Number of the shard, in [0, shards).
        """
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard must be in [0, {self.shards}), got {shard}")
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.images))


def store_path(root: Path, teacher: str, data: str) -> Path:
    """Return the folder of a store."""
    return root / teacher / data


def shard_path(root: Path, manifest: Manifest, *, view: int, shard: int) -> Path:
    """Return the file of a shard."""
    folder = store_path(root, manifest.teacher, manifest.data)
    return folder / f"view_{view:03d}" / f"shard_{shard:05d}.safetensors"


def load_manifest(root: Path, teacher: str, data: str) -> Manifest:
    """Read the manifest of a store.

    Args:
        root: Folder of all stores.
        teacher: Hash of the teacher.
        data: `data_key` of the cached logits.

    Raises:
        FileNotFoundError: The store does not exist.
        ValueError: The manifest is damaged, or of another store; the message names it.
    """
    path = manifest_path(root, teacher, data)
    if not retry_io(path, path.exists):
        raise FileNotFoundError(f"no such store: {path.parent}: the teacher logits are not cached")
    tree = load_json(path)
    try:
        if (version := tree.pop("version")) != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {version}")
        manifest = Manifest(**tree)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
    if (manifest.teacher, manifest.data) != (teacher, data):
        raise ValueError(
            f"{path} must be of {teacher}/{data}, got {manifest.teacher}/{manifest.data}: "
            "remove it and resume"
        )
    return manifest


def save_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest of a store, before its shards are written.

    Views of an existing manifest are kept; a damaged manifest is replaced.

    Args:
        root: Folder of all stores.
        manifest: Manifest to write.

    Raises:
        ValueError: The store exists with other images, classes or shard size.
    """
    try:
        stored = load_manifest(root, manifest.teacher, manifest.data)
    except (FileNotFoundError, ValueError):
        stored = None
    if stored is not None:
        check_same(root, stored, manifest)
        manifest = replace(manifest, views=max(stored.views, manifest.views))
    if manifest != stored:
        path = manifest_path(root, manifest.teacher, manifest.data)
        save_json(path, {"version": _VERSION, **asdict(manifest)})


def manifest_path(root: Path, teacher: str, data: str) -> Path:
    """Return the file of a manifest."""
    return store_path(root, teacher, data) / "manifest.json"


def check_same(root: Path, stored: Manifest, manifest: Manifest) -> None:
    """Check that two manifests agree in their sizes.

    Raises:
        ValueError: They differ in images, classes or shard size.
    """
    for name in ("images", "classes", "shard_size", "exact"):
        there, here = getattr(stored, name), getattr(manifest, name)
        if there != here:
            path = manifest_path(root, stored.teacher, stored.data)
            raise ValueError(f"{name} must be {there}, as in {path}, got {here}")
