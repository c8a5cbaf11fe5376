"""What is measured: pure functions of logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

ECE_BINS = 15


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest logit is the label's.

    >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    0.5
    """
    return float((logits.argmax(dim=-1) == labels).float().mean())


def nll(logits: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood of the labels, in nats.

    >>> round(nll(torch.zeros(1, 4), torch.tensor([2])), 4)
    1.3863
    """
    return float(F.cross_entropy(logits.float(), labels))


def ece(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error over 15 equal-width bins, a fraction.

    Each bin's share of the rows times its |accuracy - mean confidence|, summed.
    Guo et al., On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599

    >>> round(ece(torch.tensor([[99.0, 0.0], [99.0, 0.0]]), torch.tensor([0, 1])), 4)
    0.5
    """
    # torchmetrics gives a confidence of exactly 1 a bin of its own beyond the last
    probabilities = logits.float().softmax(dim=-1).clamp(max=1 - torch.finfo(torch.float32).eps)
    return float(
        multiclass_calibration_error(
            probabilities, labels, num_classes=logits.shape[-1], n_bins=ECE_BINS, norm="l1"
        )
    )


def agreement(logits: Tensor, other: Tensor) -> float:
    """Return the fraction of rows on which two models name the same class.

    >>> agreement(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.3, 0.1]]))
    1.0
    """
    return float((logits.argmax(dim=-1) == other.argmax(dim=-1)).float().mean())


def ensemble_logits(
    members: Tensor,
    *,
    average: Literal["probabilities", "logits"] = "probabilities",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the logits of an ensemble's average: `[members, rows, classes]` to 2-D.

    Of the members' probabilities the log of the (weighted) mean; of their logits the mean.

    >>> ensemble_logits(torch.zeros(3, 1, 2)).exp()
    tensor([[0.5000, 0.5000]])
    """
    share = torch.full((len(members),), 1 / len(members))
    if weights is not None:
        share = torch.tensor(weights)
    share = share[:, None, None]
    if average == "logits":
        return (members.float() * share).sum(dim=0)
    return torch.logsumexp(members.float().log_softmax(dim=-1) + share.log(), dim=0)
