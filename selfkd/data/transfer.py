"""Transfer sets: further images, labelled or not, that students of teachers are trained on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.text import one_line

from .arrays import open_features
from .augmentation import Views, random_bits
from .batches import Batch, Data, Split, read_batches
from .conform import conform
from .digests import digests
from .folder import list_left_out, suffixes, walk
from .load import fingerprint, open_source
from .order import Order
from .sources import resolve_root
from .stream import Files, Stream

ARRAYS = "arrays"
FOLDER = "folder"
"""Name of a transfer set of images in a folder, without classes."""
ORDER = 2**32
"""Number added to a trial's seed, so that its items have another order than the labelled."""
_STREAM = -5  # of the random numbers by which some of its images are taken
_NAMED = 5  # images that a message names


@dataclass(frozen=True, eq=False)
class TransferSet:
    """Images that are mixed into the batches of a training split.

    The labelled images come as they would without it: the same ones, in the same order, in as many
    steps. A batch of n of them is followed by max(1, round(n weight / (1 - weight))) images of the
    transfer set, whose share of the whole batch is `weight`.
    """

    split: Split
    """Images, and their labels; these do not count without `labelled`."""
    weight: float
    """Share of each batch that is of the transfer set, in (0, 1)."""
    labelled: bool
    """Whether its labels are trained on."""
    fingerprint: str
    """Hash of the images and their normalisation, 16 hexadecimal digits."""
    places: Callable[[int], str]
    """Function from the index of an image to the file or place that it is from."""
    name: str
    """What it is, in words."""

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device | str) -> TransferSet:
        """Return the transfer set with its tensors on `device`."""
        return replace(self, split=self.split.to(device))

    def of(self, data: Data) -> Data:
        """Return data whose training split is the transfer set, for predictions of it."""
        return replace(data, train=self.split, fingerprint=self.fingerprint)

    def sizes(self, labelled: Sequence[int]) -> list[int]:
        """Return the number of images that batches of labelled images are given.

        Args:
            labelled: Number of labelled images of each batch.
        """
        return [mixed_in(count, self.weight) for count in labelled]

    def mix(
        self,
        batches: Iterator[Batch],
        labelled: Sequence[int],
        data: Data,
        *,
        epoch: int,
        seed: int,
        views: Views | None = None,
        view: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
        share: Callable[[int], range],
        channels_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, each with images of the transfer set at its end.

        These are read in passes of their own, each in another order, that go on from epoch to
        epoch; the order depends on seed and epoch alone.

        Args:
            batches: Batches of the labelled images, shared by the processes.
            labelled: Number of labelled images of each batch, of all processes.
            data: Data that the batches are of.
            epoch: Number of the epoch, from 0.
            seed: Seed of the order.
            views: Augmentation.
            view: Number of the view of each image.
            device: Device of the inputs and labels.
            workers: Number of processes that decode streamed images.
            share: Function from the size of a batch to the positions in it that this process reads.
            channels_last: Whether images have their channels last in memory.

        Returns:
            Iterator over (inputs, labels, index): the indices of the transfer set follow those of
            the training split; without `labelled`, labels are of the images before them alone.
        """
        sizes = self.sizes(labelled)
        each = sum(sizes)
        order = Order(len(self), seed + ORDER)(epoch * each, each)
        more = read_batches(
            self.split,
            order,
            sizes,
            mean=data.mean,
            std=data.std,
            views=views,
            view=view,
            device=device,
            workers=workers,
            channels_last=channels_last,
            share=share,
            classes=data.num_classes,
        )
        for count, size, own, further in zip(labelled, sizes, batches, more, strict=True):
            parts = [(own, len(share(count))), (further, len(share(size)))]
            if not any(kept for _, kept in parts):  # this process reads one image of no weight
                yield own
                continue
            (inputs, labels, index), (inputs_2, labels_2, index_2) = (
                (batch[0][:kept], batch[1][:kept], batch[2][:kept]) for batch, kept in parts
            )
            yield (
                torch.cat([inputs, inputs_2]),
                torch.cat([labels, labels_2]) if self.labelled else labels,
                torch.cat([index, index_2 + len(data.train)]),
            )

    def describe(
        self, labels: Tensor, index: Tensor, counts: Sequence[int], processes: int
    ) -> dict[str, Any]:
        """Return what a `Distiller` needs to know of a batch's images without a label.

        Args:
            labels: Labels of this process's part of the batch.
            index: Indices of its images.
            counts: Labelled images of the whole batch, and those of the transfer set.
            processes: Number of processes that share the batch.
        """
        if self.labelled:
            return {}
        share = {"labelled_share": counts[0] / sum(counts)} if processes > 1 else {}
        return {"unlabelled": len(index) - len(labels), **share}


def mixed_in(labelled: int, weight: float) -> int:
    """Return the number of transfer items that a batch of labelled items is given, at least 1.

    Args:
        labelled: Number of labelled items of the batch.
        weight: Share of the whole batch that is of the transfer set, in (0, 1).

    >>> mixed_in(20, 0.5), mixed_in(20, 0.9), mixed_in(1, 0.1)
    (20, 180, 1)
    """
    return max(1, round(labelled * weight / (1 - weight)))


def load_transfer(
    name: str,
    data: Data,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    weight: float = 0.5,
    labelled: bool = False,
    rest: Callable[[], Split] | None = None,
    label_column: str | None = None,
    fixed: bool = True,
    download: bool = False,
    in_memory: bool | None = None,
    seed: int = 0,
) -> TransferSet:
    """Load a transfer set for a data set.

    Args:
        name: Name of a data set, whose images without an official split of validation or test are
            taken; or `folder`: images in `root` and its subfolders.
        data: Labelled data, whose image size and channels the images get.
        root: Folder of the transfer set.
        size: Number of images that are taken; all if not given.
        weight: Share of each batch, in (0, 1).
        labelled: Whether the labels are trained on.
        rest: Function to the training images that are in no split, where it is the same data set.
            Those with the pixels of one in validation or test are left out.
        label_column: Column of a table that has the labels.
        fixed: Whether images of another size are refused, rather than scaled.
        download: Whether to download the data set if it is missing.
        in_memory: Whether to hold the images as uint8 tensors; by size if not given.
        seed: Random seed by which images are taken.

    Raises:
        ValueError: There is no image, fewer than `size`, one that cannot be read, is of another
            size or in colour where the data is grey, or labels are wanted of other classes.
        FileNotFoundError: A folder or data set that does not exist.

    Example:
        >>> from selfkd.data.load import load_data, load_rest
        >>> data = load_data("digits", val_size=200, reserve=1000)
        >>> rest = lambda: load_rest("digits", val_size=200, reserve=1000)
        >>> transfer = load_transfer("digits", data, size=1000, weight=0.9, rest=rest)
        >>> len(transfer), transfer.sizes([20, 20])
        (1000, [180, 180])
    """
    words, classes = name, data.class_names
    if name == FOLDER:
        found, words = _images_of_folder(root), f"{root}"
        classes = ()
    elif name == ARRAYS and rest is None and not labelled:
        found, words = _features(root, data), f"{root}"
    elif rest is not None:
        found, words = _without_held_out(rest(), data), f"the training images of {name} in no split"
        if not len(found):
            raise ValueError(
                f"data.transfer must leave training images of {name}, got none beside the "
                f"{len(data.train):,} that are labelled: set data.train_size, or name other data"
            )
    else:
        with _naming_transfer_keys():
            size_of = None if fixed else data.image_size
            source = open_source(name, root, download, size_of, label_column)
        found, classes = source.pool, tuple(source.class_names)
    if labelled and tuple(map(str, classes)) != tuple(map(str, data.class_names)):
        have = "of other classes than" if classes else "without the classes of"
        raise ValueError(
            f"data.transfer.labels must be false for images {have} {data.name}, got True for {name}"
        )
    if size is not None and size > len(found):
        raise ValueError(
            f"data.transfer.size must be at most {len(found):,}, the images of {words}, "
            f"got {size:,}"
        )
    chosen = torch.arange(len(found))
    if size is not None:
        bits = random_bits(seed, chosen, _STREAM, 1)[:, 0]
        chosen = bits.argsort(stable=True)[:size].sort().values
        found = found.take(chosen)
    places = _places(found, chosen, words)
    found = conform(found, data, words, fixed=fixed, in_memory=in_memory)
    blank = replace(found, labels=torch.zeros_like(found.labels))
    return TransferSet(
        split=found if labelled else blank,
        weight=weight,
        labelled=labelled,
        fingerprint=fingerprint(blank, mean=data.mean, std=data.std),
        places=places,
        name=words,
    )


@contextmanager
def _naming_transfer_keys() -> Iterator[None]:
    """Have messages on data name the keys of the transfer set."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        text = str(error).replace("data.name must", "data.transfer.name must")
        raise kind(text.replace("data.root must", "data.transfer.root must")) from error


def _features(root: str | os.PathLike[str] | None, data: Data) -> Split:
    """Return arrays without their labels."""
    if data.features is None:
        raise ValueError(f"data.transfer.name must be of images, as {data.name} is, got arrays")
    with _naming_transfer_keys():
        place = resolve_root(root, ARRAYS, download=False, file=True)
        return open_features(place, data.features)


def _images_of_folder(root: str | os.PathLike[str] | None) -> Split:
    """Return the images of a folder and its subfolders, of no size and class yet."""
    if root is None:
        raise ValueError("data.transfer.root must be given for name folder, got none")
    path, left_out = Path(root).expanduser(), Counter[str]()
    if not path.is_dir():
        raise FileNotFoundError(f"data.transfer.root must be an existing folder, got {path}")
    names = [
        found.removeprefix("./") for found in walk(path, ".", frozenset(), left_out, suffixes())
    ]
    if not names:
        without = f" (left out: {list_left_out(left_out)})" if left_out else ""
        raise ValueError(f"data.transfer.root must hold images, got none in {path}{without}")
    stream = Stream(Files(path, names), torch.arange(len(names)), 1, "RGB")
    return Split(stream, torch.zeros(len(names), dtype=torch.int64))


def _without_held_out(rest: Split, data: Data) -> Split:
    """Return images without those in memory that have the pixels of one in validation or test."""
    if isinstance(rest.images, Stream):
        return rest
    kept = [data.val, data.test]
    held = [split.images for split in kept if isinstance(split.images, Tensor)]
    if any(images.shape[1:] != rest.images.shape[1:] for images in held):  # they are scaled
        return rest
    known = {digest for images in held for digest in digests(images)}
    apart = [digest not in known for digest in digests(rest.images)]
    return rest if all(apart) else rest.take(torch.tensor(apart).nonzero()[:, 0])


def _places(found: Split, chosen: Tensor, words: str) -> Callable[[int], str]:
    images = found.images
    if isinstance(images, Stream):
        return lambda number: images.pictures.where(int(images.positions[number]))
    return lambda number: f"image {int(chosen[number])} of {words}"


def check_leaks(transfer: TransferSet, data: Data) -> str:
    """Check that no image of a transfer set stands in validation or test; return what it has.

    Images are compared by their pixels, as they are trained on.

    Args:
        transfer: Transfer set.
        data: Labelled data.

    Returns:
        Its size, and how many of its images also stand in training, in words.

    Raises:
        ValueError: Images that stand in validation or test; says how many, and names some.
    """
    held, item = dict[bytes, str](), "image" if data.features is None else "row"
    for split in ("val", "test"):
        for number, digest in enumerate(digests(getattr(data, split).images)):
            held.setdefault(digest, f"{item} {number} of {split}")
    train = set(digests(data.train.images))
    found = list(digests(transfer.split.images))
    leaks = [number for number, digest in enumerate(found) if digest in held]
    if leaks:
        named = "; ".join(
            f"{transfer.places(number)} is {held[found[number]]}" for number in leaks[:_NAMED]
        )
        many = f"{len(leaks):,} of {len(found):,}" if len(leaks) < len(found) else "all"
        more = f"; and {len(leaks) - _NAMED:,} more" if len(leaks) > _NAMED else ""
        raise ValueError(
            one_line(
                f"data.transfer must have no {item} of validation or test, got {many} that are "
                f"({named}{more}): remove them from it, or name other data"
            )
        )
    twice = sum(digest in train for digest in found)
    also = f", {twice:,} of them also in training" if twice else ""
    labels = "with labels" if transfer.labelled else "without labels"
    share = mixed_in(100, transfer.weight)
    return one_line(
        f"transfer set: {len(found):,} {item}s {labels} ({transfer.name}){also}; "
        f"a batch has {share} of them for 100 labelled ones"
    )
