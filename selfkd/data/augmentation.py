"""Augmentations as pure functions of (seed, image index, view number).

A teacher's stored answer belongs to one image under one augmentation. So a view draws its random
numbers from a hash of what it is, not from a generator's state: view 3 of image 17 is the same
pixels whatever the batch, the order, the process, the number of workers or the device.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Each quantity has a draw number of its own, so that switching one augmentation leaves the others.
_FLIP, _SHIFT_Y, _SHIFT_X, _AREA, _ASPECT, _TALL, _CROP_Y, _CROP_X = range(8)
_DRAWS = 8


def random_bits(seed: int, index: Tensor, stream: int, draws: int) -> Tensor:
    """Uniform random integers that depend on nothing but the arguments (splitmix64).

    Args:
        seed: any integer; taken modulo 2**64.
        index: int64 `[batch]`, what the numbers belong to.
        stream: independent sequence number, such as a view.
        draws: how many numbers for each index.

    Returns:
        int64 `[batch, draws]` in [0, 2**32), on the device of `index`. More draws extend the rows.

    Example:
        >>> random_bits(0, torch.tensor([7, 8]), stream=0, draws=2)[1].tolist()
        [3931604886, 1694181164]
        >>> random_bits(0, torch.tensor([8]), stream=0, draws=1).tolist()
        [[3931604886]]

    Reference:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
        https://doi.org/10.1145/2660193.2660195
    """
    keys = _mix(index * _GOLDEN + _stream_key(seed, stream))
    numbers = torch.arange(1, draws + 1, device=index.device) * _GOLDEN
    return _mix(keys[:, None] + numbers) >> 32 & 0xFFFFFFFF


@lru_cache(maxsize=1024)
def _stream_key(seed: int, stream: int) -> int:
    return int(_mix(_mix(torch.tensor(_signed(seed))) + _signed(stream)))


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    """Splitmix64's finaliser. Products wrap; torch's right shift copies the sign, hence masks."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)


@dataclass(frozen=True)
class Views:
    """The recipe of the augmented views of each image; calling it makes one view of a batch.

    Cropped first, then flipped, then shifted. For uint8 images all arithmetic on pixels is in
    integers, so a view is the same bits on every device.

    Example:
        >>> views = Views(flip=True, jitter=2, seed=0, count=4)
        >>> images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
        >>> batch = views(images, torch.arange(8), view=3)
        >>> alone = views(images[5:6], torch.tensor([5]), view=3)
        >>> torch.equal(batch[5:6], alone)
        True
    """

    crop: float | None = None
    """Random resized crop: the smallest share of the area that is kept, in (0, 1]. None is off."""
    flip: bool = False
    """Left-right flip of half of the images."""
    jitter: int = 0
    """Shift by up to that many pixels in x and in y, filled with 0 (the same as pad and crop)."""
    seed: int = 0
    """Seed of all views."""
    count: int = 1
    """V, the number of different views of an image; epoch e uses view e mod V."""

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {self.crop}")
        if self.jitter < 0:
            raise ValueError(f"jitter must be at least 0, got {self.jitter}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    @property
    def is_identity(self) -> bool:
        """Whether every view of an image is the image itself."""
        return not self.flip and self.jitter == 0 and self.crop in (None, 1)

    @property
    def recipe(self) -> dict[str, float | bool | int | None]:
        """What view v depends on besides the image and v, JSON-able, for keys of what is stored.

        `count` is left out: raising it keeps the views that are there.
        """
        seed = 0 if self.is_identity else self.seed
        crop = None if self.crop == 1 else self.crop
        return {"crop": crop, "flip": self.flip, "jitter": self.jitter, "seed": seed, "version": 1}

    def at(self, epoch: int) -> int:
        """The view that an epoch uses: 0 where views are the image itself, else e mod V.

        Example:
            >>> [Views(flip=True, count=3).at(epoch) for epoch in range(5)]
            [0, 1, 2, 0, 1]
        """
        return 0 if self.is_identity else epoch % self.count

    def __call__(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        """View `view` of each image.

        Args:
            images: `[batch, channels, height, width]`, uint8 or floating point.
            index: int64 `[batch]`, which image of the split each one is.
            view: which view, in [0, count).

        Returns:
            The images augmented; shape, dtype and device as given. The input is never changed.

        Raises:
            ValueError: for a view outside [0, count), or a jitter of the images' size or more.
            TypeError: for images that are neither uint8 nor floating point.
        """
        if not 0 <= view < self.count:
            raise ValueError(f"view must be in [0, {self.count}), got {view}")
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
        if index.shape != images.shape[:1]:
            raise ValueError(f"index must be of shape [{len(images)}], got {list(index.shape)}")
        if self.is_identity:
            return images
        bits = random_bits(self.seed, index.to(images.device), view, _DRAWS)
        if self.crop is not None:
            images = _cropped(images, bits, self.crop)
        if self.flip:
            images = _flipped(images, bits)
        if self.jitter:
            images = _shifted(images, bits, self.jitter)
        return images


def _flipped(images: Tensor, bits: Tensor) -> Tensor:
    batch = torch.arange(len(images), device=images.device)
    return torch.cat([images, images.flip(3)]).index_select(
        0, batch + len(images) * (bits[:, _FLIP] % 2)
    )


def _shifted(images: Tensor, bits: Tensor, jitter: int) -> Tensor:
    """Pad by `jitter` on every side and cut a window of the old size out of each image."""
    height, width = images.shape[2:]
    if jitter >= min(height, width):
        raise ValueError(
            f"jitter must be less than the image size {min(height, width)}, got {jitter}"
        )
    offsets = bits[:, [_SHIFT_Y, _SHIFT_X]] * (2 * jitter + 1) >> 32
    padded = F.pad(images, (jitter,) * 4)
    lines = _line_numbers(padded, offsets[:, :1] + torch.arange(height, device=images.device))
    starts = lines * padded.shape[3] + offsets[:, 1, None, None]
    windows = padded.flatten().unfold(0, width, 1)  # a view: row s is the pixels from s on
    return windows.index_select(0, starts.flatten()).view(images.shape)


def _line_numbers(images: Tensor, lines: Tensor) -> Tensor:
    """Where lines `[batch, n]` of each image are in `images.view(-1, width)`: `[batch, C, n]`."""
    batch, channels, height, _ = images.shape
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
    return planes * height + lines[:, None, :]


def _cropped(images: Tensor, bits: Tensor, smallest: float) -> Tensor:
    """Cut a box of `smallest` to 1 of the area, sides between 3:4 and 4:3, and scale it up."""
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    area = uniform[:, _AREA] * (1 - smallest) + smallest
    narrowest = area.clamp(min=0.75)  # a box of that area and narrower would not fit
    aspect = uniform[:, _ASPECT] * (1 - narrowest) + narrowest
    long, short = (area / aspect).sqrt(), (area * aspect).sqrt()
    tall = bits[:, _TALL] % 2 == 0
    top, bottom, weight_y = _taps(torch.where(tall, long, short), bits[:, _CROP_Y], images.shape[2])
    left, right, weight_x = _taps(torch.where(tall, short, long), bits[:, _CROP_X], images.shape[3])

    wide = torch.int32 if images.dtype == torch.uint8 else torch.float32
    wide = torch.promote_types(images.dtype, wide)
    weight_y, weight_x = (w.to(wide)[:, None, :] for w in (weight_y, weight_x))
    lines = _lines(images, top) * (256 - weight_y)[..., None]
    lines += _lines(images, bottom) * weight_y[..., None]
    scaled = _columns(lines, left) * (256 - weight_x)[:, :, None]
    scaled += _columns(lines, right) * weight_x[:, :, None]
    if images.dtype == torch.uint8:
        return (scaled + (1 << 15) >> 16).to(torch.uint8)
    return (scaled / (1 << 16)).to(images.dtype)


def _taps(share: Tensor, bits: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which two lines each output line mixes, and the second one's weight out of 256."""
    extent = (share * (size << 16)).long()  # lines in 1/65536
    start = ((size << 16) - extent) * (bits >> 8) >> 24
    centres = (2 * torch.arange(size, device=share.device) + 1) * extent[:, None] // (2 * size)
    position = (start[:, None] + centres - (1 << 15)).clamp(0, (size - 1) << 16)
    low = position >> 16
    return low, (low + 1).clamp(max=size - 1), position >> 8 & 0xFF


def _lines(images: Tensor, lines: Tensor) -> Tensor:
    numbers = _line_numbers(images, lines).flatten()
    return images.reshape(-1, images.shape[3]).index_select(0, numbers).view(images.shape)


def _columns(images: Tensor, columns: Tensor) -> Tensor:
    return images.gather(3, columns[:, None, None, :].expand_as(images))
