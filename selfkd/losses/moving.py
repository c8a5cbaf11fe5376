"""Tensors moved to a GPU without the program waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU in pinned memory, without a wait.

    A plain `to` returns when the GPU has done all that was asked of it before. This one is put in
    line behind that, so that the next batch is read while the GPU computes.

    Args:
        tensor: Tensor on any device.
        device: Device to move it to.
    """
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def valid_rows(tensor: Tensor, mask: Tensor, axis: int = 0) -> Tensor:
    """Return the rows that a mask keeps, `[…, kept, …]`; a GPU is waited for if the mask is there.

    Args:
        tensor: Rows `[…, batch, length, …]`.
        mask: Rows to keep, bool `[batch, length]`, on the CPU or on the device of the rows.
        axis: Dimension of the batch.
    """
    places = mask.flatten().nonzero()[:, 0].to(tensor.device, non_blocking=True)
    return tensor.flatten(axis, axis + 1).index_select(axis, places)
