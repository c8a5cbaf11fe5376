"""Digits and torchvision's data sets as sources of uint8 images, before they are split."""

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
    "digit_pairs": ((0.1527,), (0.3065,)),
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
    """A data set before it is split: a pool of images, and official splits if there are any."""

    pool: Split
    """Images from which the training split, and splits without an official one, are taken."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    val_size: int
    """Default number of validation images."""
    test: Split | None = None
    """Official test split; without one, test images are taken from the pool."""
    val: Split | None = None
    """Official validation split; without one, validation images are taken from the pool."""
    train_size: int | None = None
    """Default number of training images; None for all that are left."""
    test_size: int = 0
    """Number of test images taken from the pool."""
    statistics: Statistics | None = None
    """Mean and std of each channel, if they are known."""
    features: tuple[str, ...] | None = None
    """Names of the features, where the items are vectors `[N, F]` of them and no images."""
    note: str = ""
    """What is read of folders, at which size, and what is left out, where that is to be said."""


def open_digits() -> Source:
    """Open scikit-learn's 1,797 digits: 8x8, one channel, pixels of 0-16 scaled to 0-255."""
    table = _digits_table()
    pixels, labels = table[:, :-1].astype(np.float64), table[:, -1].astype(np.int64)
    images = torch.from_numpy((pixels * 255 / 16).round().astype(np.uint8)).view(-1, 1, 8, 8)
    return Source(
        Split(images, torch.from_numpy(labels)),
        DIGITS,
        val_size=400,
        train_size=100,
        test_size=1197,
        statistics=KNOWN_STATISTICS["digits"],
    )


def _digits_table() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Table of the digits, 64 pixels and the label in each row.

    The file is read directly where it is found: that takes 7 ms, importing scikit-learn seconds.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def open_torchvision(name: str, root: Path, download: bool) -> Source:
    """Open MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 with its official test split."""
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
    """Split of a torchvision data set that is in memory as uint8 `[N, H, W]` or `[N, H, W, C]`."""
    images = torch.as_tensor(dataset.data)  # type: ignore[attr-defined]
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)  # type: ignore[attr-defined]
    return Split(images, labels)


def missing(name: str, root: Path | None, download: bool, error: Exception) -> FileNotFoundError:
    """Return the error for a data set that is missing or could not be downloaded."""
    reason = " ".join(str(error).split())
    if download:
        return FileNotFoundError(f"data.download must succeed for {name}, got: {reason}")
    return FileNotFoundError(
        f"data.root must hold {name}, got {root}, which does not ({reason}): "
        "pass --set data.download=true to fetch it"
    )


def resolve_root(
    root: str | os.PathLike[str] | None, name: str, download: bool, *, file: bool = False
) -> Path:
    """Return the folder of a data set: `root`, else the environment variable SELFKD_DATA.

    Args:
        root: Folder, or none.
        name: Name of the data set.
        download: Whether the data is to be downloaded, for which the folder need not exist.
        file: Whether it may be a file as well.

    Raises:
        ValueError: Neither `root` nor the environment variable.
        FileNotFoundError: A folder that does not exist, unless the data is to be downloaded.
    """
    given = root if root is not None else os.environ.get("SELFKD_DATA")
    if not given:
        raise ValueError(
            f"data.root must be given for {name}, got none: pass --set data.root=PATH or set the "
            "environment variable SELFKD_DATA"
        )
    path = Path(given).expanduser()
    if not (path.exists() if file else path.is_dir() or download):
        kind = "file or folder" if file else "folder"
        raise FileNotFoundError(f"data.root must be an existing {kind}, got {path}")
    return path


def resized(images: Tensor, size: int) -> Tensor:
    """Scale square uint8 images to `size` pixels, bilinear with antialiasing."""
    if images.shape[-1] == size:
        return images
    scaled = images.new_empty((*images.shape[:2], size, size))
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096]
        scaled[start : start + 4096] = F.interpolate(
            part, (size, size), mode="bilinear", antialias=True
        )
    return scaled
