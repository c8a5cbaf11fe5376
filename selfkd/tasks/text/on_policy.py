"""On-policy distillation: batches that the student itself writes on training prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from selfkd.config import TrainConfig
from selfkd.tasks.text.batches import Batch, Order
from selfkd.tasks.text.data import IGNORED, Tokens
from selfkd.tasks.text.generate import BATCH, generate
from selfkd.training.device import precision_of
from selfkd.training.predict import autocast

STEPS = 8
"""Most steps whose texts are written at once."""


def is_on_policy(step: int, share: float) -> bool:
    """Say whether a step's batch is written by the student: such steps are evenly spread.

    Args:
        step: Number of the step, from 0.
        share: Share of the steps whose batches are.

    >>> [step for step in range(8) if is_on_policy(step, 0.25)]
    [3, 7]
    """
    return int((step + 1) * share) > int(step * share)


class Writer:
    """Batches that a student writes on training prompts, by its own distribution at T = 1.

    Texts of several steps are written at once, by the weights of then. Which prompts come next is a
    function of the seed and of how many there were; so are the draws.

    Args:
        student: Language model that is trained.
        data: Training text.
        options: Options of the training.
        end: Id of the end token.
        seed: Seed of the order of the prompts and of the draws.

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", 2024, https://arxiv.org/abs/2306.13649
    """

    def __init__(
        self, student: nn.Module, data: Tokens, options: TrainConfig, *, end: int, seed: int
    ) -> None:
        self._student, self._data, self._options = student, data, options
        self._end, self._seed = end, seed
        self._order = Order(data.windows, seed)
        self._written = 0  # texts since the training began
        empty = torch.empty(0, 0, dtype=torch.int64)
        self._inputs, self._labels = empty, empty  # those that are left
        self._ended: list[Tensor] = []

    def __call__(self) -> list[Batch]:
        """Return the next batches, as many as a step of the optimiser takes."""
        size, options = self._options.batch_size, self._options
        needed = size * options.accumulate
        if not len(self._inputs):
            self._write(needed * min(max(BATCH // needed, 1), STEPS))
        own = self._inputs[:needed], self._labels[:needed]
        self._inputs, self._labels = self._inputs[needed:], self._labels[needed:]
        self._ended.append((own[1] == self._end).any(dim=1))
        batches = zip(*(torch.split(part, size) for part in own), strict=True)
        return [_batch(inputs, labels) for inputs, labels in batches]

    def take_cut(self) -> float:
        """Return the share of the texts since the last call that had no end within the context."""
        ended, self._ended = torch.cat([*self._ended, torch.ones(0)]), []
        return float(1 - ended.mean()) if len(ended) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what is written and not trained on yet, and how much there was."""
        return {"written": self._written, "inputs": self._inputs, "labels": self._labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        self._written = state["written"]
        self._inputs, self._labels = state["inputs"], state["labels"]

    def _write(self, count: int) -> None:
        prompts = self._data.prompts(self._order(self._written, count).tolist())
        device = str(next(self._student.parameters()).device)
        with autocast(device, precision_of(self._options.amp, device)):
            written = generate(
                self._student,
                prompts,
                end=self._end,
                context=self._data.context,
                seed=self._seed * 2_000_003 + self._written,
            )
        self._written += count
        self._inputs, self._labels = written_tokens(prompts, written, self._end)


def written_tokens(
    prompts: Sequence[Tensor], written: Sequence[Tensor], end: int
) -> tuple[Tensor, Tensor]:
    """Return what texts are predicted from and their tokens, which count where they are written.

    Args:
        prompts: Tokens of each prompt.
        written: Tokens after each, at least one.
        end: Id of the end token, with which inputs are padded.

    Returns:
        Inputs and labels, `[texts, longest]` each.

    >>> prompts, written = ([0, 5, 6], [0, 7]), ([8], [9])
    >>> inputs, labels = written_tokens(
    ...     [torch.tensor(ids) for ids in prompts], [torch.tensor(ids) for ids in written], end=0
    ... )
    >>> inputs.tolist(), labels.tolist()
    ([[0, 5, 6], [0, 7, 0]], [[-100, -100, 8], [-100, 9, -100]])
    """
    inputs, labels = [], []
    for prompt, text in zip(prompts, written, strict=True):
        inputs.append(torch.cat([prompt, text])[:-1])
        labels.append(torch.cat([torch.full_like(prompt[1:], IGNORED), text]))
    return (
        pad_sequence(inputs, batch_first=True, padding_value=end),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def _batch(inputs: Tensor, labels: Tensor) -> Batch:
    """Return a batch without the padding that all of its texts have."""
    longest = int((labels != IGNORED).any(dim=0).nonzero()[-1]) + 1
    return Batch(inputs[:, :longest], labels[:, :longest])
