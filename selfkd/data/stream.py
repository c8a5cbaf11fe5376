"""Streams of images that are decoded on access and scaled to one size."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .pictures import Mode, is_grey, read_or_raise, read_picture, square

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_DEFAULT = 64
"""Largest image size in pixels that is chosen if none is given."""
SURVEYED = 500
"""Number of pictures by which an image size is chosen."""


class Pictures(Protocol):
    """Encoded pictures of any size, by number."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def open(self, number: int, /) -> "Image":
        """Open a picture, which need not be decoded yet."""

    def where(self, number: int, /) -> str:
        """Return the file or the place of a picture, for messages."""

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

    def open(self, number: int) -> "Image":
        """Open a picture without decoding it."""
        from PIL import Image

        return Image.open(self.root / self.paths[number])

    def where(self, number: int) -> str:
        """Return the file of a picture."""
        return str(self.root / self.paths[number])

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
        number = int(self.positions[i])
        picture = read_or_raise(lambda: self._read(number), self.pictures.where(number))
        pixels = np.array(square(picture.convert(self.mode), self.image_size))
        tensor = torch.from_numpy(pixels)
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()

    def _read(self, number: int) -> "Image":
        with self.pictures.open(number) as picture:
            return read_picture(picture)

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


@dataclass(frozen=True)
class Survey:
    """Shorter sides and channels of some pictures, spread over all of them."""

    sides: Sequence[int]
    """Shorter side of each in pixels, ascending."""
    grey: bool
    """Whether all of them have one channel, besides alpha."""

    @property
    def size(self) -> int:
        """Default image size: the median of the shorter sides, at most 64 pixels."""
        return min(LARGEST_DEFAULT, self.sides[(len(self.sides) - 1) // 2])


def survey(pictures: Pictures) -> Survey:
    """Look at the headers of some pictures, all of them where there are few.

    Raises:
        ValueError: A picture that cannot be read.
    """

    def look(number: int) -> tuple[int, bool]:
        def header() -> "Image":
            with pictures.open(number) as picture:
                return picture

        picture = read_or_raise(header, pictures.where(number))
        return min(picture.size), is_grey(picture)

    few = min(len(pictures), SURVEYED)
    seen = [look(number * len(pictures) // few) for number in range(few)]
    return Survey(sorted(side for side, _ in seen), all(grey for _, grey in seen))
