"""Digit pairs: two digits of scikit-learn's side by side, 100 classes, without a download."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .augmentation import random_bits
from .batches import Split
from .sources import KNOWN_STATISTICS, Source, open_digits
from .splits import divide

CLASSES = tuple(f"{number:02}" for number in range(100))
DIGITS_OF = {"train": 600, "val": 300, "test": 897}
"""Number of digits that the pairs of a split are made of."""
PAIRS_OF = {"train": 100, "val": 20, "test": 50}
"""Number of pairs of each class that a split has; of train, that there are to choose from."""
TRAIN_SIZE = 4000
_SEED = 0  # of the digits and the pairs: the same in all runs
_STREAM = -5


@lru_cache(maxsize=1)
def open_pairs() -> Source:
    """Open pairs of digits: 16x16, one channel, the class its number of two digits.

    The digits are divided first, 600 for training, 300 for validation and 897 for test, and the
    pairs of a split are made of its own: no digit of validation or test is in a training pair. The
    two 8x8 images stand side by side, with 4 lines of background above and below.

    Example:
        >>> source = open_pairs()
        >>> len(source.pool), len(source.val), len(source.test), source.class_names[42]
        (10000, 2000, 5000, '42')
    """
    digits = open_digits().pool
    parts = divide(
        digits.labels,
        train_size=DIGITS_OF["train"],
        val_size=DIGITS_OF["val"],
        test_size=DIGITS_OF["test"],
        num_classes=10,
        seed=_SEED,
    )
    splits = {
        name: _pairs(digits, part, count)
        for (name, count), part in zip(PAIRS_OF.items(), parts, strict=True)
    }
    return Source(
        splits["train"],
        CLASSES,
        val_size=len(splits["val"]),
        val=splits["val"],
        test=splits["test"],
        train_size=TRAIN_SIZE,
        statistics=KNOWN_STATISTICS["digit_pairs"],
    )


def _pairs(digits: Split, part: Tensor, count: int) -> Split:
    """Return `count` different pairs of each class, of the digits at `part`."""
    of_digit = [part[digits.labels[part] == digit] for digit in range(10)]
    left, right = [], []
    for tens in of_digit:
        for ones in of_digit:
            pairs = torch.cartesian_prod(tens, ones)
            bits = random_bits(_SEED, pairs[:, 0] * len(digits) + pairs[:, 1], _STREAM, 1)[:, 0]
            chosen = pairs[bits.argsort(stable=True)[:count]]
            left.append(chosen[:, 0])
            right.append(chosen[:, 1])
    halves = [digits.take(torch.cat(side)).images for side in (left, right)]
    sides = torch.cat([half for half in halves if isinstance(half, Tensor)], dim=3)
    labels = torch.arange(100).repeat_interleave(count)
    return Split(torch.nn.functional.pad(sides, (0, 0, 4, 4)), labels)
