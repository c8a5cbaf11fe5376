"""Loading of timm's data sets (`create_dataset`): torch/…, hfds/…, hfids/…, tfds/…, wds/…"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .batches import Split
from .folder import default_val_size, describe
from .pictures import Mode, read_or_raise, read_picture, square
from .saved import table_states
from .sources import Source, missing
from .stream import LARGEST_DEFAULT, Pictures, State, Stream, file_states, survey

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
"""Prefixes of the names of timm's data sets."""
ROOTLESS = ("hfds", "hfids", "tfds")
"""Prefixes of data sets that have their own cache and need no root."""
TORCH_NAMES = tuple(
    f"torch/{name}"
    for name in (
        "cifar10",
        "cifar100",
        "mnist",
        "kmnist",
        "fashion_mnist",
        "qmnist",
        "imagenet",
        "places365",
        "inaturalist",
    )
)
_UNCONVERTED = ("hfids", "wds")  # timm would convert their pictures to RGB by Pillow alone
_FAILURES = (AssertionError, KeyError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True, eq=False)
class TimmPictures:
    """Pictures of a map-style timm or torchvision data set."""

    name: str
    """Name of the data set, for errors and keys."""
    dataset: Any
    """Map-style data set of (picture, label)."""

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, number: int) -> "Image":
        """Open a picture, decoded or not."""
        reader = getattr(self.dataset, "reader", None)  # timm's items skip unreadable files
        if reader is not None:
            from PIL import Image

            return Image.open(reader[number][0])
        picture: Image.Image = self.dataset[number][0]
        return picture

    def where(self, number: int) -> str:
        """Return the place of a picture."""
        return f"image {number} of {self.name}"

    def key(self, number: int) -> str:
        """Return a name that identifies a picture without decoding it."""
        return f"{self.name}[{number}]"

    def states(self, numbers: Sequence[int]) -> list[State] | None:
        """Return what changes with the content of pictures in files, or in a table of Hugging Face.

        None of those that torchvision has in memory, such as CIFAR's.
        """
        reader: Any = getattr(self.dataset, "reader", None)
        if hasattr(table := getattr(reader, "dataset", None), "cache_files"):
            return table_states(table, reader.image_key, numbers)
        files = getattr(self.dataset, "samples", None) or getattr(self.dataset, "imgs", None)
        if not files:
            return None
        return file_states([os.path.abspath(files[number][0]) for number in numbers])


@dataclass(frozen=True, eq=False)
class ListedPictures:
    """Pictures of an iterable data set, read once and held in memory."""

    name: str
    """Name of the data set, for keys."""
    pictures: Sequence["Image"]
    """Decoded square pictures."""

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, number: int) -> "Image":
        """Return a picture."""
        return self.pictures[number]

    def where(self, number: int) -> str:
        """Return the place of a picture."""
        return f"image {number} of {self.name}"

    def key(self, number: int) -> str:
        """Return a name that identifies a picture without decoding it."""
        return f"{self.name}[{number}]"

    def states(self, numbers: Sequence[int]) -> None:
        """Return None: when the content changes is not known."""


def open_timm(
    name: str, root: Path | None, download: bool, image_size: int | None, limit: int
) -> Source:
    """Open timm's split `train` as the pool, and `test` or else `validation` as the test split."""
    pool = _open_split(name, root, "train", download)
    try:
        test = _open_split(name, root, "test", download)
    except FileNotFoundError:
        test = _open_split(name, root, "validation", download)
    pool_pictures, pool_labels = _read(name, pool, image_size, limit)
    test_pictures, test_labels = _read(name, test, image_size, limit)
    looked = survey(pool_pictures)
    size = image_size or looked.size
    mode: Mode = "L" if looked.grey else "RGB"
    names = _class_names(pool, max(pool_labels + test_labels) + 1)
    pool_split, test_split = (
        Split(Stream(pictures, torch.arange(len(labels)), size, mode), torch.tensor(labels))
        for pictures, labels in ((pool_pictures, pool_labels), (test_pictures, test_labels))
    )
    val_size = default_val_size(len(pool_split), len(names))
    return Source(
        pool_split,
        names,
        val_size=val_size,
        test=test_split,
        note=describe(name, len(pool_labels + test_labels), names, image_size, looked, Counter()),
    )


def _open_split(name: str, root: Path | None, split: str, download: bool) -> Any:
    import timm.data

    settings: dict[str, Any] = {"root": root and str(root), "split": split, "download": download}
    if name.partition("/")[0] in _UNCONVERTED:
        settings["input_img_mode"] = ""  # as they are, for `read_picture`
    try:
        dataset = timm.data.create_dataset(name, **settings)
    except ImportError as error:
        raise ValueError(
            f"data.name must be a data set whose package is installed, got {name!r}: {error}"
        ) from error
    except _FAILURES as error:
        if name.startswith("torch/"):
            raise missing(f"{name} (split {split})", root, download, error) from error
        raise FileNotFoundError(
            f"data.name must be a data set that timm can open, got {name!r} (split {split}): "
            f"{error}"
        ) from error
    if hasattr(dataset, "loader"):  # torchvision's own drops alpha and orientation
        from PIL import Image

        dataset.loader = Image.open
    return dataset


def _read(
    name: str, dataset: Any, image_size: int | None, limit: int
) -> tuple[Pictures, list[int]]:
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        return _read_all(name, dataset, image_size, limit)
    pictures = TimmPictures(name, dataset)
    if len(pictures) == 0:
        raise ValueError(f"data.name must name a data set with images, got none in {name}")
    return pictures, _checked_labels(name, _labels(dataset))


def _labels(dataset: Any) -> Iterable[Any]:
    """Labels of a data set, without decoding images if it lists them."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "iter_targets"):
        targets: Iterable[Any] = reader.iter_targets()
        return targets
    if hasattr(reader, "samples"):
        return [target for _, target in reader.samples]
    if hasattr(dataset, "targets"):
        targets = dataset.targets
        return targets
    return (dataset[number][1] for number in range(len(dataset)))


def _read_all(
    name: str, dataset: Iterable[Any], image_size: int | None, limit: int
) -> tuple[ListedPictures, list[int]]:
    """Read an iterable data set once, and scale each picture as it is read."""
    pictures: list[Image] = []
    labels: list[Any] = []
    total = 0
    for picture, label, *_ in dataset:
        size = image_size or min(LARGEST_DEFAULT, *picture.size)
        where = f"image {len(labels)} of {name}"
        pictures.append(square(read_or_raise(partial(read_picture, picture), where), size))
        labels.append(label)
        total += 3 * size * size
        if total > limit:
            raise ValueError(
                f"data.name must name a data set of at most {limit:,} decoded bytes where it can "
                f"only be read in order, got {name}: lower data.image_size or use hfds/ or folder"
            )
    if not pictures:
        raise ValueError(f"data.name must name a data set with images, got none in {name}")
    return ListedPictures(name, pictures), _checked_labels(name, labels)


def _checked_labels(name: str, labels: Iterable[Any]) -> list[int]:
    numbers = [int(label) for label in labels]
    if min(numbers) < 0:
        raise ValueError(f"labels must be at least 0, got {min(numbers)} in {name}")
    return numbers


def _class_names(dataset: Any, num_classes: int) -> tuple[str, ...]:
    """Class names of the data set if it has one for each class, else the class numbers."""
    names = getattr(dataset, "classes", None)
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if names is None and indices:
        names = sorted(indices, key=indices.__getitem__)
    if names is None or len(names) < num_classes:
        names = range(num_classes)
    return tuple(str(name) for name in names)
