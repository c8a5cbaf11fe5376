"""Manifest and paths of a store of cached teacher logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from selfkd.storage.files import load_json, retry_io, save_json

DEFAULT_SHARD = 16_384
"""Images a shard, by default."""
SHARD_BYTES = 64 * 2**20
"""Bytes of a shard, which one process holds while it is made."""
MOST = 2**40
"""Largest number of anything that a manifest counts."""
_VERSION = 1


def data_key(
    fingerprint: str,
    recipe: Mapping[str, Any],
    *,
    top_k: int | None = None,
    samples: int | None = None,
) -> str:
    """Return the key of cached logits: a hash of the images, their views, `top_k` and `samples`.

    Args:
        fingerprint: Hash of the images.
        recipe: JSON data that determines their augmented views.
        top_k: Number of largest logits cached of an image; all when None.
        samples: Number of classes sampled for an image in place of logits; none when None.

    >>> data_key("abc", {"jitter": 2}) == data_key("abc", {"jitter": 2}, top_k=5)
    False
    """
    forms = {"top_k": top_k, "samples": samples}
    given = [{name: value} for name, value in forms.items() if value is not None]
    parts = [fingerprint, dict(recipe), *given]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rows_of_shard(most: int, row_bytes: int, *, multiple: int = 1) -> int:
    """Return the number of images a shard, which is held in memory while it is made.

    Args:
        most: Number of images that is wanted at most.
        row_bytes: Number of bytes of an image in a view.
        multiple: Number of images that shards have whole multiples of.

    >>> rows_of_shard(16_384, 2 * 151_936, multiple=64)
    192
    """
    rows = min(most, SHARD_BYTES // row_bytes)
    return max(rows // multiple, 1) * multiple


def row_bytes(
    classes: int, *, top_k: int | None = None, samples: int | None = None, exact: bool = False
) -> int:
    """Return the number of bytes of an image in a view.

    Args:
        classes: Number of classes.
        top_k: Number of largest logits cached of an image; all when None.
        samples: Number of classes sampled for an image in place of logits; none when None.
        exact: Whether all logits are kept in single precision.

    >>> row_bytes(1024), row_bytes(1024, top_k=32), row_bytes(1024, samples=8)
    (2048, 156, 16)
    """
    if samples is not None:
        return samples * index_bytes(classes)
    if top_k is not None:  # with the mass of the rest at 7 temperatures
        return top_k * (2 + index_bytes(classes)) + 4 * 7
    return classes * (4 if exact else 2)


def index_bytes(classes: int) -> int:
    """Return the number of bytes of the number of a class: 2 where 16 bits are enough, else 4."""
    return 2 if classes <= 2**16 else 4


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
    """`data_key` of fingerprint, recipe, top_k and samples."""
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
    samples: int | None = None
    """Number of classes sampled for an image from the softmax at T = 1, in place of logits."""
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
        if self.samples is not None and (type(self.samples) is not int or self.samples < 1):
            raise ValueError(
                f"samples must be an integer of at least 1 or none, got {self.samples!r}"
            )
        if self.samples is not None and self.top_k is not None:
            raise ValueError(f"samples must be none where there is top_k, got {self.samples}")
        if type(self.exact) is not bool:
            raise ValueError(f"exact must be true or false, got {self.exact!r}")
        for name in ("top_k", "samples"):
            if self.exact and getattr(self, name) is not None:
                raise ValueError(f"exact must be false where there is {name}, got {self.exact!r}")
        key = data_key(self.fingerprint, self.recipe, top_k=self.top_k, samples=self.samples)
        if self.data != key:
            raise ValueError(
                f"data must be {key}, the key of fingerprint, recipe, top_k and samples, got "
                f"{self.data}"
            )

    @property
    def shards(self) -> int:
        """Number of shards of a view."""
        return -(-self.images // self.shard_size)

    @property
    def row_bytes(self) -> int:
        """Number of bytes of an image in a view."""
        return row_bytes(self.classes, top_k=self.top_k, samples=self.samples, exact=self.exact)

    @property
    def words(self) -> str:
        """What is cached of an image, in words."""
        if self.samples is not None:
            return f"{self.samples:,} samples at T = 1"
        if self.top_k is not None:
            return f"the {self.top_k:,} largest of {self.classes:,} logits"
        return f"{self.classes:,} logits"

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
