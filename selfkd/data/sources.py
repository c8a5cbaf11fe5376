"""Digits and torchvision's sets, as pools of uint8 images that are still to be split."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Split

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

DIGITS = tuple("0123456789")
KNOWN_STATISTICS: dict[str, Statistics] = {
    "digits": ((0.3053,), (0.3759,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before it is split: a pool to train on, and what its makers held out."""

    pool: Split
    class_names: tuple[str, ...]
    val_size: int
    """Images held out for validation when the caller names no size."""
    test: Split | None = None
    """The official test split; without one, test images are taken from the pool."""
    val: Split | None = None
    """The official validation split; without one, it is taken from the pool."""
    train_size: int | None = None
    """Images to train on when the caller names no size; None for all that are left."""
    test_size: int = 0
    """Test images to take from the pool."""
    statistics: Statistics | None = None
    """Mean and std by channel where they are well known."""


def open_digits() -> Source:
    """Scikit-learn's 1,797 digits: 8x8, one channel, 0-16 scaled to 0-255."""
    table = _digits_table()
    pixels, labels = table[:, :-1].astype(np.float64), table[:, -1].astype(np.int64)
    images = torch.from_numpy((pixels * 255 / 16).round().astype(np.uint8)).view(-1, 1, 8, 8)
    return Source(
        Split(images, torch.from_numpy(labels)),
        DIGITS,
        val_size=400,
        train_size=200,
        test_size=1197,
        statistics=KNOWN_STATISTICS["digits"],
    )


def _digits_table() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """64 pixels and the label in each row. Importing scikit-learn takes seconds, its file 7 ms."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def open_torchvision(name: str, root: Path, download: bool) -> Source:
    """MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 with their own test splits."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        pool, test = (kind(root, train=train, download=download) for train in (True, False))
        classes = tuple(pool.classes)
    except (AssertionError, EOFError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) or "not found" in str(error) or "download" in str(error):
            raise missing(name, root, download, error) from error
        raise ValueError(
            f"data.root must hold intact files of {name}, got damaged ones under {root} ({error}): "
            "delete them and pass --set data.download=true"
        ) from error
    return Source(
        _pixels(pool),
        DIGITS if name == "mnist" else classes,
        val_size=5000 if name.startswith("cifar") else 10000,
        test=_pixels(test),
        statistics=KNOWN_STATISTICS[name],
    )


def _pixels(dataset: object) -> Split:
    """What a torchvision set holds in memory: uint8 `[N, H, W]` or `[N, H, W, C]`."""
    images = torch.as_tensor(dataset.data)  # type: ignore[attr-defined]
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)  # type: ignore[attr-defined]
    return Split(images, labels)


def missing(name: str, root: Path | None, download: bool, error: Exception) -> FileNotFoundError:
    """The error for a data set that is not there, or that could not be fetched."""
    reason = " ".join(str(error).split())
    if download:
        return FileNotFoundError(f"data.download must succeed for {name}, got: {reason}")
    return FileNotFoundError(
        f"data.root must hold {name}, got {root}, which does not ({reason}): "
        "pass --set data.download=true to fetch it"
    )


def resolve_root(root: str | os.PathLike[str] | None, name: str, download: bool) -> Path:
    """The folder a data set lies in: `root`, else the environment variable SELFKD_DATA."""
    given = root if root is not None else os.environ.get("SELFKD_DATA")
    if not given:
        raise ValueError(
            f"data.root must be given for {name}, got none: pass --set data.root=PATH or set the "
            "environment variable SELFKD_DATA"
        )
    path = Path(given).expanduser()
    if not path.is_dir() and not download:
        raise FileNotFoundError(f"data.root must be an existing folder, got {path}")
    return path


def resized(images: Tensor, size: int) -> Tensor:
    """Square uint8 images scaled to `size` pixels, bilinear with antialiasing."""
    if images.shape[-1] == size:
        return images
    scaled = images.new_empty((*images.shape[:2], size, size))
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096]
        scaled[start : start + 4096] = F.interpolate(
            part, (size, size), mode="bilinear", antialias=True
        )
    return scaled
