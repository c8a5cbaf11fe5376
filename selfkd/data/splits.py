"""Stratified splits as a pure function of (seed, image position)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfkd.data.augmentation import random_bits

# streams of random numbers; those of views count up from 0
_VAL, _TEST, _TRAIN, _NOISE = -1, -2, -3, -4


def divide(
    labels: Tensor,
    *,
    train_size: int | None,
    val_size: int,
    test_size: int = 0,
    num_classes: int,
    classes: Sequence[int] | None = None,
    reserve: int = 0,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a pool of images into train, val and test, stratified by label.

    Validation images are taken first, then test, then training images. So the validation split
    depends on the seed and its own size alone, and a smaller training split is part of a larger
    one. A larger training split may make the test split smaller.

    Args:
        labels: Class indices of the pool, int64 `[N]`.
        train_size: Number of training images; None for all that are left.
        val_size: Number of validation images; 0 if they are not part of the pool.
        test_size: Largest number of test images; 0 if they are not part of the pool.
        num_classes: Number of classes; the training split has at least one image of each class
            that the pool has.
        classes: Classes whose images the training split has; all if not given.
        reserve: Number of images that are in none of the splits, at least; without `train_size`
            training takes what there is.
        seed: Random seed, any integer.

    Returns:
        Positions of train, val and test in the pool, int64, ascending.

    Raises:
        ValueError: Sizes that do not fit the pool.

    Example:
        >>> labels = torch.tensor([0, 1] * 10)
        >>> train, val, _ = divide(labels, train_size=4, val_size=6, num_classes=2, seed=0)
        >>> labels[train].bincount().tolist(), labels[val].bincount().tolist()
        ([2, 2], [3, 3])
    """
    selected = range(num_classes) if classes is None else classes
    least = len(selected) if train_size is None else train_size
    room = len(labels) - least - int(test_size > 0)
    if least < len(selected):
        raise ValueError(
            f"data.train_size must be at least the number of classes ({len(selected)}), got {least}"
        )
    if room < int(val_size > 0):
        raise ValueError(
            f"data.train_size must leave images to hold out of the {len(labels)} that there are, "
            f"got {least}"
        )
    if train_size is None:
        reserve = 0
    most = max(room - max(val_size, 1), 0)
    if reserve > most:
        raise ValueError(
            f"data.transfer.size must be at most {most:,}, the images that are left beside "
            f"data.train_size ({train_size:,}) and data.val_size ({val_size:,}) out of "
            f"{len(labels):,}, got {reserve:,}"
        )
    if not 0 <= val_size <= room:
        raise ValueError(
            f"data.val_size must be in [1, {room}] beside {least} training images out of "
            f"{len(labels)}, got {val_size}"
        )
    everything = torch.arange(len(labels))
    val, rest = _take(labels, everything, val_size, seed, _VAL)
    test_size = min(test_size, len(rest) - least - reserve)
    test, rest = _take(labels, rest, test_size, seed, _TEST)
    rest = rest[torch.isin(labels[rest], torch.tensor(selected, dtype=labels.dtype))]
    if train_size is not None and train_size > len(rest):
        raise ValueError(
            f"data.train_size must be at most {len(rest)}, the images of data.classes, "
            f"got {train_size}"
        )
    train, _ = _take(labels, rest, len(rest) if train_size is None else train_size, seed, _TRAIN)
    return train, val, test


def subset(labels: Tensor, size: int, *, seed: int) -> Tensor:
    """Return the ascending positions of `size` images, stratified by label."""
    return _take(labels, torch.arange(len(labels)), size, seed, _VAL)[0]


def redraw(
    labels: Tensor, position: Tensor, share: float, *, classes: Sequence[int], seed: int
) -> Tensor:
    """Return labels of which a share is drawn anew, uniformly from `classes`.

    The same images are drawn in any call with the same seed and positions, and those of a smaller
    share are among those of a larger one. A class that is drawn may be the one that was there: of
    ten classes, a tenth of the draws change nothing.

    Args:
        labels: Class indices, int64 `[N]`.
        position: Positions of the images in their pool, int64 `[N]`.
        share: Share of the labels to draw anew, in [0, 1); rounded to a number of images.
        classes: Classes to draw from.
        seed: Random seed, any integer.

    Returns:
        Class indices, int64 `[N]`.

    Example:
        >>> redraw(torch.zeros(8).long(), torch.arange(8), 0.5, classes=range(10), seed=0)
        tensor([4, 0, 4, 0, 1, 0, 2, 0])
    """
    order, drawn = random_bits(seed, position, _NOISE, 2).unbind(1)
    chosen = order.argsort(stable=True)[: round(share * len(labels))]
    among = torch.tensor(classes, dtype=labels.dtype)
    labels = labels.clone()
    labels[chosen] = among[drawn[chosen] * len(among) >> 32]
    return labels


def _take(
    labels: Tensor, among: Tensor, size: int, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Return `size` positions taken from `among` and those left, both ascending."""
    order = among[_stratified_order(labels[among], among, seed, stream)]
    return order[:size].sort().values, order[size:].sort().values


def _stratified_order(labels: Tensor, position: Tensor, seed: int, stream: int) -> Tensor:
    """Return a shuffled order of which every beginning has the classes in proportion.

    The j-th of a class's n images is at (j + 1/2) / n of the order. For training, one image of each
    class comes first; for validation and test, the last image of each class comes last, so that it
    is left for training.
    """
    shuffle, tie = random_bits(seed, position, stream, 2).unbind(1)
    shuffled = shuffle.argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    fraction = (rank.to(torch.float64) + 0.5) / counts[labels]
    if stream == _TRAIN:
        fraction[rank == 0] = 0
    else:
        fraction[rank == counts[labels] - 1] = 1
    by_tie = tie.argsort(stable=True)
    order: Tensor = by_tie[fraction[by_tie].argsort(stable=True)]
    return order
