"""Cached teacher logits on disk: computed once for each view of each image, read by all students.

A store is a folder `<root>/<teacher>/<data>/` with a `manifest.json` and one file a shard, such as
`view_003/shard_00002.safetensors`. Shards are written atomically, and verified by their hash when
they are first read. Batches are gathered from memory-mapped files, so that their cost and memory do
not grow with the store; small views are packed into one array.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import REST_TEMPERATURES, SparseLogits, rest_mass
from selfkd.soft_targets.manifest import (
    DEFAULT_SHARD,
    Manifest,
    check_same,
    index_bytes,
    load_manifest,
    manifest_path,
    save_manifest,
    shard_path,
)
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import fetch, retry_io

PACK_LIMIT = 64 * 2**20
"""Largest number of bytes of packed views that an open store holds in memory."""

ShardState = Literal["absent", "whole", "damaged"]
_GRID = "rest_grid"
_MAPS = 16_384  # files mapped at a time; Linux allows a process 65,530 mappings
_CHECKED: set[tuple[object, ...]] = set()  # identities of verified shards


def write_shard(
    root: Path,
    manifest: Manifest,
    *,
    view: int,
    shard: int,
    logits: Tensor | Iterable[Tensor],
) -> Path:
    """Write a teacher's logits for the images of one shard and view, with the manifest.

    Half precision is enough: the softmax is invariant to a shift of a row, so each row is shifted
    to a largest logit of 0, near which half precision is finest, but for those of an `exact`
    manifest, which are kept in single precision as they are. With `top_k`, the log-sum-exp of
    the other logits at 7 temperatures is written as well, in single precision. With `samples`,
    classes are drawn from the softmax at T = 1 and written alone, as 16-bit numbers where these
    are enough; the draws depend on teacher, data, view and image only, so that a shard that is
    made again has the same bits.

    Args:
        root: Folder of all stores.
        manifest: Manifest of the store.
        view: Number of the view, in [0, views).
        shard: Number of the shard, in [0, shards).
        logits: Teacher logits `[rows, classes]` of the images `manifest.rows(shard)`, on any
            device, or batches of them one after the other, of which one at a time is held.

    Returns:
        File of the shard.

    Raises:
        ValueError: A logit is not finite, or an argument does not fit the manifest.
        OSError: The file cannot be written; a previous shard is unchanged.
    """
    rows = _check_position(manifest, view, shard)
    batches = [logits] if isinstance(logits, Tensor) else logits
    layout = _layout(manifest, shard).items()
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout}
    done = 0
    for batch in batches:
        shape = [done + count for count in batch.shape[:1]] + list(batch.shape[1:])
        _check_shape(shape, manifest, range(len(rows) + 1))
        start, end = rows.start + done, rows.start + shape[0]
        for name, tensor in _encode(batch.detach(), manifest, view, range(start, end)).items():
            tensors[name][done : shape[0]] = tensor
        done = shape[0]
    _check_shape([done, manifest.classes], manifest, range(len(rows), len(rows) + 1))
    save_manifest(root, manifest)
    path = shard_path(root, manifest, view=view, shard=shard)
    save_tensors(path, tensors, _facts(manifest, view, shard))
    return path


def check_shard(root: Path, manifest: Manifest, *, view: int, shard: int) -> ShardState:
    """Read a shard and return its state.

    A shard that is not listed in the manifest on disk is absent; where that manifest is damaged,
    the shard is.

    Args:
        root: Folder of all stores.
        manifest: Expected manifest of the store.
        view: Number of the view, in [0, views).
        shard: Number of the shard, in [0, shards).

    Returns:
        `absent`, `whole` or `damaged`.

    Raises:
        ValueError: The store has other images, classes or shard size than `manifest`.
    """
    _check_position(manifest, view, shard)
    try:
        stored = load_manifest(root, manifest.teacher, manifest.data)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "damaged"
    check_same(root, stored, manifest)
    if view >= stored.views:
        return "absent"
    path = shard_path(root, manifest, view=view, shard=shard)
    try:
        _check_file(path, manifest, view, shard)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "damaged"
    return "whole"


def write_sparse(root: Path, manifest: Manifest, *, shard: int, sparse: SparseLogits) -> None:
    """Write the largest logits of the first rows of a shard, without its manifest.

    Args:
        root: Folder of all stores.
        manifest: Manifest of the store, with `top_k`, which the caller saves last.
        shard: Number of the shard.
        sparse: Logits of its rows, shifted to a largest one of 0; `rest_grid` may be None.
    """
    dtypes = {name: dtype for name, (dtype, _) in _layout(manifest, shard).items()}
    tensors = {
        name: tensor.to(dtypes[name])
        for name, tensor in sparse._asdict().items()
        if tensor is not None
    }
    path = shard_path(root, manifest, view=0, shard=shard)
    save_tensors(path, tensors, _facts(manifest, 0, shard))


class SoftTargets:
    """Cached logits of one or more teachers, gathered by image index.

    Created by `open_store`. A view whose rows of all members take at most `PACK_LIMIT` bytes is
    packed into one array at its first use; the oldest packed views make room. Rows of larger views
    are read from memory-mapped files. Both give the same bits.

    Args:
        root: Folder of all stores.
        manifests: Manifest of each member.
        weights: Weights of the members in the mean of their logits, or in the mean of the
            probabilities that their samples are of, with sum 1; None to keep the members' logits
            separate.
    """

    def __init__(
        self, root: Path, manifests: Sequence[Manifest], *, weights: Sequence[float] | None
    ) -> None:
        self._root = root
        self._manifests = list(manifests)
        self.samples = manifests[0].samples
        self._weights = weights if self.samples is None else None
        self._mixture = weights if self.samples is not None else None
        self._shards: dict[tuple[int, int, int], dict[str, NDArray[Any]]] = {}
        self._packed: dict[int, dict[str, NDArray[Any]] | None] = {}
        self.images = manifests[0].images
        self.classes = manifests[0].classes
        self.views = min(manifest.views for manifest in manifests)
        self.members = len(manifests)
        self.shifted = not all(manifest.exact for manifest in manifests)
        self.origin = manifests[0].origin

    def __call__(self, index: Tensor, view: int) -> Tensor | SparseLogits | SampledTargets:
        """Return the cached logits for one view of some images.

        Args:
            index: Indices of the images, int64 `[batch]`, on any device.
            view: Number of the view, in [0, views).

        Returns:
            On the CPU: logits `[batch, classes]`, float16 of one teacher (float32 of an `exact`
            store) or float32 of the mean of several; `[members, batch, classes]` of members kept
            separate, in the dtype of one. With `top_k`,
            `SparseLogits` with the same leading dimensions, without `rest_grid` where a shard of
            these images lacks it. With `samples`, `SampledTargets` `[batch, samples]`; those of
            all members together, `[batch, members x samples]`, are of the mean of their
            probabilities.

        Raises:
            IndexError: An index is out of range.
            TypeError: An index that is no tensor, or a view that is no integer.
            ValueError: The view is out of range, or a shard is damaged.
            FileNotFoundError: A shard has not been written.
        """
        view = operator.index(view)  # of a tensor too, whose hash is that of the object
        rows = self._rows(index, view)
        if view not in self._packed:
            self._pack(view)
        packed = self._packed[view]
        if packed is None:
            found = self._gather(view, rows)
        else:
            found = {name: array.take(rows, axis=0) for name, array in packed.items()}
        if self.members > 1 and self._weights is None:
            found = {name: array.swapaxes(0, 1) for name, array in found.items()}
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        if "logits" in tensors:
            return tensors["logits"]
        if self.samples is not None:
            return self._sampled(tensors["indices"].long())
        return SparseLogits(**tensors | {"indices": tensors["indices"].long()})

    def _sampled(self, indices: Tensor) -> SampledTargets:
        """Return the samples of all members, `[members, batch, samples]` of several, together."""
        if self.members == 1:
            return SampledTargets(indices)
        weights = self._mixture
        kept = [number for number in range(self.members) if weights is None or weights[number]]
        together = torch.cat([indices[number] for number in kept], dim=-1)
        if weights is None:
            return SampledTargets(together)
        each = torch.tensor([weights[number] / len(indices[0, 0]) for number in kept])
        each = each.repeat_interleave(indices.shape[-1])
        return SampledTargets(together, each.expand_as(together))

    def _rows(self, index: Tensor, view: int) -> NDArray[np.int64]:
        if not 0 <= view < self.views:
            raise ValueError(f"view must be in [0, {self.views}), got {view}")
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be a tensor, int64 [batch], got {type(index).__name__}")
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"index must be int64 [batch], got {index.dtype} {list(index.shape)}")
        rows: NDArray[np.int64] = index.cpu().numpy()
        if len(rows) and rows.view(np.uint64).max() >= self.images:  # negative ones become huge
            wrong = rows[(rows < 0) | (rows >= self.images)][0]
            raise IndexError(f"index must be in [0, {self.images}), got {wrong}")
        return rows

    def _pack(self, view: int) -> None:
        """Pack a view, or mark it as too large."""
        first = self._gather(view, np.zeros(1, np.int64))
        size = self.images * sum(array.nbytes for array in first.values())
        if size > PACK_LIMIT:
            self._packed[view] = None
            return
        packed_views = [number for number, arrays in self._packed.items() if arrays is not None]
        for oldest in packed_views[: max(0, len(packed_views) + 1 - PACK_LIMIT // size)]:
            del self._packed[oldest]
        packed = {
            name: np.empty((self.images, *array.shape[1:]), array.dtype)
            for name, array in first.items()
        }
        for start in range(0, self.images, DEFAULT_SHARD):
            rows = np.arange(start, min(start + DEFAULT_SHARD, self.images))
            found = self._gather(view, rows)
            packed = {name: array for name, array in packed.items() if name in found}
            for name, array in packed.items():
                array[rows[0] : rows[-1] + 1] = found[name]
        self._packed[view] = packed
        self._shards = {key: arrays for key, arrays in self._shards.items() if key[1] != view}

    def _gather(self, view: int, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Read rows from mapped shards: `[batch, …]`, or `[batch, members, …]` of several."""
        order = rows.argsort()
        ordered = rows[order]
        sizes = {manifest.shard_size for manifest in self._manifests}
        pieces = {size: _pieces(ordered, size) for size in sizes}
        found = {
            name: torch.empty((self.members, len(rows), *shape[1:]), dtype=dtype).numpy()
            for name, (dtype, shape) in _layout(self._manifests[0], 0).items()
        }
        for member, manifest in enumerate(self._manifests):
            for shard, piece, local in pieces[manifest.shard_size]:
                arrays = self._shard(member, view, shard)
                found = {name: array for name, array in found.items() if name in arrays}
                for name, array in found.items():
                    # mode="raise" would copy to a buffer; the rows are checked
                    arrays[name].take(local, axis=0, out=array[member, piece], mode="clip")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        if self._weights is not None:
            mean = _weighted_sum(self._weights, torch.from_numpy(found["logits"]))
            return {"logits": mean.numpy().take(place, axis=0)}
        if self.members == 1:
            return {name: array[0].take(place, axis=0) for name, array in found.items()}
        return {name: array.take(place, axis=1).swapaxes(0, 1) for name, array in found.items()}

    def _shard(self, member: int, view: int, shard: int) -> dict[str, NDArray[Any]]:
        key = (member, view, shard)
        if key not in self._shards:
            if len(self._shards) >= _MAPS:
                self._shards.clear()
            self._shards[key] = _map_shard(self._root, self._manifests[member], view, shard)
        return self._shards[key]


def open_store(
    root: Path,
    teachers: Sequence[str],
    *,
    data: str,
    average: Literal["probabilities", "logits"] = "probabilities",
    weights: Sequence[float] | None = None,
) -> SoftTargets:
    """Open the cached logits of one or more teachers for the same images.

    Args:
        root: Folder of all stores.
        teachers: Hash of each teacher.
        data: `data_key` of the cached logits.
        average: `logits` to return the mean of the members' logits; `probabilities` to return
            the members' logits, whose probabilities the loss averages.
        weights: Weights of the members in the mean of their logits, or of what their samples are
            of, normalised to sum 1; equal when None. Ignored for logits with `probabilities`.

    Raises:
        FileNotFoundError: The logits of a teacher are not cached.
        ValueError: A manifest is damaged, the stores are of different data, a weight is negative,
            or logits with `top_k` or `samples` are to be averaged.
    """
    if not teachers:
        raise ValueError("teachers must be at least one hash, got none")
    shares = _shares(len(teachers), weights)
    manifests = [load_manifest(root, teacher, data) for teacher in teachers]
    for manifest in manifests[1:]:
        for name in ("images", "classes", "top_k", "samples", "exact"):
            here, first = getattr(manifest, name), getattr(manifests[0], name)
            if here != first:
                path = manifest_path(root, manifest.teacher, data)
                raise ValueError(
                    f"{path} must have {name} {first}, as {manifests[0].teacher} has, got {here}"
                )
    mean = average == "logits" and len(teachers) > 1
    if mean and manifests[0].top_k is not None:
        raise ValueError(
            "average must be probabilities where only top_k logits are cached, got logits: "
            "those of the other classes are unknown"
        )
    sampled = manifests[0].samples is not None
    if mean and sampled:
        raise ValueError(
            "average must be probabilities where only samples are cached, got logits: they are "
            "unknown"
        )
    weighted = mean or (sampled and weights is not None)
    return SoftTargets(root.absolute(), manifests, weights=shares if weighted else None)


def _check_position(manifest: Manifest, view: int, shard: int) -> range:
    if not 0 <= view < manifest.views:
        raise ValueError(f"view must be in [0, {manifest.views}), got {view}")
    return manifest.rows(shard)


def _facts(manifest: Manifest, view: int, shard: int) -> dict[str, Any]:
    return {"teacher": manifest.teacher, "data": manifest.data, "view": view, "shard": shard}


def _check_shape(found: list[int], manifest: Manifest, rows: range) -> None:
    if len(found) != 2 or found[0] not in rows or found[1] != manifest.classes:
        raise ValueError(f"logits must be [{rows[-1]}, {manifest.classes}], got {found}")


def _encode(logits: Tensor, manifest: Manifest, view: int, rows: range) -> dict[str, Tensor]:
    """Return what is cached of the logits of images of a view."""
    wrong = (~torch.isfinite(logits)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"teacher logits must be finite, got {float(logits[row, column])} "
            f"in row {rows.start + row}"
        )
    if manifest.exact:
        return {"logits": logits.float()}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = wide - wide.amax(dim=1, keepdim=True)
    shifted = shifted.clamp(min=torch.finfo(torch.float16).min)
    if manifest.samples is not None:
        return {"indices": _sample(shifted, manifest, view, rows)}
    if manifest.top_k is None:
        return {"logits": shifted}
    indices = wide.topk(
        manifest.top_k, dim=1
    ).indices  # of the given logits, as clamping makes ties
    values = shifted.gather(1, indices)
    rest, grid = rest_mass(shifted, indices)
    return {"values": values, "indices": indices, "rest": rest, _GRID: grid}


def _sample(shifted: Tensor, manifest: Manifest, view: int, rows: range) -> Tensor:
    """Draw classes `[rows, samples]` of images from the softmax of their logits."""
    cumulative = shifted.double().exp_().cumsum(dim=1)
    uniform = draws(manifest, view, rows).to(shifted.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def draws(manifest: Manifest, view: int, rows: range) -> Tensor:
    """Return uniform random numbers of images `[rows, samples]`, in [0, 1), float64.

    Those of an image are the same whatever the batch and the shard: of a counter-based generator
    whose key is the hash of teacher, data and view, and whose counter is the image.

    Args:
        manifest: Manifest of a store with `samples`.
        view: Number of the view.
        rows: Images.
    """
    samples = manifest.samples or 0
    name = f"{manifest.teacher}/{manifest.data}/{view}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    blocks = -(-samples // 4)  # of 4 numbers
    generator = np.random.Philox(key=key, counter=rows.start * blocks)
    drawn = generator.random_raw(len(rows) * blocks * 4).reshape(len(rows), -1)[:, :samples]
    return torch.from_numpy((drawn >> 12) * 2.0**-52)  # times the total of a row, below it


def _layout(manifest: Manifest, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of a shard."""
    rows = len(manifest.rows(shard))
    integer = torch.uint16 if index_bytes(manifest.classes) == 2 else torch.int32
    if manifest.samples is not None:
        return {"indices": (integer, (rows, manifest.samples))}
    if manifest.top_k is None:
        dtype = torch.float32 if manifest.exact else torch.float16
        return {"logits": (dtype, (rows, manifest.classes))}
    return {
        "values": (torch.float16, (rows, manifest.top_k)),
        "indices": (integer, (rows, manifest.top_k)),
        "rest": (torch.float32, (rows,)),
        _GRID: (torch.float32, (rows, len(REST_TEMPERATURES))),
    }


def _check_file(path: Path, manifest: Manifest, view: int, shard: int) -> None:
    """Read and verify a shard; raise a ValueError that names the file where it is damaged."""
    if not retry_io(path, path.exists):
        raise FileNotFoundError(f"no such shard: {path}: the teacher logits are not cached")
    tensors, facts = load_tensors(path)
    expected = _facts(manifest, view, shard)
    found = {key: facts.get(key) for key in expected}
    if found != expected:
        raise ValueError(f"{path} must hold {expected}, got {found}: remove it and resume")
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = _layout(manifest, shard)
    if _GRID in wanted and _GRID not in layout:  # exact at T = 1 only
        del wanted[_GRID]
    if layout != wanted:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path} does not fit its manifest, got {shapes}: remove it and resume")
    if "indices" in tensors:
        indices = tensors["indices"].numpy()  # torch compares no unsigned numbers
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= manifest.classes:
            raise ValueError(
                f"{path} must have indices in [0, {manifest.classes}), got {low} to {high}: "
                "remove it and resume"
            )


def _map_shard(root: Path, manifest: Manifest, view: int, shard: int) -> dict[str, NDArray[Any]]:
    """Map a shard; verify it unless this process has done so."""
    path = shard_path(root, manifest, view=view, shard=shard)
    exists = retry_io(path, path.exists)
    path = fetch(path) if exists else path
    stat = path.stat() if exists else None
    sizes = (
        *(manifest.images, manifest.classes, manifest.shard_size),
        *(manifest.top_k, manifest.samples),
    )
    identity = (path, stat and stat.st_size, stat and stat.st_mtime_ns, sizes)
    if identity not in _CHECKED:
        # by a mapping of its own, so that the pages it reads are released
        _check_file(path, manifest, view, shard)
        _CHECKED.add(identity)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118


def _pieces(ordered: NDArray[np.int64], size: int) -> list[tuple[int, slice, NDArray[np.int64]]]:
    """Split ascending rows by shard: its number, their slice, and their positions in the shard."""
    shards = ordered // size
    cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ordered)]
    pieces = []
    for start, end in pairwise(cuts):
        if start < end:
            shard = int(shards[start])
            pieces.append((shard, slice(start, end), ordered[start:end] - shard * size))
    return pieces


def _weighted_sum(weights: Sequence[float], logits: Tensor) -> Tensor:
    """Sum the members in float32, one by one, so that the bits do not depend on the batch size."""
    total = logits[0].float() * weights[0]
    for weight, member_logits in zip(weights[1:], logits[1:], strict=True):
        total += member_logits.float() * weight
    return total


def _shares(members: int, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1 / members] * members
    if len(weights) != members:
        raise ValueError(f"weights must be one a teacher, {members}, got {len(weights)}")
    total = sum(weights)
    if not (0 < total < float("inf") and min(weights) >= 0):
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    return [weight / total for weight in weights]
