"""Images that are normalised for a student, as its teacher was trained on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Stats = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, of images scaled to [0, 1]."""


def renormalisation(given: Stats | None, trained: Stats | None) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of inputs, `[channels, 1, 1]` each; None if they do not change.

    Raises:
        ValueError: The second without the first, or statistics that fit no channels.
    """
    if given is None and trained is not None:
        raise ValueError("input_stats must be given with trained_stats, got None")
    for name, stats in (("input_stats", given), ("trained_stats", trained)):
        if stats is not None:
            _check_stats(name, stats)
    if given is None or trained is None:
        return None
    mean_in, std_in, mean, std = (
        torch.tensor([float(value) for value in values], dtype=torch.float64)
        for values in (*given, *trained)
    )
    if len(mean_in) != len(mean):
        raise ValueError(
            f"trained_stats must have as many channels as input_stats ({len(mean_in)}), "
            f"got {len(mean)}"
        )
    if torch.equal(mean_in, mean) and torch.equal(std_in, std):
        return None
    affine = torch.stack([std_in / std, (mean_in - mean) / std]).float()
    scale, shift = affine[:, :, None, None]
    return scale, shift


def _check_stats(name: str, stats: Stats) -> None:
    mean, std = stats
    if len(mean) != len(std) or len(mean) == 0:
        raise ValueError(f"{name} must be a mean and a std for each channel, got {stats}")
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"{name} must have finite means, got {tuple(mean)}")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"{name} must have a std above 0 in every channel, got {tuple(std)}")


def renormalise(inputs: Any, scale: Tensor, shift: Tensor) -> Tensor:
    """Return images that are normalised as a teacher was trained, from others.

    Raises:
        TypeError: Inputs that are no tensor.
        ValueError: Images of other channels.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "inputs must be a tensor where a teacher renormalises them (trained_stats), got "
            f"{type(inputs).__name__}"
        )
    if inputs.ndim == 2 and inputs.shape[1] == len(scale):  # features
        scale, shift = scale[:, 0, 0], shift[:, 0, 0]
    elif inputs.ndim != 4 or inputs.shape[1] != len(scale):
        raise ValueError(
            f"inputs must be [batch, {len(scale)}, height, width], as many channels as input_stats "
            f"has, got {list(inputs.shape)}"
        )
    scale, shift = (part.to(inputs.device, non_blocking=True) for part in (scale, shift))
    return (inputs * scale + shift).to(inputs.dtype)
