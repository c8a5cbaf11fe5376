"""Average of an ensemble's members into one teacher: of their probabilities, or of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Average = Literal["probabilities", "logits"]
"""How the members of an ensemble are averaged into one teacher: mean of softmax or of logits."""
Weights = Sequence[float] | None
"""Weights of an ensemble's members, with sum 1; None if all are equal."""


def ensemble_logits(
    members: Tensor,
    *,
    average: Average = "probabilities",
    weights: Weights = None,
) -> Tensor:
    """Return the logits of an ensemble: the log of the mean probabilities, or the mean logits.

    Args:
        members: Logits `[members, rows, classes]`.
        average: Average of probabilities or of logits.
        weights: Weights of the members, which sum to 1; equal ones when not given.

    Returns:
        Logits `[rows, classes]`.

    >>> ensemble_logits(torch.zeros(3, 1, 2)).exp()
    tensor([[0.5000, 0.5000]])
    """
    share = member_weights(members, weights, torch.float32)
    if average == "logits":
        return (members.float() * share).sum(dim=0)
    return torch.logsumexp(members.float().log_softmax(dim=-1) + share.log(), dim=0)


def average_logits(logits: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return the weighted mean of the members' logits, or the logits of a single teacher."""
    if logits.ndim == 2:
        return logits.to(dtype)
    if weights is None:
        return logits.mean(0, dtype=dtype)
    return (logits.to(dtype) * member_weights(logits, weights, dtype)).sum(0)


def mean_softmax(logits: Tensor, weights: Weights) -> Tensor:
    """Return the weighted mean of the members' softmax, or the softmax of a single teacher."""
    p = F.softmax(logits, dim=-1)
    if p.ndim == 2:
        return p
    return p.mean(0) if weights is None else (p * member_weights(p, weights, p.dtype)).sum(0)


def member_weights(logits: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return the members' weights as `[members, 1, 1]`."""
    if weights is None:
        return logits.new_full((len(logits), 1, 1), 1 / len(logits), dtype=dtype)
    given = torch.tensor(weights, dtype=dtype).view(-1, 1, 1)
    return given.to(logits.device, non_blocking=True)  # made on a GPU, it would be waited for


def add_softmax(logits: Tensor, shares: Tensor, scale: float, *, work: Tensor, out: Tensor) -> None:
    """Write the mean of the members' softmax to `out`, as many members at once as fit in `work`."""
    out.zero_()
    for part, share in zip(*(torch.split(t, len(work)) for t in (logits, shares)), strict=True):
        members = work[: len(part)]
        exponents(part.to(work.dtype), scale, out=members)
        factors = share / members.exp2_().sum(-1, True)
        if len(members) == 1:
            out.addcmul_(members[0], factors[0])
        else:
            out.add_(members.mul_(factors).sum(0))


def exponents(logits: Tensor, scale: float, *, out: Tensor) -> None:
    """Write `scale (logits - max of the row)` to `out`."""
    torch.add(logits.amax(-1, True) * -scale, logits, alpha=scale, out=out)
