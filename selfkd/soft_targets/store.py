"""Cached teacher logits on disk: computed once for each view of each image, read by all students.

A store is a folder `<root>/<teacher>/<data>/` with a `manifest.json` and one file a shard, such as
`view_003/shard_00002.safetensors`. Shards are written atomically, and verified by their hash when
they are first read. Batches are gathered from memory-mapped files, so that their cost and memory do
not grow with the store; small views are packed into one array.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.manifest import (
    DEFAULT_SHARD,
    Manifest,
    load_manifest,
    manifest_path,
)
from selfkd.soft_targets.shards import map_shard, shard_layout

PACK_LIMIT = 64 * 2**20
"""Largest number of bytes of packed views that an open store holds in memory."""

_MAPS = 16_384  # files mapped at a time; Linux allows a process 65,530 mappings


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

    def view_logits(self, view: int) -> Tensor | None:
        """Return the logits of all images under a view, if they are packed: not to be changed.

        Args:
            view: Number of the view.

        Returns:
            Logits `[images, classes]`, or `[members, images, classes]` of members kept separate, as
            a call returns them of a batch; None of larger views and of the k largest logits.
        """
        first = self(torch.zeros(1, dtype=torch.int64), view)
        packed = self._packed[view]
        if packed is None or not isinstance(first, Tensor):
            return None
        logits = torch.from_numpy(packed["logits"])
        return logits.transpose(0, 1) if first.ndim == 3 else logits

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
            for name, (dtype, shape) in shard_layout(self._manifests[0], 0).items()
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
            self._shards[key] = map_shard(self._root, self._manifests[member], view, shard)
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
