"""Batches that a language model is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfkd.config import TrainConfig
from selfkd.data.order import Order as Order
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
