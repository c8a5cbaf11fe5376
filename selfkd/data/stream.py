"""Images that are decoded when they are asked for, all to one size."""

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


class Pictures(Protocol):
    """Pictures of any size by number, and what tells them apart without decoding them."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> "Image": ...
    def key(self, number: int, /) -> str: ...


@dataclass(frozen=True, eq=False)
class Files:
    """Image files under a folder."""

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> "Image":
        path = self.root / self.paths[number]
        return opened(lambda: read_picture(path), str(path))

    def key(self, number: int) -> str:
        return f"{self.paths[number]}:{(self.root / self.paths[number]).stat().st_size}"


@dataclass(frozen=True, eq=False)
class Stream(Dataset[Tensor]):
    """A map-style data set of uint8 images `[channels, size, size]`.

    A picture's shorter side is scaled to `image_size` and the middle is cut out, as torchvision's
    `Resize` and `CenterCrop` do.
    """

    pictures: Pictures
    positions: Tensor
    """int64 `[N]`: which picture image i is."""
    image_size: int
    mode: Mode

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        picture = self.pictures[int(self.positions[i])]
        pixels = np.array(square(picture.convert(self.mode), self.image_size))
        tensor = torch.from_numpy(pixels)
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()

    def take(self, index: Tensor) -> "Stream":
        return replace(self, positions=self.positions[index])

    def keys(self) -> list[str]:
        """One name for each image, which changes when its file's size does."""
        return [self.pictures.key(number) for number in self.positions.tolist()]

    @property
    def nbytes(self) -> int:
        """Size of all images when decoded."""
        return len(self) * (1 if self.mode == "L" else 3) * self.image_size**2

    def decode(self) -> Tensor:
        """All images at once: uint8 `[N, channels, size, size]`."""
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


def opened(read: Callable[[], "Image"], what: str) -> "Image":
    """What `read` returns; any of Pillow's ways to fail becomes one error that names `what`."""
    from PIL.Image import DecompressionBombError

    try:
        return read()
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise ValueError(f"every image must be readable, got {what} ({error})") from error


def square(picture: "Image", size: int) -> "Image":
    """Scale the shorter side to `size` and cut the middle out."""
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
