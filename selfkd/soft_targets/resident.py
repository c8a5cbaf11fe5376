"""Cached logits that stay on a GPU where they are small, so that a batch is read without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from selfkd.soft_targets.joined import JoinedTargets, Rows
from selfkd.soft_targets.store import SoftTargets

SHARE = 16
"""Cached logits are kept on a GPU that has this many times their bytes free: several trials may
share it, each with a copy."""
_ROWS = 16_384  # rows that are copied at a time


class ResidentTargets:
    """Cached logits on a GPU, view by view as they are read; the same bits as of the store.

    Args:
        stored: Cached logits of which all fit.
        device: Device that they are kept on.
    """

    def __init__(self, stored: SoftTargets | JoinedTargets, device: torch.device) -> None:
        self._stored, self._device = stored, device
        self._views: dict[int, Rows] = {}
        self.shifted, self.samples = stored.shifted, stored.samples

    def __call__(self, index: Tensor, view: int) -> Rows:
        """Return the cached logits for one view of some images, on the GPU; see `SoftTargets`.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view.
        """
        if view not in self._views:
            self._views[view] = self._copied(view)
        whole = self._views[view]
        if index.device.type == "cpu" and self._device.type != "cpu":
            index = index.pin_memory()
        index = index.to(self._device, non_blocking=True)
        axis = _axis(whole)
        return _map(whole, lambda tensor: tensor.index_select(axis, index))

    def _copied(self, view: int) -> Rows:
        count = self._stored.images
        parts = [
            _map(
                self._stored(torch.arange(start, min(start + _ROWS, count)), view),
                lambda tensor: tensor.to(self._device),
            )
            for start in range(0, count, _ROWS)
        ]
        first, axis = parts[0], _axis(parts[0])
        if isinstance(first, Tensor):
            return torch.cat(cast(list[Tensor], parts), dim=axis)
        fields: list[Any] = []
        for together in zip(*cast(Any, parts), strict=True):
            whole = all(isinstance(tensor, Tensor) for tensor in together)
            fields.append(torch.cat(list(together), dim=axis) if whole else together[0])
        return type(first)(*fields)


def resident(
    stored: SoftTargets | JoinedTargets, device: str
) -> SoftTargets | JoinedTargets | ResidentTargets:
    """Return cached logits that are kept on a GPU where they fit, or as they are.

    Those of all views are kept where the GPU has `SHARE` times their bytes free. Larger ones are
    read from the store batch by batch and sent in pinned memory, which is not waited for.

    Args:
        stored: Cached logits.
        device: Device of the student.
    """
    if torch.device(device).type != "cuda":
        return stored
    row = stored(torch.zeros(1, dtype=torch.int64), 0)
    tensors = [part for part in ([row] if isinstance(row, Tensor) else row) if _is_tensor(part)]
    size = sum(cast(Tensor, part).nbytes for part in tensors) * stored.images * stored.views
    free, _ = torch.cuda.mem_get_info()
    if size * SHARE > free:
        return stored
    return ResidentTargets(stored, torch.device(device))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _axis(rows: Rows) -> int:
    """Return the dimension of the rows, the last but one of what has classes."""
    return (rows if isinstance(rows, Tensor) else rows[0]).ndim - 2


def _map(rows: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    return change(rows) if isinstance(rows, Tensor) else rows.map(change)
