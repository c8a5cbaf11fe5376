"""Batches that a language model is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfkd.config import TrainConfig
from selfkd.tasks.text.data import IGNORED, Tokens


class Batch(NamedTuple):
    """Windows that are trained on."""

    inputs: Tensor
    """Tokens, `[batch, length]`."""
    labels: Tensor
    """Tokens that they predict, `[batch, length]`; `IGNORED` where none is trained on."""
    weights: Tensor | None = None
    """Weight of each in the loss, `[batch, length]`; all alike when not given."""
    rows: Tensor | None = None
    """Rows of the training text, `[batch, length]`; none of what a student has written."""

    def to(self, device: str) -> Batch:
        """Return a copy on `device`, but for the rows."""
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), weights, self.rows)

    @property
    def total(self) -> float:
        """Sum of the weights of what is trained on."""
        valid = self.labels != IGNORED
        return float(valid.sum() if self.weights is None else self.weights[valid].double().sum())


class Order:
    """Windows in random order, pass after pass: a function of seed and position alone.

    Args:
        windows: Number of windows.
        seed: Seed of the order.

    >>> order = Order(4, seed=0)
    >>> sorted(order(0, 4).tolist()), order(2, 4).tolist() == order(0, 6).tolist()[2:]
    ([0, 1, 2, 3], True)
    """

    def __init__(self, windows: int, seed: int) -> None:
        self._windows, self._seed = windows, seed
        self._passes: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """Return the numbers of so many windows from a position of the endless order on."""
        first, last = start // self._windows, (start + count - 1) // self._windows
        numbers = range(first, last + 1)
        self._passes = {number: self._pass(number) for number in numbers}
        found = torch.cat([self._passes[number] for number in numbers])
        return found[start - first * self._windows :][:count]

    def _pass(self, number: int) -> Tensor:
        if number in self._passes:
            return self._passes[number]
        seed = (self._seed * 1_000_003 + number) % 2**63
        return torch.randperm(self._windows, generator=torch.Generator().manual_seed(seed))


class TrainingText:
    """Batches of the training text: a function of seed and step alone.

    Args:
        data: Text.
        options: Options of the training.
        seed: Seed of the order.
    """

    def __init__(self, data: Tokens, options: TrainConfig, seed: int) -> None:
        self._data, self._order = data, Order(data.windows, seed)
        self._size, self._count = options.batch_size, options.accumulate
        self._levels = [] if data.weights is None else torch.unique(data.weights).tolist()

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of a step of the optimiser."""
        windows = self._order(step * self._size * self._count, self._size * self._count)
        return [self._batch(own) for own in torch.split(windows, self._size)]

    def _batch(self, windows: Tensor) -> Batch:
        data = self._data
        weighted = len([level for level in self._levels if level > 0]) > 1
        return Batch(
            data.inputs(windows),
            data.labels_of(windows),
            data.weights_of(windows) if weighted else None,
            data.rows(windows),
        )
