"""Stratified splits as pure functions of (seed, image position)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfkd.data.augmentation import random_bits

_VAL, _TEST, _TRAIN = -1, -2, -3  # streams of their own; views count up from 0


def divide(
    labels: Tensor,
    *,
    train_size: int | None,
    val_size: int,
    test_size: int = 0,
    num_classes: int,
    classes: Sequence[int] | None = None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a pool of images into train, val and test, each with the classes in proportion.

    val is taken first, then test, then train: val depends on the seed and its own size alone, and
    a smaller training set is a part of a larger one. test gives way to a larger train.

    Args:
        labels: int64 `[N]` of the pool.
        train_size: images to train on; None for all that are left.
        val_size: images to choose by; 0 where they are not part of the pool.
        test_size: images to test on at most, 0 where the test set is not part of the pool.
        num_classes: the training split has at least one image of each, where the pool does.
        classes: those that train has images of; all when not given.
        seed: any integer.

    Returns:
        Positions in the pool, int64, ascending: train, val, test.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> labels = torch.tensor([0, 1] * 10)
        >>> train, val, _ = divide(labels, train_size=4, val_size=6, num_classes=2, seed=0)
        >>> labels[train].bincount().tolist(), labels[val].bincount().tolist()
        ([2, 2], [3, 3])
    """
    wanted = range(num_classes) if classes is None else classes
    least = len(wanted) if train_size is None else train_size
    room = len(labels) - least - int(test_size > 0)
    if least < len(wanted):
        raise ValueError(
            f"data.train_size must be at least the number of classes ({len(wanted)}), got {least}"
        )
    if room < int(val_size > 0):
        raise ValueError(
            f"data.train_size must leave images to hold out of the {len(labels)} that there are, "
            f"got {least}"
        )
    if not 0 <= val_size <= room:
        raise ValueError(
            f"data.val_size must be in [1, {room}] beside {least} training images out of "
            f"{len(labels)}, got {val_size}"
        )
    everything = torch.arange(len(labels))
    val, rest = _take(labels, everything, val_size, seed, _VAL)
    test_size = min(test_size, len(rest) - least)
    test, rest = _take(labels, rest, test_size, seed, _TEST)
    rest = rest[torch.isin(labels[rest], torch.tensor(wanted, dtype=labels.dtype))]
    if train_size is not None and train_size > len(rest):
        raise ValueError(
            f"data.train_size must be at most {len(rest)}, the images of data.classes, "
            f"got {train_size}"
        )
    train, _ = _take(labels, rest, len(rest) if train_size is None else train_size, seed, _TRAIN)
    return train, val, test


def subset(labels: Tensor, size: int, *, seed: int) -> Tensor:
    """Positions, ascending, of `size` images with the classes in proportion."""
    return _take(labels, torch.arange(len(labels)), size, seed, _VAL)[0]


def _take(
    labels: Tensor, among: Tensor, size: int, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Positions taken from `among`, and those left, both ascending."""
    order = among[_stratified_order(labels[among], among, seed, stream)]
    return order[:size].sort().values, order[size:].sort().values


def _stratified_order(labels: Tensor, position: Tensor, seed: int, stream: int) -> Tensor:
    """A shuffle whose every beginning has the classes in proportion.

    The j-th of a class's n images stands at (j + 1/2) / n of the whole. For training one image of
    each class stands first of all; what is held out leaves a class's last image to training.
    """
    shuffle, tie = random_bits(seed, position, stream, 2).unbind(1)
    by_chance = shuffle.argsort(stable=True)
    by_class = by_chance[labels[by_chance].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    place = (rank.to(torch.float64) + 0.5) / counts[labels]
    if stream == _TRAIN:
        place[rank == 0] = 0
    else:
        place[rank == counts[labels] - 1] = 1
    by_tie = tie.argsort(stable=True)
    order: Tensor = by_tie[place[by_tie].argsort(stable=True)]
    return order
