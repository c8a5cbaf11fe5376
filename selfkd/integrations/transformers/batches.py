"""Sizes and targets of a batch of the Trainer of transformers, with labels or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.integrations.transformers.inputs import IGNORED
from selfkd.losses.moving import send


def targets_of(inputs: Mapping[str, Any], *, shift: bool, rows: bool = False) -> Tensor:
    """Return the labels `[batch]` or `[batch, length]`, aligned with the logits.

    Without labels, each token that the attention mask shows counts, and each row where logits are
    `[batch, classes]`, as a label of 0: they say which logits enter a soft term.

    Args:
        inputs: Inputs of a batch, with `labels`, and `shift_labels` where already shifted.
        shift: Whether logits are those of the next token.
        rows: Whether inputs without labels have one target a row.
    """
    labels = inputs.get("labels")
    if labels is None:
        mask = mask_of(inputs)
        labels = torch.where(mask != 0, 0, IGNORED)
        if rows:
            labels = labels.new_zeros(len(labels))
    elif inputs.get("shift_labels") is not None:
        shifted: Tensor = inputs["shift_labels"]
        return shifted
    if labels.ndim == 1 or not shift:
        aligned: Tensor = labels
        return aligned
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """Return which tokens count, `[batch, length]`, or `[batch, 1]` for inputs without tokens."""
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask
    tokens = inputs.get("input_ids")
    if tokens is None and inputs.get("inputs_embeds") is not None:
        tokens = inputs["inputs_embeds"][..., 0]
    if tokens is None:
        tokens = inputs.get("labels")
    if tokens is None:
        tokens = next(
            value for value in inputs.values() if isinstance(value, Tensor) and value.ndim
        )
        tokens = tokens.flatten(1)[:, :1] if tokens.ndim > 1 else tokens
    return torch.ones_like(tokens if tokens.ndim == 2 else tokens[:, None], dtype=torch.int64)


def sizes_of(inputs: Mapping[str, Any], *, shift: bool) -> Tensor:
    """Return the numbers of labels, tokens, pairs of tokens and rows of a micro-batch, `[4]`."""
    labels = (targets_of(inputs, shift=shift) != IGNORED).sum()
    lengths = (mask_of(inputs) != 0).sum(dim=1)
    rows = torch.full_like(labels, len(lengths))
    return torch.stack([labels, lengths.sum(), lengths.square().sum(), rows])


def shares_of(sizes: Tensor, whole: Tensor | int | None, *, rows: bool) -> list[Tensor]:
    """Return the number of labels of the whole batch, and a micro-batch's shares of the rest.

    Args:
        sizes: Sizes of the micro-batch, as from `sizes_of`.
        whole: Sizes of the whole batch, or its number of labels; those of the micro-batch if None.
        rows: Whether rows count in place of labels.
    """
    if isinstance(whole, Tensor) and whole.device.type != "cpu":
        sizes = send(sizes, whole.device)
    totals = sizes.clone()
    if whole is not None:
        whole = torch.as_tensor(whole, device=sizes.device).flatten()
        totals[: len(whole)] = whole
    totals = totals.clamp_min(1)
    return [totals[3] if rows else totals[0], *(sizes[1:3] / totals[1:3])]


class TermSums:
    """Sums of loss terms by name, with what each is divided by."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], sizes: Mapping[str, Tensor | int]) -> None:
        """Add terms, each the mean over its size, or a part of it at a size of 1."""
        for name, term in terms.items():
            value, size = term.detach().double(), sizes[name]
            if not isinstance(size, Tensor):
                size = torch.full_like(value, size)  # a copy to a GPU would be waited for
            size = size.to(value)
            pair = torch.stack([value * size, size])
            self._sums[name] = self._sums.get(name, 0) + pair

    def pop(
        self, reduce: Callable[[Tensor], Tensor] | None = None, over: float | None = None
    ) -> dict[str, float]:
        """Return the means, and start again.

        Args:
            reduce: Function from sums and sizes `[terms, 2]` to those of all processes.
            over: Divisor in place of the sizes.
        """
        names, pairs = list(self._sums), list(self._sums.values())
        self._sums = {}
        if not names:
            return {}
        stacked = torch.stack(pairs)
        sums, sizes = (stacked if reduce is None else reduce(stacked)).unbind(-1)
        means = (sums / (sizes.clamp_min(1) if over is None else over)).tolist()
        return dict(zip(names, means, strict=True))
