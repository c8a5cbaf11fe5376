"""`load_data`: a data set by name, split, normalised and fingerprinted."""

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .batches import Data, Split
from .folder import open_folder
from .sources import (
    KNOWN_STATISTICS,
    TORCHVISION,
    Source,
    Statistics,
    open_digits,
    open_torchvision,
    resized,
    resolve_root,
)
from .splits import divide, subset
from .stream import Stream
from .timm_sets import PREFIXES, ROOTLESS, TORCH_NAMES, open_timm

MEMORY_LIMIT = 2_000_000_000
"""Decoded bytes up to which images are held in memory."""
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY: Statistics = ((0.449,), (0.226,))


def load_data(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    train_size: int | None = None,
    val_size: int | None = None,
    classes: Sequence[int] | None = None,
    image_size: int | None = None,
    in_memory: bool | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set in three disjoint splits, stratified by label.

    | name | images | train, val, test by default |
    |---|---|---|
    | `digits` | scikit-learn's, 8x8, embedded | 200, 400, 1,197 |
    | `mnist`, `fashion_mnist` | 28x28 | 50,000, 10,000, the official 10,000 |
    | `cifar10`, `cifar100` | 32x32, 3 channels | 45,000, 5,000, the official 10,000 |
    | `folder` | root/train/<class>/<image>, root/test and root/val | a tenth of train is held out \
where there is no val; val is the test split where there is no test |
    | `torch/…`, `hfds/…`, `tfds/…`, … | any set of `timm.data.create_dataset` | as for `folder` |

    Args:
        name: one of the names above.
        root: where the data lies; the environment variable SELFKD_DATA when it is not given.
        download: fetch the data into `root` when it is not there.
        train_size: images to train on, at least one for each class.
        val_size: images to choose by; the same ones whatever `train_size` is.
        classes: those whose images are trained on, all when not given; validation and test have
            all, and so have the logits.
        image_size: side in pixels. A set's own by default; for folders and timm's sets the
            shorter side of the first training image, at most 64.
        in_memory: hold all images as uint8 tensors, or decode a folder's or timm set's images
            batch by batch; by size when not given (up to 2 GB is held).
        seed: of the splits.

    Returns:
        The data. Mean and std are the set's well-known ones, else those of the training split,
        else, where images are streamed, ImageNet's.

    Raises:
        ValueError: for a name, a size or an image that cannot be used, or a class without a
            training image.
        FileNotFoundError: for a folder or data set that is not there.

    Example:
        >>> data = load_data("digits")
        >>> len(data.train), len(data.val), len(data.test), data.in_chans, data.image_size
        (200, 400, 1197, 1, 8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs, labels, index = next(data.batches("train", batch_size=50, generator=generator))
        >>> inputs.shape, inputs.dtype
        (torch.Size([50, 1, 8, 8]), torch.float32)
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"data.image_size must be at least 1, got {image_size}")
    if val_size is not None and val_size < 1:
        raise ValueError(f"data.val_size must be at least 1, got {val_size}")
    source = _open(name, root, download, image_size)
    wanted = _wanted(classes, source.class_names)
    splits = _split(source, train_size, val_size, wanted, seed)
    _check_classes(splits[0], source.class_names, wanted)
    train, val, test = (_held(name, split, image_size, in_memory, splits) for split in splits)
    mean, std = source.statistics or _statistics(train)
    size = train.images.shape[-1] if isinstance(train.images, Tensor) else train.images.image_size
    mark = fingerprint(train, mean=mean, std=std)
    return Data(name, train, val, test, source.class_names, size, mean, std, mark)


def _open(
    name: str, root: str | os.PathLike[str] | None, download: bool, image_size: int | None
) -> Source:
    prefix, slash, _ = name.partition("/")
    if name == "digits":
        return open_digits()
    if name in TORCHVISION:
        return open_torchvision(name, resolve_root(root, name, download), download)
    if name == "folder":
        return open_folder(resolve_root(root, name, download=False), image_size)
    if name in TORCH_NAMES or (slash and prefix in PREFIXES and prefix != "torch"):
        rootless = root is None and prefix in ROOTLESS
        place = None if rootless else resolve_root(root, name, download)
        return open_timm(name, place, download, image_size, MEMORY_LIMIT)
    names = (*KNOWN_STATISTICS, "folder")
    close = difflib.get_close_matches(name, (*names, *TORCH_NAMES), n=1)
    raise ValueError(
        f"data.name must be one of {', '.join(names)} or a timm data set name (torch/…, hfds/…, "
        f"tfds/…), got {name!r}" + (f": did you mean {close[0]}?" if close else "")
    )


def _wanted(classes: Sequence[int] | None, class_names: Sequence[str]) -> list[int]:
    """The classes to train on."""
    wanted = list(range(len(class_names)) if classes is None else dict.fromkeys(classes))
    if wrong := [label for label in wanted if not 0 <= label < len(class_names)]:
        raise ValueError(f"data.classes must be in [0, {len(class_names) - 1}], got {wrong[0]}")
    return wanted


def _split(
    source: Source, train_size: int | None, val_size: int | None, wanted: list[int], seed: int
) -> tuple[Split, Split, Split]:
    pool, val, test = source.pool, source.val, source.test
    if val is not None and val_size is not None:
        if val_size > len(val):
            raise ValueError(
                f"data.val_size must be at most {len(val)}, the images in val, got {val_size}"
            )
        val = val.take(subset(val.labels, val_size, seed=seed))
    if train_size is None and len(wanted) == len(source.class_names):
        train_size = source.train_size
    in_train, in_val, in_test = divide(
        pool.labels,
        train_size=train_size,
        val_size=0 if val else source.val_size if val_size is None else val_size,
        test_size=source.test_size,
        num_classes=len(source.class_names),
        classes=wanted,
        seed=seed,
    )
    return pool.take(in_train), val or pool.take(in_val), test or pool.take(in_test)


def _held(
    name: str,
    split: Split,
    image_size: int | None,
    in_memory: bool | None,
    splits: tuple[Split, Split, Split],
) -> Split:
    """The split as it is used: decoded, scaled, or left to be streamed."""
    images = split.images
    if isinstance(images, Stream):
        total = sum(part.images.nbytes for part in splits)
        hold = total <= MEMORY_LIMIT if in_memory is None else in_memory
        return replace(split, images=images.decode()) if hold else split
    if in_memory is False:
        raise ValueError(f"data.in_memory must be true or not given for {name}, got False")
    if image_size is not None:
        total = sum(len(part) for part in splits) * images.shape[1] * image_size**2
        if total > MEMORY_LIMIT:
            raise ValueError(
                f"data.image_size must keep {name} within {MEMORY_LIMIT:,} bytes, got {image_size}:"
                f" lower data.train_size, or stream it with --set data.name=torch/{name}"
            )
        return replace(split, images=resized(images, image_size))
    return split


def _check_classes(train: Split, class_names: tuple[str, ...], wanted: Sequence[int]) -> None:
    counts = train.labels.bincount(minlength=len(class_names)).tolist()
    absent = [repr(class_names[label]) for label in wanted if not counts[label]]
    if absent:
        raise ValueError(f"every class must have a training image, got none of {', '.join(absent)}")


def _statistics(train: Split) -> Statistics:
    """Mean and std of pixels in [0, 1] by channel, exact from counts; ImageNet's for a stream."""
    if isinstance(train.images, Stream):
        return GREY if train.images.mode == "L" else IMAGENET
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in train.images.unbind(1):
        share = channel.flatten().bincount(minlength=256).to(torch.float64)
        share /= share.sum()
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum().sqrt().item()
        means.append(round(mean.item(), 6))
        stds.append(round(std, 6) or 1.0)  # a channel of one colour only
    return tuple(means), tuple(stds)


def fingerprint(split: Split, *, mean: Sequence[float], std: Sequence[float]) -> str:
    """What a stored answer to a split depends on: its images, labels and normalisation.

    Streamed images are known by path and file size: an edit that keeps both goes unseen.
    """
    images = split.images
    facts: dict[str, object] = {"mean": list(mean), "std": list(std)}
    if isinstance(images, Stream):
        facts |= {"keys": images.keys(), "image_size": images.image_size, "mode": images.mode}
    else:
        facts |= {"shape": list(images.shape)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(split.labels.cpu().numpy().data)
    if isinstance(images, Tensor):
        digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
