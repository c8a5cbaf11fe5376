"""Cached logits of a training split and of a transfer set, by one index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.store import SoftTargets, open_store

Rows = Tensor | SparseLogits | SampledTargets
"""What is cached of rows."""


class OneView(Protocol):
    """Cached logits of one view at a time, such as `SoftTargets`."""

    shifted: bool
    samples: int | None

    def __call__(self, index: Tensor, view: int) -> Rows:
        """Return the cached logits of images."""


class JoinedTargets:
    """Cached logits of several sets of images, whose indices follow each other.

    Args:
        stores: Cached logits of each set, of the same teachers.
    """

    def __init__(self, stores: Sequence[SoftTargets]) -> None:
        self._stores = list(stores)
        self.shifted = any(store.shifted for store in stores)
        self.samples = stores[0].samples
        self.images = sum(store.images for store in stores)
        self.views = min(store.views for store in stores)

    def __call__(self, index: Tensor, view: int) -> Rows:
        """Return the cached logits for one view of some images; see `SoftTargets`.

        Args:
            index: Indices of the images, int64 `[batch]`: those of the second set begin with the
                number of images of the first.
            view: Number of the view.
        """
        index, start = index.cpu(), 0
        found, places = list[Rows](), list[Tensor]()
        for number, store in enumerate(self._stores):
            own = index >= start
            if number + 1 < len(self._stores):
                own &= index < start + store.images
            place = own.nonzero()[:, 0]
            if len(place):
                found.append(store(index[place] - start, view))
                places.append(place)
            start += store.images
        if len(found) == 1:
            return found[0]
        return joined(found, torch.cat(places))


class EachView:
    """Cached logits of batches whose images have views of their own.

    Args:
        targets: Cached logits of one view at a time.
    """

    def __init__(self, targets: OneView) -> None:
        self._targets = targets
        self.shifted, self.samples = targets.shifted, targets.samples

    def __call__(self, index: Tensor, view: int | Tensor) -> Rows:
        """Return the cached logits of some images; see `SoftTargets`.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view, or of that of each image, int64 `[batch]`.
        """
        if not isinstance(view, Tensor):
            return self._targets(index, view)
        index, view = index.cpu(), view.cpu()
        numbers = sorted(set(view.tolist()))
        places = [(view == number).nonzero()[:, 0] for number in numbers]
        pairs = zip(places, numbers, strict=True)
        found = [self._targets(index[place], number) for place, number in pairs]
        return joined(found, torch.cat(places))


def open_joined(
    root: Path,
    teachers: Sequence[str],
    *,
    data: str,
    transfer: str | None,
    average: Literal["probabilities", "logits"] = "probabilities",
    weights: Sequence[float] | None = None,
) -> SoftTargets | JoinedTargets:
    """Open the cached logits of teachers for a training split, and for a transfer set behind it.

    Args:
        root: Folder of all stores.
        teachers: Hash of each teacher.
        data: Key of the cached logits of the training split.
        transfer: Key of those of the transfer set; None where there is none.
        average: What of several teachers is averaged, as of `open_store`.
        weights: Weights of the teachers.

    Raises:
        FileNotFoundError, ValueError: Same as `open_store`.
    """
    keys = [data] if transfer is None else [data, transfer]
    stores = [
        open_store(root, teachers, data=key, average=average, weights=weights) for key in keys
    ]
    return stores[0] if transfer is None else JoinedTargets(stores)


def joined(parts: Sequence[Rows], places: Tensor) -> Rows:
    """Return rows of cached logits at their places in a batch.

    Args:
        parts: Logits `[..., rows, classes]`, or what is cached of them, of one kind.
        places: Place of each row in the batch, int64.

    >>> joined([torch.zeros(1, 2), torch.ones(2, 2)], torch.tensor([1, 0, 2]))[:, 0]
    tensor([1., 0., 1.])
    """
    first = parts[0]
    like = first if isinstance(first, Tensor) else first[0]
    back, axis = places.argsort().to(like.device, non_blocking=True), like.ndim - 2

    def join(tensors: Sequence[Any]) -> Any:
        if not all(isinstance(tensor, Tensor) for tensor in tensors):  # known of some rows only
            return None
        whole = torch.cat(list(tensors), dim=axis)
        return whole.index_select(axis, back.to(whole.device, non_blocking=True))

    if isinstance(first, Tensor):
        found: Tensor = join(parts)
        return found
    fields = [join(together) for together in list(zip(*parts, strict=True))[:4]]
    if isinstance(first, SparseLogits):
        return SparseLogits(*fields)
    return SampledTargets(*fields[:3])
