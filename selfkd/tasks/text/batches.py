"""Batches that a language model is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfkd.config import TrainConfig
from selfkd.data.order import Order as Order
from selfkd.data.transfer import ORDER, mixed_in
from selfkd.losses.moving import send
from selfkd.tasks.text.data import IGNORED, Tokens
from selfkd.tasks.text.transfer import TransferText


class Batch(NamedTuple):
    """Windows that are trained on."""

    inputs: Tensor
    """Tokens, `[batch, length]`."""
    labels: Tensor
    """Tokens that they predict, `[batch, length]`; `IGNORED` where none is trained on."""
    weights: Tensor | None = None
    """Weight of each in the loss, `[batch, length]`; all alike when not given."""
    rows: Tensor | None = None
    """Rows of the training text, `[batch, length]`; none of what a student has written. Those of a
    transfer set follow them."""
    labelled: bool = True
    """Whether the labels are trained on, not the teacher's soft targets alone."""
    share: float = 1.0
    """Share of a step's tokens whose labels are trained on, by weight."""

    def to(self, device: str) -> Batch:
        """Return a copy with its inputs on `device`; what is counted stays on the CPU."""
        return self._replace(inputs=send(self.inputs, device))

    @property
    def valid(self) -> Tensor:
        """Whether a token is predicted, `[batch, length]`."""
        return self.labels != IGNORED

    @property
    def total(self) -> float:
        """Sum of the weights of what is trained on."""
        if self.weights is None:
            return float(self.valid.sum())
        return float(self.weights[self.valid].double().sum())


class TrainingText:
    """Batches of the training text: a function of seed and step alone.

    Args:
        data: Text.
        options: Options of the training.
        seed: Seed of the order.
        transfer: Transfer set, windows of which are added to each batch.
    """

    def __init__(
        self,
        data: Tokens,
        options: TrainConfig,
        seed: int,
        transfer: TransferText | None = None,
    ) -> None:
        self._data, self._order = _Windows(data), Order(data.windows, seed)
        self._size, self._count = options.batch_size, options.accumulate
        self._further: _Windows | None = None
        if transfer is not None:
            first, tokens = len(data), transfer.tokens
            self._further = _Windows(tokens, first=first, labelled=transfer.labelled)
            self._further_order = Order(tokens.windows, seed + ORDER)
            self._more = mixed_in(self._size, transfer.weight) * self._count

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of a step of the optimiser, those of the transfer set at the end."""
        windows = self._order(step * self._size * self._count, self._size * self._count)
        found = [self._data(own) for own in torch.split(windows, self._size)]
        if self._further is None:
            return found
        windows = self._further_order(step * self._more, self._more)
        found += [self._further(own) for own in torch.split(windows, self._size)]
        whole = sum(batch.total for batch in found) or 1.0
        share = sum(batch.total for batch in found if batch.labelled) / whole
        return [batch._replace(share=share) for batch in found]


class _Windows:
    """Windows of a text as batches.

    Args:
        data: Text.
        first: Number of rows of the text that it follows.
        labelled: Whether its labels are trained on.
    """

    def __init__(self, data: Tokens, *, first: int = 0, labelled: bool = True) -> None:
        self._data, self._first, self._labelled = data, first, labelled
        levels = [] if data.weights is None else torch.unique(data.weights).tolist()
        self._weighted = len([level for level in levels if level > 0]) > 1

    def __call__(self, windows: Tensor) -> Batch:
        data = self._data
        return Batch(
            data.inputs(windows),
            data.labels_of(windows),
            data.weights_of(windows) if self._weighted else None,
            data.rows(windows) + self._first,
            self._labelled,
        )
