"""Streams of images that are decoded on access and scaled to one size."""

import math
import os
import time
from collections.abc import Sequence
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

    def states(self, numbers: Sequence[int], /) -> "list[State] | None":
        """Return what changes with the content of pictures; None where that is not known."""


State = tuple[str, int, int, int]
"""A file, its size in bytes, and when its content and the file itself were changed last, in
nanoseconds: the first can be set back, as when files are unpacked, and the second cannot."""
FRESH_NS = 2 * 10**9
"""Time after a change in which a file may change again without its time being another."""


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

        return Image.open(self.where(number))

    def where(self, number: int) -> str:
        """Return the file of a picture."""
        return os.path.join(self.root, self.paths[number])

    def key(self, number: int) -> str:
        """Return a name that identifies a picture without decoding it."""
        return f"{self.paths[number]}:{os.stat(self.where(number)).st_size}"

    def states(self, numbers: Sequence[int]) -> list[State] | None:
        """Return path, size and times of the files; None where one has just been written."""
        root = os.path.realpath(self.root)
        return file_states([os.path.join(root, self.paths[number]) for number in numbers])


def file_states(paths: Sequence[str]) -> list[State] | None:
    """Return path, size and times of files; None where one has just been written."""
    found = []
    for path in paths:
        state = os.stat(path)
        found.append((path, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    newest = max((changed for _, _, changed, _ in found), default=0)
    return found if newest < time.time_ns() - FRESH_NS else None


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
    kept: Tensor | None = None
    """Images that are decoded already, uint8 `[M, channels, size, size]`, mapped from a file."""
    rows: Tensor | None = None
    """Row of each image in them, int64 `[N]`."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        if self.kept is not None and self.rows is not None:
            return self.kept[self.rows[i]]
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
        rows = None if self.rows is None else self.rows[index]
        return replace(self, positions=self.positions[index], rows=rows)

    def keys(self) -> list[str]:
        """Return a name for each image, which changes with the size of its file."""
        return [self.pictures.key(number) for number in self.positions.tolist()]

    @property
    def nbytes(self) -> int:
        """Size of all images in bytes when decoded."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of all images when decoded: images, channels, height and width."""
        return (len(self), 1 if self.mode == "L" else 3, self.image_size, self.image_size)


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
