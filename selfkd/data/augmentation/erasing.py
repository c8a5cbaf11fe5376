"""Random erasing, and boxes in images."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .draws import ERASE_AREA, ERASE_ASPECT, ERASE_X, ERASE_Y, ERASED
from .numbers import below, happens

_LEVELS = 32  # of area and of aspect, in a table: roots of floats would differ between devices


def erased(images: Tensor, bits: Tensor, probability: float) -> Tensor:
    """Fill a box with zeros in some of the images.

    Its area is 2 % to 33 % of the image and its aspect 3:10 to 10:3, each in 32 steps; it is cut
    where the image has no room for it.

    Args:
        images: Images `[batch, channels, height, width]`.
        bits: Random numbers of the view `[batch, draws]`.
        probability: Probability that an image has such a box, in [0, 1].

    Reference:
        Zhong et al., "Random Erasing Data Augmentation", 2017, https://arxiv.org/abs/1708.04896
    """
    sizes = torch.tensor(_sizes(*images.shape[2:])).to(images.device, non_blocking=True)
    number = below(bits[:, ERASE_AREA], _LEVELS) * _LEVELS + below(bits[:, ERASE_ASPECT], _LEVELS)
    tall, wide = sizes.index_select(0, number).unbind(1)
    top = below(bits[:, ERASE_Y], images.shape[2] + 1 - tall)
    left = below(bits[:, ERASE_X], images.shape[3] + 1 - wide)
    inside = in_boxes(images.shape[2:], top, top + tall, left, left + wide)
    return images.masked_fill(
        inside & happens(bits[:, ERASED], probability)[:, None, None, None], 0
    )


@lru_cache(maxsize=8)
def _sizes(height: int, width: int) -> NDArray[np.int64]:
    """Return the height and the width of each box `[levels squared, 2]`, at least a pixel."""
    area = np.linspace(0.02, 0.33, _LEVELS)[:, None] * height * width
    aspect = np.exp(np.linspace(np.log(0.3), -np.log(0.3), _LEVELS))
    tall, wide = (area * aspect) ** 0.5, (area / aspect) ** 0.5
    sides = (np.rint(tall).clip(1, height), np.rint(wide).clip(1, width))
    return np.stack(sides, axis=-1).reshape(-1, 2).astype(np.int64)


def in_boxes(
    size: Sequence[int], top: Tensor, bottom: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """Return whether each pixel is in its image's box, bool `[batch, 1, height, width]`.

    Args:
        size: Height and width of the images in pixels.
        top: First row of each box, int64 `[batch]`.
        bottom: Row after its last.
        left: First column.
        right: Column after its last.
    """
    rows, columns = (torch.arange(side, device=top.device) for side in size)
    tall = (rows >= top[:, None]) & (rows < bottom[:, None])
    wide = (columns >= left[:, None]) & (columns < right[:, None])
    return (tall[:, :, None] & wide[:, None, :])[:, None]
