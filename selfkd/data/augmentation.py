"""Data augmentation as a pure function of (seed, image index, view number).

Cached teacher logits belong to one image under one augmentation. The random numbers of a view are
therefore a hash of seed, index and view, not the state of a generator: view 3 of image 17 has the
same pixels in any batch, order, process and number of workers, and on any device.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# each quantity has its own draw number, so that switching one augmentation leaves the others
_FLIP, _SHIFT_Y, _SHIFT_X, _AREA, _ASPECT, _TALL, _CROP_Y, _CROP_X = range(8)
_DRAWS = 8


def random_bits(seed: int, index: Tensor, stream: int, draws: int) -> Tensor:
    """Uniform random integers that depend on the arguments alone (splitmix64).

    Args:
        seed: Random seed, any integer; taken modulo 2**64.
        index: Indices that the numbers belong to, int64 `[batch]`.
        stream: Number of an independent sequence, such as a view.
        draws: Number of random integers for each index.

    Returns:
        Integers in [0, 2**32), int64 `[batch, draws]`, on the device of `index`. With more draws
        the rows are extended.

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
    """Finaliser of splitmix64. Products wrap; masks clear the sign that a right shift copies."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)


@dataclass(frozen=True)
class Views:
    """Augmentation recipe with a number of views of each image; calling it makes a view of a batch.

    Images are cropped first, then flipped, then shifted. For uint8 images all arithmetic on pixels
    is in integers, so that a view has the same bits on every device.

    Example:
        >>> views = Views(flip=True, jitter=2, seed=0, count=4)
        >>> images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
        >>> batch = views(images, torch.arange(8), view=3)
        >>> alone = views(images[5:6], torch.tensor([5]), view=3)
        >>> torch.equal(batch[5:6], alone)
        True
    """

    crop: float | None = None
    """Smallest share of the area kept by a random resized crop, in (0, 1]; None for no crop."""
    flip: bool = False
    """Whether half of the images are flipped left to right."""
    jitter: int = 0
    """Largest shift in x and in y, in pixels, filled with 0 (the same as pad and crop)."""
    seed: int = 0
    """Random seed of all views."""
    count: int = 1
    """Number of different views V of an image; epoch e uses view e mod V."""

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
        """JSON-serialisable recipe that determines the views, for the keys of cached logits.

        `count` is left out: raising it keeps the existing views.
        """
        seed = 0 if self.is_identity else self.seed
        crop = None if self.crop == 1 else self.crop
        return {"crop": crop, "flip": self.flip, "jitter": self.jitter, "seed": seed, "version": 1}

    def at(self, epoch: int) -> int:
        """View that an epoch uses: 0 if every view is the image itself, else e mod V.

        Example:
            >>> [Views(flip=True, count=3).at(epoch) for epoch in range(5)]
            [0, 1, 2, 0, 1]
        """
        return 0 if self.is_identity else epoch % self.count

    def __call__(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        """Make one view of each image.

        Args:
            images: Images `[batch, channels, height, width]`, uint8 or floating point.
            index: Index of each image in its split, int64 `[batch]`.
            view: Number of the view, in [0, count).

        Returns:
            Augmented images of the same shape, dtype and device. The input is never changed.

        Raises:
            ValueError: A view outside [0, count), an index of another shape, or a jitter not below
                the images' size.
            TypeError: Images that are neither uint8 nor floating point.
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
    """Pad each image by `jitter` on every side and cut a window of the original size out of it."""
    height, width = images.shape[2:]
    if jitter >= min(height, width):
        raise ValueError(
            f"jitter must be less than the image size {min(height, width)}, got {jitter}"
        )
    offsets = bits[:, [_SHIFT_Y, _SHIFT_X]] * (2 * jitter + 1) >> 32
    padded = F.pad(images, (jitter,) * 4)
    lines = _line_numbers(padded, offsets[:, :1] + torch.arange(height, device=images.device))
    starts = lines * padded.shape[3] + offsets[:, 1, None, None]
    windows = padded.flatten().unfold(0, width, 1)  # no copy: row s has the pixels from s on
    return windows.index_select(0, starts.flatten()).view(images.shape)


def _line_numbers(images: Tensor, lines: Tensor) -> Tensor:
    """Return the rows `[batch, C, n]` in `images.view(-1, width)` of lines `[batch, n]`."""
    batch, channels, height, _ = images.shape
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
    return planes * height + lines[:, None, :]


def _cropped(images: Tensor, bits: Tensor, smallest: float) -> Tensor:
    """Cut a box of `smallest` to 1 times the area, of aspect 3:4 to 4:3, and scale it up."""
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    area = uniform[:, _AREA] * (1 - smallest) + smallest
    narrowest = area.clamp(min=0.75)  # a narrower box of that area would not fit
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
    """Return the two lines that each output line interpolates, and the second's weight of 256."""
    extent = (share * (size << 16)).long()  # in units of 1/65536 line
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
