"""RandAugment, TrivialAugment and colour jitter on uint8 images, in integers.

Each image of a batch has its own operation and magnitude. Images pass through the same few steps,
with the parameters of the identity where an image has drawn another operation, so that nothing
depends on what is in a batch and no step waits for a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .draws import BRIGHTNESS, CONTRAST, HUE, OF_OPERATION, OPERATION, SATURATION
from .numbers import below

ONE = 1 << 16
"""Factor 1, in integers."""
BINS = 31
"""Number of magnitudes of an operation, from none to the largest."""
NAMES = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""Operations, of which each is drawn equally often."""
_SIGNED = NAMES[1:10]
_BRIGHTNESS, _COLOR, _CONTRAST, _SHARPNESS = (NAMES.index(name) for name in NAMES[6:10])
_AUTOCONTRAST, _EQUALIZE = NAMES.index("autocontrast"), NAMES.index("equalize")
_LARGEST = {
    "randaugment": {"shear": 0.3, "rotate": 30.0, "factor": 0.9, "bits": 4},
    "trivialaugment": {"shear": 0.99, "rotate": 135.0, "factor": 0.99, "bits": 6},
}
_FACTOR, _MASK, _THRESHOLD = 6, 7, 8  # columns of the parameters, after those of the matrix
_GREY = (19589, 38470, 7471)  # 0.2989, 0.587 and 0.114 of 65536


@dataclass(frozen=True)
class Operations:
    """Settings of RandAugment, or of TrivialAugment (wide).

    RandAugment has `count` operations in sequence, of one magnitude; TrivialAugment one operation
    of a random magnitude. The operations and their magnitudes are those of
    `torchvision.transforms.v2`: nearest neighbours, zeros outside.

    Reference:
        Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
        space", 2019, https://arxiv.org/abs/1909.13719; Müller and Hutter, "TrivialAugment:
        Tuning-free Yet State-of-the-Art Data Augmentation", 2021,
        https://arxiv.org/abs/2103.10158

    >>> Operations("trivialaugment").recipe
    {'kind': 'trivialaugment', 'count': 1, 'magnitude': None}
    """

    kind: Literal["randaugment", "trivialaugment"] = "randaugment"
    """Which of the two."""
    count: int = 2
    """Number of operations of RandAugment."""
    magnitude: int = 9
    """Magnitude of RandAugment, in [0, 30]."""

    def __post_init__(self) -> None:
        if self.kind not in _LARGEST:
            raise ValueError(f"kind must be one of {', '.join(_LARGEST)}, got {self.kind!r}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if not 0 <= self.magnitude < BINS:
            raise ValueError(f"magnitude must be in [0, {BINS - 1}], got {self.magnitude}")

    @property
    def rounds(self) -> int:
        """Number of operations in sequence."""
        return self.count if self.kind == "randaugment" else 1

    @property
    def draws(self) -> int:
        """Number of random numbers of an image."""
        return OPERATION + OF_OPERATION * self.rounds

    @property
    def recipe(self) -> dict[str, Any]:
        """JSON-serialisable settings."""
        magnitude = self.magnitude if self.kind == "randaugment" else None
        return {"kind": self.kind, "count": self.rounds, "magnitude": magnitude}

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Return images `[batch, channels, height, width]`, uint8, after their operations.

        Args:
            images: Images, uint8.
            bits: Random numbers of the view `[batch, draws]`.
        """
        for number in range(self.rounds):
            first = OPERATION + OF_OPERATION * number
            name, sign, level = bits[:, first : first + OF_OPERATION].unbind(1)
            level = below(level, BINS)
            if self.kind == "randaugment":
                level = torch.full_like(level, self.magnitude)
            images = apply(images, below(name, len(NAMES)), below(sign, 2), level, kind=self.kind)
        return images


def apply(images: Tensor, names: Tensor, signs: Tensor, levels: Tensor, *, kind: str) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: Images, uint8 `[batch, channels, height, width]`.
        names: Number of each image's operation in `NAMES`, int64 `[batch]`.
        signs: 1 for a magnitude below 0, else 0; ignored by operations of one sign.
        levels: Magnitude of each, in [0, 30].
        kind: Whose magnitudes they are: randaugment or trivialaugment.

    Returns:
        Images of the same shape.
    """
    table = torch.tensor(_parameters(kind, *images.shape[2:]))
    number = (names * 2 + signs) * BINS + levels
    own = table.to(images.device, non_blocking=True).index_select(0, number)
    images = _where(names < _BRIGHTNESS, _moved, images, own[:, :_FACTOR])
    factors = (names >= _BRIGHTNESS) & (names <= _SHARPNESS)
    images = _where(factors, _blended, images, names, own[:, _FACTOR])
    tables = names > _SHARPNESS
    return _where(tables, _looked_up, images, names, own[:, _MASK], own[:, _THRESHOLD])


def _where(chosen: Tensor, step: Callable[..., Tensor], images: Tensor, *values: Tensor) -> Tensor:
    """Apply a step to some of the images; it leaves all others as they are.

    A GPU, which one would have to wait for to know how many they are, applies it to all.
    """
    if images.device.type != "cpu":
        return step(images, *values)
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return images
    some = (tensor.index_select(0, rows) for tensor in (images, *values))
    return images.index_copy(0, rows, step(*some))


@lru_cache(maxsize=16)
def _parameters(kind: str, height: int, width: int) -> NDArray[np.int64]:
    """Return the parameters of each operation, sign and magnitude `[operations x 2 x 31, 9]`.

    They are a matrix from places in the result to places in the image, of half a pixel and from
    the centre; the factor of a blend; the mask of posterize and the threshold of solarize.
    """
    largest, rows = _LARGEST[kind], list[list[int]]()
    shifts = (32.0, 32.0)
    if kind == "randaugment":
        shifts = (width * 150 / 331, height * 150 / 331)
    for name in NAMES:
        for sign in (1, -1) if name in _SIGNED else (1, 1):
            for level in range(BINS):
                share = sign * level / (BINS - 1)
                matrix, factor = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], 1.0
                mask, threshold = 255, 256
                if name == "shear_x":
                    shear = largest["shear"] * share
                    matrix[1], matrix[2] = shear, shear * height
                elif name == "shear_y":
                    shear = largest["shear"] * share
                    matrix[3], matrix[5] = shear, shear * width
                elif name == "translate_x":
                    matrix[2] = -2.0 * int(shifts[0] * share)
                elif name == "translate_y":
                    matrix[5] = -2.0 * int(shifts[1] * share)
                elif name == "rotate":
                    angle = math.radians(largest["rotate"] * share)
                    cos, sin = math.cos(angle), math.sin(angle)
                    matrix = [cos, -sin, 0.0, sin, cos, 0.0]
                elif name in NAMES[6:10]:
                    factor += largest["factor"] * share
                elif name == "posterize":
                    mask = 256 - (1 << round(largest["bits"] * share))
                elif name == "solarize":
                    threshold = math.ceil(255 * (BINS - 1 - level) / (BINS - 1))
                numbers = [round(value * ONE) for value in (*matrix, factor)]
                rows.append([*numbers, mask, threshold])
    return np.array(rows, dtype=np.int64)


def _moved(images: Tensor, matrix: Tensor) -> Tensor:
    """Take each pixel from its place in the image; those outside are zeros."""
    height, width = images.shape[2:]
    rows = 2 * torch.arange(height, device=images.device)[:, None] + 1 - height
    columns = 2 * torch.arange(width, device=images.device) + 1 - width
    a, b, c, d, e, f = matrix.to(torch.int32)[:, :, None, None].unbind(1)
    rows, columns = rows.to(torch.int32), columns.to(torch.int32)
    x = a * columns + (b * rows + (c + width * ONE)) >> 17
    y = d * columns + (e * rows + (f + height * ONE)) >> 17
    inside = (x >= 0).logical_and_(x < width).logical_and_(y >= 0).logical_and_(y < height)
    places = (y * width + x).mul_(inside).flatten(1)[:, None].long()
    flat = images.flatten(2)
    taken = flat.gather(2, places.expand(-1, images.shape[1], -1)).view(images.shape)
    return taken.mul_(inside[:, None])


def _blended(images: Tensor, names: Tensor, factor: Tensor) -> Tensor:
    """Move pixels away from black, their grey, their mean or their neighbours, by a factor."""
    wide = images.to(torch.int32)
    grey = _grey(wide)
    mean = _mean(grey)
    grey = grey.expand_as(wide) if images.shape[1] == 3 else wide  # no colour to change
    name = names[:, None, None, None]
    other = torch.where(name == _COLOR, grey, torch.where(name == _SHARPNESS, _blurred(wide), 0))
    other = torch.where(name == _CONTRAST, mean, other)
    return _blend(wide, other, factor)


def _blend(wide: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return `factor image + (1 - factor) other`, in [0, 255], rounded down."""
    factor = factor.to(torch.int32)[:, None, None, None]
    return (wide * factor + other * (ONE - factor) >> 16).clamp_(0, 255).to(torch.uint8)


def _grey(wide: Tensor) -> Tensor:
    """Return the brightness of each pixel `[batch, 1, height, width]`, as ITU-R 601-2 has it."""
    if wide.shape[1] != 3:
        return wide.sum(1, keepdim=True, dtype=torch.int32) // wide.shape[1]
    red, green, blue = (wide[:, n : n + 1] * weight for n, weight in enumerate(_GREY))
    return red + green + blue >> 16


def _mean(grey: Tensor) -> Tensor:
    pixels = grey.shape[2] * grey.shape[3]
    total = grey.sum((2, 3), keepdim=True)
    return ((2 * total + pixels) // (2 * pixels)).to(torch.int32)


def _blurred(wide: Tensor) -> Tensor:
    """Return means of 3x3 pixels, of which the middle one counts five times; edges are kept."""
    height, width = wide.shape[2:]
    if height <= 2 or width <= 2:
        return wide
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    inner = F.pad((2 * total + 13) // 26, (1, 1, 1, 1))
    edge = F.pad(torch.zeros_like(total, dtype=torch.bool), (1, 1, 1, 1), value=True)
    return torch.where(edge, wide, inner)


def _looked_up(images: Tensor, names: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """Replace each value of a pixel by that of a table of its image and channel."""
    flat = images.flatten(2).long()
    values = torch.arange(256, device=images.device, dtype=torch.int32)
    mask, threshold = (own.to(torch.int32)[:, None] for own in (mask, threshold))
    table = torch.where(values >= threshold, 255 - values, values & mask)[:, None]
    low, high = (
        own.to(torch.int32) for own in torch.aminmax(images.flatten(2), dim=2, keepdim=True)
    )
    span = high - low
    stretched = _scaled(values, low, span)
    name = names[:, None, None]
    table = torch.where((name == _AUTOCONTRAST) & (span > 0), stretched, table)
    table = torch.where(name == _EQUALIZE, _equalized(flat, high), table)
    return table.to(torch.uint8).gather(2, flat).view(images.shape)


def _scaled(values: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """Return values spread over [0, 255], rounded down, by a multiplication for the division."""
    span = span.clamp(min=1)
    factor = (255 * ONE + span - 1) // span
    return ((values - low).clamp_(0).minimum(span) * factor >> 16).clamp_(max=255)


def _equalized(flat: Tensor, high: Tensor) -> Tensor:
    """Return Pillow's tables that spread a channel's values evenly `[batch, channels, 256]`."""
    values = torch.arange(256, device=flat.device, dtype=torch.int32)
    counts = torch.zeros((*flat.shape[:2], 256), dtype=torch.int32, device=flat.device)
    ones = torch.ones((), dtype=torch.int32, device=flat.device).expand_as(flat)
    counts.scatter_add_(2, flat, ones)
    total = counts.cumsum(2, dtype=torch.int32)
    step = (flat.shape[2] - counts.gather(2, high.long())) // 255
    table = ((total - counts + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    return torch.where(step == 0, values, table)


def jittered(images: Tensor, bits: Tensor, *, color: float, hue: float) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order, each by a random number.

    Args:
        images: Images, uint8 `[batch, channels, height, width]`.
        bits: Random numbers of the view `[batch, draws]`.
        color: Factors are in [1 - color, 1 + color]; in [0, 1].
        hue: Largest turn of the hue, as a share of the circle, in [0, 0.5].
    """
    reach = round(color * ONE)
    if reach:
        brightness, contrast, saturation = (
            ONE - reach + below(bits[:, draw], 2 * reach + 1)
            for draw in (BRIGHTNESS, CONTRAST, SATURATION)
        )
        wide = images.to(torch.int32)
        images = _blend(wide, torch.zeros_like(wide), brightness)
        wide = images.to(torch.int32)
        images = _blend(wide, _mean(_grey(wide)), contrast)
        if images.shape[1] == 3:
            wide = images.to(torch.int32)
            images = _blend(wide, _grey(wide), saturation)
    turn = round(hue * 6 * ONE)  # the circle has six parts
    if turn and images.shape[1] == 3:
        images = turned(images, below(bits[:, HUE], 2 * turn + 1) - turn)
    return images


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of images in colour, at the same value and chroma.

    Args:
        images: Images, uint8 `[batch, 3, height, width]`.
        turn: Turn of each, int64 `[batch]`, in units of which the circle has 6 x 65536.
    """
    red, green, blue = images.to(torch.int32).unbind(1)
    value = images.amax(1).to(torch.int32)
    chroma = value - images.amin(1).to(torch.int32)
    some = chroma.clamp(min=1)
    hue = torch.where(
        value == red,
        (green - blue) * ONE // some,
        torch.where(
            value == green,
            2 * ONE + (blue - red) * ONE // some,
            4 * ONE + (red - green) * ONE // some,
        ),
    )
    hue = hue + turn.to(torch.int32)[:, None, None]
    channels = []
    for start in (5, 3, 1):
        place = (hue + start * ONE) % (6 * ONE)
        share = torch.minimum(place, 4 * ONE - place).clamp(0, ONE)
        channels.append(value - (chroma * share + ONE // 2 >> 16))
    return torch.stack(channels, 1).clamp_(0, 255).to(torch.uint8)
