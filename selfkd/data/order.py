"""Order of items in endless passes, as a pure function of seed and position."""

from __future__ import annotations

import torch
from torch import Tensor


class Order:
    """Numbers of items in random order, pass after pass: a function of seed and position alone.

    Args:
        items: Number of items.
        seed: Seed of the order.

    >>> order = Order(4, seed=0)
    >>> sorted(order(0, 4).tolist()), order(2, 4).tolist() == order(0, 6).tolist()[2:]
    ([0, 1, 2, 3], True)
    """

    def __init__(self, items: int, seed: int) -> None:
        self._items, self._seed = items, seed
        self._passes: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """Return the numbers of so many items from a position of the endless order on."""
        first, last = start // self._items, (start + count - 1) // self._items
        numbers = range(first, last + 1)
        self._passes = {number: self._pass(number) for number in numbers}
        found = torch.cat([self._passes[number] for number in numbers])
        return found[start - first * self._items :][:count]

    def _pass(self, number: int) -> Tensor:
        if number in self._passes:
            return self._passes[number]
        seed = (self._seed * 1_000_003 + number) % 2**63
        return torch.randperm(self._items, generator=torch.Generator().manual_seed(seed))
