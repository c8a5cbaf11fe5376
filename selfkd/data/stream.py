"""Streams of images that are decoded on access and scaled to one size."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["L", "RGB"]
"""Mode of a Pillow image: one channel, or three."""


class Pictures(Protocol):
    """Encoded pictures of any size, by number."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def __getitem__(self, number: int, /) -> "Image":
        """Decode a picture."""

    def key(self, number: int, /) -> str:
        """Return a name that identifies a picture without decoding it."""


@dataclass(frozen=True, eq=False)
class Files:
    """Pictures in image files under a folder."""

    root: Path
    """Folder of the files."""
    paths: Sequence[str]
    """Paths of the files, relative to the folder."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> "Image":
        path = self.root / self.paths[number]
        return read_or_raise(lambda: read_picture(path), str(path))

    def key(self, number: int) -> str:
        """Return a name that identifies a picture without decoding it."""
        return f"{self.paths[number]}:{(self.root / self.paths[number]).stat().st_size}"


@dataclass(frozen=True, eq=False)
class Stream(Dataset[Tensor]):
    """A map-style data set of uint8 images `[channels, size, size]`, decoded on access.

    The shorter side of a picture is scaled to `image_size` and its centre is cut out, as by
    torchvision's `Resize` and `CenterCrop`.
    """

    pictures: Pictures
    """Encoded pictures."""
    positions: Tensor
    """Number of the picture of each image, int64 `[N]`."""
    image_size: int
    """Height and width of the images in pixels."""
    mode: Mode
    """Mode that the pictures are converted to."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        picture = self.pictures[int(self.positions[i])]
        pixels = np.array(square(picture.convert(self.mode), self.image_size))
        tensor = torch.from_numpy(pixels)
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()

    def take(self, index: Tensor) -> "Stream":
        """Return a stream of the images at `index` alone, in that order."""
        return replace(self, positions=self.positions[index])

    def keys(self) -> list[str]:
        """Return a name for each image, which changes with the size of its file."""
        return [self.pictures.key(number) for number in self.positions.tolist()]

    @property
    def nbytes(self) -> int:
        """Size of all images in bytes when decoded."""
        return len(self) * (1 if self.mode == "L" else 3) * self.image_size**2

    def decode(self) -> Tensor:
        """Decode all images: uint8 `[N, channels, size, size]`."""
        channels = 1 if self.mode == "L" else 3
        images = torch.empty(
            (len(self), channels, self.image_size, self.image_size), dtype=torch.uint8
        )
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i, image in enumerate(pool.map(self.__getitem__, range(len(self)))):
                images[i] = image
        return images


def read_picture(file: object) -> "Image":
    """Open and decode an image file."""
    from PIL import Image

    with Image.open(file) as picture:  # type: ignore[arg-type]
        picture.load()
        return picture


def read_or_raise(read: Callable[[], "Image"], source: str) -> "Image":
    """Return the result of `read`, with any error of Pillow's turned into one that names `source`.

    Raises:
        ValueError: A picture that cannot be read.
    """
    from PIL.Image import DecompressionBombError

    try:
        return read()
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise ValueError(f"every image must be readable, got {source} ({error})") from error


def square(picture: "Image", size: int) -> "Image":
    """Scale the shorter side of a picture to `size` pixels and cut its centre out."""
    from PIL.Image import Resampling

    width, height = picture.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))
