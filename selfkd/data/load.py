"""Loading of a data set by name into splits, with normalisation and fingerprint."""

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .arrays import SUFFIXES, open_arrays, standardisation
from .batches import Data, Split
from .decode import decode, keep
from .folder import open_folder
from .pairs import open_pairs
from .saved import is_saved, open_saved
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
from .splits import divide, redraw, subset
from .stream import Stream
from .timm_sets import PREFIXES, ROOTLESS, TORCH_NAMES, open_timm

log = logging.getLogger(__name__)
MEMORY_LIMIT = 2_000_000_000
"""Size in bytes of the decoded images up to which they are held in memory."""
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and std of ImageNet, for streamed images in colour."""
GREY: Statistics = ((0.449,), (0.226,))
"""Mean and std of ImageNet over its channels, for streamed images of one channel."""


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
    label_noise: float = 0.0,
    label_column: str | None = None,
    reserve: int = 0,
    test_size: int | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set in three disjoint splits, stratified by label.

    | name | images | train, val, test by default |
    |---|---|---|
    | `digits` | scikit-learn's, 8x8, embedded | 100, 400, 1,197 |
    | `digit_pairs` | two of them side by side, 16x16, 100 classes | 4,000, 2,000, 5,000, of \
different digits |
    | `mnist`, `fashion_mnist` | 28x28 | 50,000, 10,000, the official 10,000 |
    | `cifar10`, `cifar100` | 32x32, 3 channels | 45,000, 5,000, the official 10,000 |
    | `folder` | root/train/<class>/<image>, root/test and root/val (or validation, valid) | a \
tenth of train is held out where there is no val; val is the test split where there is no test |
    | `folder` | a folder of `datasets.save_to_disk`, with a column of images and one of classes | \
its splits as those folders; of a single one a tenth is test, too |
    | `torch/…`, `hfds/…`, `tfds/…`, … | any set of `timm.data.create_dataset` | as for `folder` |
    | `arrays` | features `[N, F]` in a .npz, CSV or Parquet file, or a folder of .npy | as for \
`folder`; of a single split a tenth is test, too |

    Args:
        name: Name of the data set, one of those above.
        root: Folder of the data, or file of arrays; the environment variable SELFKD_DATA if not
            given.
        download: Whether to download the data into `root` if it is missing.
        train_size: Number of training images, at least one for each class.
        val_size: Number of validation images; the same images for any `train_size`.
        classes: Classes whose images are trained on; all if not given. Validation, test and the
            logits have all classes.
        image_size: Height and width in pixels. By default the data set's own; for folders and
            timm's data sets the median of the training images' shorter sides, at most 64.
        in_memory: Whether to hold all images as uint8 tensors, or to decode those of a folder or of
            a timm data set batch by batch; by size if not given (up to 2 GB are held).
        label_noise: Share of the training labels that are drawn anew, uniformly from the classes
            that are trained on, in [0, 1). Validation and test keep their labels.
        label_column: Column of a table of `arrays` that has the labels; by name (label, target,
            class or y), else the last, if not given.
        reserve: Number of images that are left beside the splits, for `load_rest`: where test
            images are taken from the training images, these are fewer.
        test_size: Height and width in pixels of the images of validation and test; those of the
            training images if not given.
        seed: Random seed of the splits and of the label noise.

    Returns:
        The data. Mean and std are the known ones of the data set, else those of the training
        split, else, if images are streamed, ImageNet's.

    Raises:
        ValueError: A name, size or image that cannot be used, a single class, or a class without a
            training image.
        FileNotFoundError: A folder or data set that does not exist.

    Example:
        >>> data = load_data("digits")
        >>> len(data.train), len(data.val), len(data.test), data.in_chans, data.image_size
        (100, 400, 1197, 1, 8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs, labels, index = next(data.batches("train", batch_size=50, generator=generator))
        >>> inputs.shape, inputs.dtype
        (torch.Size([50, 1, 8, 8]), torch.float32)
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"data.image_size must be at least 1, got {image_size}")
    if val_size is not None and val_size < 1:
        raise ValueError(f"data.val_size must be at least 1, got {val_size}")
    if not 0 <= label_noise < 1:
        raise ValueError(f"data.label_noise must be in [0, 1), got {label_noise}")
    source = open_source(name, root, download, image_size, label_column)
    if len(source.class_names) < 2:
        only = ", ".join(source.class_names)
        raise ValueError(
            f"data.{'root' if root else 'name'} must hold at least 2 classes, got {only} alone in "
            f"{root or name}: with one class there is nothing to learn; add images of another"
        )
    selected = _training_classes(classes, source.class_names)
    splits, _ = _split(source, train_size, val_size, selected, label_noise, reserve, seed)
    sizes = (image_size, test_size or image_size, test_size or image_size)
    keys = ("data.image_size", *["data.image_size" if test_size is None else "data.test_size"] * 2)
    if test_size is not None:
        splits = (splits[0], _at_size(splits[1], test_size), _at_size(splits[2], test_size))
    notes = dict.fromkeys([source.note] if source.note else [])
    train, val, test = (
        resolve_images(name, split, size, in_memory, splits, say=notes.setdefault, key=key)
        for split, size, key in zip(splits, sizes, keys, strict=True)
    )
    mean, std = source.statistics or _statistics(train)
    digest = fingerprint(train, mean=mean, std=std)
    for note in notes:
        _log_once(note)
    names, features = source.class_names, source.features
    note = "; ".join(notes)
    return Data(name, train, val, test, names, train.image_size, mean, std, digest, note, features)


def _at_size(split: Split, size: int) -> Split:
    """Return a split whose images are to be decoded at a size; others are scaled later."""
    images = split.images
    return (
        replace(split, images=replace(images, image_size=size))
        if isinstance(images, Stream)
        else split
    )


def scaled(split: Split, size: int) -> Split:
    """Return a split with its images at a size, decoded or from those in memory."""
    if isinstance(split.images, Tensor) and split.images.ndim == 4:
        return replace(split, images=resized(split.images, size))
    return _at_size(split, size)


def load_rest(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    train_size: int | None = None,
    val_size: int | None = None,
    classes: Sequence[int] | None = None,
    image_size: int | None = None,
    label_column: str | None = None,
    reserve: int = 0,
    seed: int = 0,
) -> Split:
    """Load the training images of a data set that are in no split of `load_data`.

    Args:
        name: Name of the data set.
        root: Folder of the data.
        download: Whether to download the data into `root` if it is missing.
        train_size: Number of training images.
        val_size: Number of validation images.
        classes: Classes whose images are trained on; those of others are among the rest.
        image_size: Height and width in pixels.
        label_column: Column of a table of `arrays` that has the labels.
        reserve: Number of images that are left at least.
        seed: Random seed of the splits.

    Returns:
        Images and labels, as the data set has them; those of a folder are not decoded yet.

    Example:
        >>> len(load_rest("digits")), len(load_rest("digits", val_size=200, reserve=1000))
        (100, 1000)
    """
    source = open_source(name, root, download, image_size, label_column)
    selected = _training_classes(classes, source.class_names)
    _, rest = _split(source, train_size, val_size, selected, 0.0, reserve, seed)
    return source.pool.take(rest)


@lru_cache
def _log_once(note: str) -> None:
    log.warning("%s", note)


def open_source(
    name: str,
    root: str | os.PathLike[str] | None,
    download: bool,
    image_size: int | None,
    label_column: str | None = None,
) -> Source:
    """Open a data set by its name, before it is split; arguments are those of `load_data`."""
    prefix, slash, _ = name.partition("/")
    if name == "digits":
        return open_digits()
    if name == "digit_pairs":
        return open_pairs()
    if name in TORCHVISION:
        return open_torchvision(name, resolve_root(root, name, download), download)
    if name == "arrays":
        if image_size is not None:
            raise ValueError(f"data.image_size must be left out for arrays, got {image_size}")
        return open_arrays(resolve_root(root, name, download=False, file=True), label_column)
    if name == "folder":
        folder = resolve_root(root, name, download=False)
        return (
            open_saved(folder, image_size) if is_saved(folder) else open_folder(folder, image_size)
        )
    if name in TORCH_NAMES or (slash and prefix in PREFIXES and prefix != "torch"):
        rootless = root is None and prefix in ROOTLESS
        place = None if rootless else resolve_root(root, name, download)
        return open_timm(name, place, download, image_size, MEMORY_LIMIT)
    names = (*KNOWN_STATISTICS, "folder", "arrays")
    close = difflib.get_close_matches(name, (*names, *TORCH_NAMES), n=1)
    way = f": did you mean {close[0]}?" if close else ""
    if name.lower().endswith(SUFFIXES):
        way = f": --data arrays --data-root {name}"
    raise ValueError(
        f"data.name must be one of {', '.join(names)} or a timm data set name (torch/…, hfds/…, "
        f"tfds/…), got {name!r}{way}"
    )


def _training_classes(classes: Sequence[int] | None, class_names: Sequence[str]) -> list[int]:
    selected = list(range(len(class_names)) if classes is None else dict.fromkeys(classes))
    if wrong := [label for label in selected if not 0 <= label < len(class_names)]:
        raise ValueError(f"data.classes must be in [0, {len(class_names) - 1}], got {wrong[0]}")
    if len(selected) < 2:
        raise ValueError(
            f"data.classes must be at least 2 classes, got {list(classes or ())}: with one class "
            "there is nothing to learn; add another, or leave data.classes out for all"
        )
    return selected


def _split(
    source: Source,
    train_size: int | None,
    val_size: int | None,
    classes: list[int],
    label_noise: float,
    reserve: int,
    seed: int,
) -> tuple[tuple[Split, Split, Split], Tensor]:
    """Return the splits, and the positions in the pool of what is in none of them."""
    pool, val, test = source.pool, source.val, source.test
    if val is not None and val_size is not None:
        if val_size > len(val):
            raise ValueError(
                f"data.val_size must be at most {len(val)}, the images in val, got {val_size}"
            )
        val = val.take(subset(val.labels, val_size, seed=seed))
    if train_size is None and len(classes) == len(source.class_names):
        train_size = source.train_size
    in_train, in_val, in_test = divide(
        pool.labels,
        train_size=train_size,
        val_size=0 if val else source.val_size if val_size is None else val_size,
        test_size=source.test_size,
        num_classes=len(source.class_names),
        classes=classes,
        reserve=reserve,
        seed=seed,
    )
    train = pool.take(in_train)
    _check_classes(train, source, classes)
    if label_noise:
        noisy = redraw(train.labels, in_train, label_noise, classes=classes, seed=seed)
        train = replace(train, labels=noisy)
    unused = torch.ones(len(pool), dtype=torch.bool)
    unused[torch.cat([in_train, in_val, in_test])] = False
    splits = (train, val or pool.take(in_val), test or pool.take(in_test))
    return splits, unused.nonzero()[:, 0]


def resolve_images(
    name: str,
    split: Split,
    image_size: int | None,
    in_memory: bool | None,
    splits: Sequence[Split],
    say: Callable[[str], object] = log.warning,
    *,
    key: str = "data.image_size",
) -> Split:
    """Return the split with its images decoded, scaled, or left to be streamed."""
    images = split.images
    if isinstance(images, Stream):
        total = sum(part.images.nbytes for part in splits)
        hold = total <= MEMORY_LIMIT if in_memory is None else in_memory
        return replace(split, images=decode(images, say) if hold else keep(images, say))
    if in_memory is False:
        raise ValueError(f"data.in_memory must be true or not given for {name}, got False")
    if image_size is not None:
        total = sum(len(part) for part in splits) * images.shape[1] * image_size**2
        if total > MEMORY_LIMIT:
            streamed = f"torch/{name}"
            way = (
                f", or stream it with --set data.name={streamed}" if streamed in TORCH_NAMES else ""
            )
            raise ValueError(
                f"{key} must keep {name} within {MEMORY_LIMIT:,} bytes, got {image_size}: lower it "
                f"or data.train_size{way}"
            )
        return replace(split, images=resized(images, image_size))
    return split


def _check_classes(train: Split, source: Source, classes: Sequence[int]) -> None:
    counts = train.labels.bincount(minlength=len(source.class_names)).tolist()
    absent = [repr(source.class_names[label]) for label in classes if not counts[label]]
    if absent:
        raise ValueError(
            f"every class must have a training image, got none of {', '.join(absent)}"
            + (f" ({source.note})" if source.note else "")
        )


def _statistics(train: Split) -> Statistics:
    """Mean and std of each channel, of pixels in [0, 1]; ImageNet's if images are streamed.

    Of features they are those of their own values.
    """
    if isinstance(train.images, Stream):
        return GREY if train.images.mode == "L" else IMAGENET
    if train.images.ndim == 2:
        return standardisation(train.images)
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
    """Hash of what cached logits of a split depend on: its images, labels and normalisation.

    Streamed images are identified by path and file size, so that an edit that keeps both is not
    detected.

    Args:
        split: Images and labels.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1].

    Returns:
        16 hexadecimal digits.
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
