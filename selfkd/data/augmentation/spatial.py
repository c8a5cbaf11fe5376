"""Random crop, flip and shift of a batch of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import AREA, ASPECT, CROP_X, CROP_Y, FLIP, SHIFT_X, SHIFT_Y, TALL


def flipped(images: Tensor, bits: Tensor) -> Tensor:
    """Mirror half of the images left to right.

    Args:
        images: Images `[batch, channels, height, width]`.
        bits: Random numbers of the view `[batch, draws]`.
    """
    batch = torch.arange(len(images), device=images.device)
    return torch.cat([images, images.flip(3)]).index_select(
        0, batch + len(images) * (bits[:, FLIP] % 2)
    )


def shifted(images: Tensor, bits: Tensor, jitter: int) -> Tensor:
    """Pad each image by `jitter` on every side and cut a window of the original size out of it.

    Args:
        images: Images `[batch, channels, height, width]`.
        bits: Random numbers of the view `[batch, draws]`.
        jitter: Pixels, fewer than the image has.

    Raises:
        ValueError: The jitter is not below the images' size.
    """
    height, width = images.shape[2:]
    if jitter >= min(height, width):
        raise ValueError(
            f"jitter must be less than the image size {min(height, width)}, got {jitter}"
        )
    offsets = bits[:, SHIFT_Y : SHIFT_X + 1] * (2 * jitter + 1) >> 32
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


def cropped(images: Tensor, bits: Tensor, smallest: float) -> Tensor:
    """Cut a box of `smallest` to 1 times the area, of aspect 3:4 to 4:3, and scale it up.

    Args:
        images: Images `[batch, channels, height, width]`.
        bits: Random numbers of the view `[batch, draws]`.
        smallest: Smallest share of the area, in (0, 1].
    """
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    area = uniform[:, AREA] * (1 - smallest) + smallest
    narrowest = area.clamp(min=0.75)  # a narrower box of that area would not fit
    aspect = uniform[:, ASPECT] * (1 - narrowest) + narrowest
    long, short = (area / aspect).sqrt(), (area * aspect).sqrt()
    tall = bits[:, TALL] % 2 == 0
    top, bottom, weight_y = _taps(torch.where(tall, long, short), bits[:, CROP_Y], images.shape[2])
    left, right, weight_x = _taps(torch.where(tall, short, long), bits[:, CROP_X], images.shape[3])

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
