"""Images of a transfer set in the size and channels of the labelled ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from selfkd.text import one_line

from .batches import Data, Split
from .load import resolve_images
from .pictures import is_grey, read_or_raise
from .stream import Pictures, Stream

if TYPE_CHECKING:
    from PIL.Image import Image


def conform(
    found: Split, data: Data, words: str, *, fixed: bool, in_memory: bool | None = None
) -> Split:
    """Return images of the size and channels of the labelled ones, decoded or to be streamed.

    Args:
        found: Images, or rows of features.
        data: Labelled data, which the others are to be like.
        words: What the images are, for messages.
        fixed: Whether images of another size are refused, rather than scaled.
        in_memory: Whether to hold the images as uint8 tensors; by size if not given.

    Raises:
        ValueError: They have another size, are in colour where the labelled are grey, or one of
            both has features.
    """
    channels, size = data.in_chans, data.image_size
    images = found.images
    if data.features is not None or (isinstance(images, Tensor) and images.ndim == 2):
        return _conform_features(found, data)
    if isinstance(images, Stream):
        _check_headers(images, data, fixed=fixed)
        images = replace(images, image_size=size, mode="L" if channels == 1 else "RGB")
        return resolve_images(words, replace(found, images=images), None, in_memory, [found])
    if fixed and images.shape[-1] != size:
        raise ValueError(_other_size(words, tuple(images.shape[-2:]), data))
    found = resolve_images(words, found, None if fixed else size, None, [found])
    images = found.images
    if not isinstance(images, Tensor) or images.shape[1] == channels:
        return found
    if images.shape[1] != 1:
        raise ValueError(_in_colour(words, data))
    return replace(found, images=images.expand(-1, channels, -1, -1).contiguous())


def _conform_features(found: Split, data: Data) -> Split:
    """Return features in the precision of the labelled ones.

    Raises:
        ValueError: They are others, or one of both has images.
    """
    own = data.train.images if data.features is not None else None
    images = found.images
    if isinstance(own, Tensor) and isinstance(images, Tensor) and images.shape[1:] == own.shape[1:]:
        return replace(found, images=images.to(own.dtype))
    what = (
        f"rows of {images.shape[1]:,} features"
        if isinstance(images, Tensor) and images.ndim == 2
        else "images"
    )
    wanted = "images" if data.features is None else f"rows of {len(data.features):,} features"
    raise ValueError(f"data.transfer must have {wanted}, as {data.name} has, got {what}")


def _check_headers(images: Stream, data: Data, *, fixed: bool) -> None:
    """Check the size and channels of all pictures, without decoding them."""
    pictures: Pictures = images.pictures
    wanted = (data.image_size, data.image_size)
    if not fixed and data.in_chans > 1:
        return
    for number in images.positions.tolist():
        place = pictures.where(number)
        picture = read_or_raise(partial(_header, pictures, number), place)
        if fixed and picture.size != wanted:
            raise ValueError(_other_size(place, picture.size[::-1], data))
        if data.in_chans == 1 and not is_grey(picture):
            raise ValueError(_in_colour(place, data))


def _header(pictures: Pictures, number: int) -> Image:
    with pictures.open(number) as picture:
        return picture


def _other_size(what: str, size: tuple[int, ...], data: Data) -> str:
    own = data.image_size
    return one_line(
        f"data.transfer must have images of {own}x{own} pixels, as {data.name} has, got "
        f"{'x'.join(map(str, size))} ({what}): scale them, or have all images scaled by "
        "--set data.image_size=N"
    )


def _in_colour(what: str, data: Data) -> str:
    return one_line(
        f"data.transfer must have images of 1 channel, as {data.name} has, got 3 ({what}): convert "
        "them to grey"
    )
