"""Normalisation of images and features to the inputs of networks, kept in memory where small."""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

KEPT_VALUES = 2**22
"""Most values of inputs that are kept: of small images, the calls that normalise a batch take as
long as a small layer."""


def normalisation(
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    *,
    channels_last: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Return the function from images or features to inputs, float32.

    Args:
        mean: Mean of each channel, of pixels in [0, 1]; of features, of each of them.
        std: Standard deviation of each channel, of pixels in [0, 1].
        device: Device of the images.
        channels_last: Whether inputs of images have their channels last in memory.

    >>> inputs = normalisation([0.0], [0.5], torch.device("cpu"))
    >>> inputs(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8))
    tensor([[[[0.4000]]]])
    """
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))
    scale = (1 / (255 * stds)).to(device, torch.float32, non_blocking=True)
    shift = (-means / stds).to(device, torch.float32, non_blocking=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normalise(images: Tensor) -> Tensor:
        if images.ndim == 2:
            return standardised(images, mean, std)
        return (images.to(torch.float32, memory_format=layout) * scale).add_(shift)

    return normalise


_KEPT: WeakKeyDictionary[object, tuple[object, Tensor]] = WeakKeyDictionary()


def kept_inputs(
    owner: object,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool = False,
) -> Tensor:
    """Return all inputs of a split, which are made once and kept as long as the split.

    Args:
        owner: Split, whose images never change.
        images: Its images or features.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        channels_last: Whether inputs of images have their channels last in memory.
    """
    made_from = (tuple(mean), tuple(std), channels_last)
    known, inputs = _KEPT.get(owner, (None, images))
    if known != made_from:
        inputs = normalisation(mean, std, images.device, channels_last=channels_last)(images)
        _KEPT[owner] = made_from, inputs
    return inputs


def standardised(features: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return features `[N, F]` less their mean by their std, float32, computed in double precision.

    >>> standardised(torch.tensor([[3.0, 1e9 + 64]], dtype=torch.float64), [1, 1e9], [2, 64])
    tensor([[1., 1.]])
    """
    means, stds = (
        torch.tensor(value, dtype=torch.float64).to(features.device, non_blocking=True)
        for value in (mean, std)
    )
    return ((features.double() - means) / stds).float()
