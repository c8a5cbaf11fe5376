"""Mixup and cutmix: an image mixed with a partner that its view draws."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .draws import MIX_KIND, MIX_WEIGHT, MIX_X, MIX_Y, MIXED, PARTNER
from .erasing import in_boxes
from .numbers import below, happens

WHOLE = 256
"""Weight 1 of an image, in integers."""
_LEVELS = 4096  # quantiles of the Beta distribution, in a table


@dataclass(frozen=True)
class Mixing:
    """Settings of mixup and cutmix.

    Mixup is the mean of two images, `(w a + (256 - w) b) / 256`; cutmix has a box of the second
    image in the first. The weight w / 256 is a quantile of Beta(alpha, alpha), for cutmix then the
    share of the pixels that is outside the box. Where both are on, each mixes half of the images.

    Reference:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017,
        https://arxiv.org/abs/1710.09412; Yun et al., "CutMix: Regularization Strategy to Train
        Strong Classifiers with Localizable Features", 2019, https://arxiv.org/abs/1905.04899

    >>> Mixing(mixup=0.2).recipe
    {'mixup': 0.2, 'cutmix': 0.0, 'probability': 1.0}
    """

    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; no mixup at 0."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution; no cutmix at 0."""
    probability: float = 1.0
    """Probability that an image is mixed, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    @property
    def is_identity(self) -> bool:
        """Whether no image is mixed."""
        return self.probability == 0 or not (self.mixup or self.cutmix)

    @property
    def recipe(self) -> dict[str, float]:
        """JSON-serialisable settings."""
        return {"mixup": self.mixup, "cutmix": self.cutmix, "probability": self.probability}

    def partners(self, bits: Tensor, images: int) -> Tensor:
        """Return the index of each image's partner, int64 `[batch]`.

        Args:
            bits: Random numbers of the view `[batch, draws]`.
            images: Number of images of the split, of which the partner is any.
        """
        return below(bits[:, PARTNER], images)

    def weights(self, bits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the weight of an image in each pixel and in the label.

        Args:
            bits: Random numbers of the view `[batch, draws]`.
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Returns:
            Integers of 256 `[batch, 1, height, width]`, and float32 `[batch]` in [0, 1].
        """
        weight, *edges = self._draw(bits, height, width)
        inside = in_boxes((height, width), *edges)
        pixels = weight.to(torch.int32)[:, None, None, None] * ~inside
        return pixels, _of_label([weight, *edges], height * width)

    def label_weights(self, bits: Tensor, height: int, width: int) -> Tensor:
        """Return the weight of an image in the label alone; see `weights`."""
        return _of_label(self._draw(bits, height, width), height * width)

    def _draw(self, bits: Tensor, height: int, width: int) -> list[Tensor]:
        """Return mixup's weight of 256, and cutmix's box: top, bottom, left, right `[batch]`."""
        number = below(bits[:, MIX_WEIGHT], _LEVELS)
        mixed = happens(bits[:, MIXED], self.probability)
        by_mixup = mixed & happens(bits[:, MIX_KIND], self._share)
        weight = torch.where(by_mixup, _row(_quantiles(self.mixup), number), WHOLE)
        side = _row(_sides(self.cutmix), number) * (mixed & ~by_mixup)
        edges = []
        for size, draw in ((height, MIX_Y), (width, MIX_X)):
            extent, centre = size * side >> 16, below(bits[:, draw], size)
            first = centre - extent // 2
            edges += [first.clamp(0, size), (first + extent).clamp(0, size)]
        return [weight, *edges]

    @property
    def _share(self) -> float:
        return (self.mixup > 0) / max(1, (self.mixup > 0) + (self.cutmix > 0))


def _of_label(drawn: list[Tensor], pixels: int) -> Tensor:
    weight, top, bottom, left, right = drawn
    kept = weight * pixels - WHOLE * (bottom - top) * (right - left)
    return kept.to(torch.float32) / (WHOLE * pixels)


def blended(images: Tensor, others: Tensor, pixels: Tensor) -> Tensor:
    """Return the means of two images, whose weights are integers of 256, rounded.

    Args:
        images: Images, uint8 `[batch, channels, height, width]`.
        others: Their partners.
        pixels: Weight of an image in each pixel `[batch, 1, height, width]`.
    """
    both = images.to(torch.int32) * pixels + others.to(torch.int32) * (WHOLE - pixels)
    return (both + WHOLE // 2 >> 8).to(torch.uint8)


def mixed_labels(labels: Tensor, others: Tensor, weight: Tensor, classes: int) -> Tensor:
    """Return the label of each image and of its partner by their weights, `[batch, classes]`.

    Args:
        labels: Class indices of the images, int64 `[batch]`.
        others: Those of their partners.
        weight: Weight of an image, float32 `[batch]`.
        classes: Number of classes.

    >>> mixed_labels(torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.75, 0.5]), 3)
    tensor([[0.7500, 0.0000, 0.2500],
            [0.0000, 1.0000, 0.0000]])
    """
    names = torch.arange(classes, device=labels.device)
    weight = weight[:, None]
    return (labels[:, None] == names) * weight + (others[:, None] == names) * (1 - weight)


def _row(table: NDArray[np.int64], number: Tensor) -> Tensor:
    return torch.tensor(table).to(number.device, non_blocking=True).index_select(0, number)


@lru_cache(maxsize=8)
def _quantiles(alpha: float) -> NDArray[np.int64]:
    """Return the quantiles of Beta(alpha, alpha) in integers of 256; all are 256 at alpha 0."""
    if not alpha:
        return np.full(_LEVELS, WHOLE)
    from scipy.special import betaincinv  # slow to import

    middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
    quantiles: NDArray[np.float64] = betaincinv(alpha, alpha, middles)
    return np.rint(WHOLE * quantiles).astype(np.int64)


@lru_cache(maxsize=8)
def _sides(alpha: float) -> NDArray[np.int64]:
    """Return the side of each box as a share of the image's, in integers of 65536."""
    return np.floor(65536 * (1 - _quantiles(alpha) / WHOLE) ** 0.5).astype(np.int64)
