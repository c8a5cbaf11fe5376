"""Metrics: pure functions of logits and labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15
TEMPERATURES = (0.05, 20.0)
"""Ends of the range that a temperature is fitted in."""
LARGE, CHUNK = 2**24, 2**22
"""Number of logits above which not all are converted at once, and number that are then."""


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
    return _mean(lambda own, of: float(F.cross_entropy(own.float(), of)), logits, labels)


def _mean(value: Callable[..., float], logits: Tensor, *others: Tensor) -> float:
    """Return a mean over rows, chunk by chunk: no copy of all logits is made."""
    size = _chunk(logits)
    if len(logits) <= size:
        return value(logits, *others)
    parts = zip(*(torch.split(tensor, size) for tensor in (logits, *others)), strict=True)
    return math.fsum(len(part[0]) * value(*part) for part in parts) / len(logits)


def _chunk(logits: Tensor) -> int:
    """Return how many rows a chunk has."""
    return max(CHUNK // logits.shape[-1], 1) if logits.numel() > LARGE else len(logits)


def ece(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error over 15 equal-width bins, a fraction.

    Each bin's share of the rows times its |accuracy - mean confidence|, summed.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017,
        https://arxiv.org/abs/1706.04599

    >>> round(ece(torch.tensor([[99.0, 0.0], [99.0, 0.0]]), torch.tensor([0, 1])), 4)
    0.5
    """
    if len(logits) > _chunk(logits):
        rows = [row for row in reliability(logits, labels) if row["count"]]
        parts = (row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
        return math.fsum(parts) / len(logits)
    confidence, hits, bins = _bins(logits, labels)
    # one bin more, as of torchmetrics: the sums are then the same to the bit
    count, sure, right = (torch.zeros(ECE_BINS + 1) for _ in range(3))
    for total, values in ((count, torch.ones_like(hits)), (sure, confidence), (right, hits)):
        total.scatter_add_(0, bins, values)
    gaps = ((right / count).nan_to_num() - (sure / count).nan_to_num()).abs()
    return float((gaps * (count / count.sum())).sum())


def _bins(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the confidence of each row, whether it is right (1 or 0), and its bin.

    A confidence of exactly 1 would be beyond the last bin.
    """
    most = 1 - torch.finfo(torch.float32).eps
    parts = torch.split(logits, _chunk(logits))
    found = [part.float().softmax(dim=-1).clamp(max=most).max(dim=-1) for part in parts]
    confidence, predicted = (torch.cat(each) for each in zip(*found, strict=True))
    bins = torch.bucketize(confidence, torch.linspace(0, 1, ECE_BINS + 1), right=True) - 1
    return confidence, (predicted == labels).float(), bins


def brier(logits: Tensor, labels: Tensor) -> float:
    """Return the Brier score, in [0, 2]: the squared error of the probabilities.

        mean over rows of sum_k (p_k - y_k)²

    Reference:
        Brier, "Verification of forecasts expressed in terms of probability", 1950,
        https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2

    >>> brier(torch.tensor([[99.0, 0.0], [99.0, 0.0]]), torch.tensor([0, 1]))
    1.0
    """
    probabilities = logits.double().softmax(dim=-1)
    errors = probabilities - F.one_hot(labels, logits.shape[-1])
    return float(errors.square().sum(dim=-1).mean())


def reliability(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Return the bins of a reliability diagram, the 15 of `ece`.

    Returns:
        Of each bin its ends `low` and `high`, the `count` of rows whose confidence lies in it,
        their mean `confidence` and their `accuracy`, both None in an empty bin.

    >>> reliability(torch.tensor([[99.0, 0.0], [99.0, 0.0]]), torch.tensor([0, 1]))[-1]["accuracy"]
    0.5
    """
    confidence, hits, bins = _bins(logits, labels)
    rows = []
    for number in range(ECE_BINS):
        inside = bins == number
        count = int(inside.sum())
        rows.append(
            {
                "low": number / ECE_BINS,
                "high": (number + 1) / ECE_BINS,
                "count": count,
                "confidence": float(confidence[inside].double().mean()) if count else None,
                "accuracy": float(hits[inside].double().mean()) if count else None,
            }
        )
    return rows


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T at which the logits are best calibrated: least NLL of z / T.

        T = argmin CE(y, softmax(z / T)),    over log T, within [0.05, 20]

    To be fitted on validation; it changes no prediction. Where every row is right there is no
    least NLL (the smaller T, the better), and T is 1.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017,
        https://arxiv.org/abs/1706.04599

    >>> logits = torch.tensor([[2.0, 0.0]] * 4)
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 2 / log(3)
    1.82
    """
    wide = logits.double()
    if bool((wide.argmax(dim=-1) == labels).all()):
        return 1.0
    from scipy.optimize import minimize_scalar  # half a second to import: only when it is used

    found = minimize_scalar(
        lambda log_t: float(F.cross_entropy(wide / math.exp(log_t), labels)),
        bounds=[math.log(end) for end in TEMPERATURES],
        method="bounded",
    )
    return math.exp(float(found.x))


def fit_bias(logits: Tensor, labels: Tensor, *, classes: Sequence[int]) -> float:
    """Return the bias that, added to the logits of some classes, leaves the fewest errors.

        b = argmin #{ i : argmax_k (z_ik + b [k in classes]) != y_i }

    To be fitted on held-out images that have all classes. A student whose transfer set lacks a
    class recognises it by the teacher's soft targets, but takes it for rare: one bias corrects
    that (section 3 of the paper: the mythical digit). All such b lie in intervals between the
    rows' own thresholds; the middle of the widest is returned.

    Args:
        logits: Logits `[rows, all classes]`.
        labels: Labels `[rows]`.
        classes: Some of all classes, not all.

    Raises:
        ValueError: None or all of the classes are given.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531

    >>> logits = torch.tensor([[3.0, 0.0], [3.0, 1.0], [3.0, -2.0]])
    >>> fit_bias(logits, torch.tensor([1, 1, 0]), classes=[1])  # above 3, below 5
    4.0
    """
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool)
    inside[list(classes)] = True
    if inside.all() or not inside.any():
        raise ValueError(f"classes must be some of all {len(inside)}, got {list(classes)}")
    wide = logits.double()
    best_in, best_out = (
        wide.masked_fill(~part, -math.inf).max(dim=-1) for part in (inside, ~inside)
    )
    # a row is predicted as one of the classes where b is above its threshold
    thresholds, order = (best_out.values - best_in.values).sort()
    right_in = (best_in.indices == labels)[order].long()
    right_out = (best_out.indices == labels)[order].long()
    hits = right_out.sum() + torch.cat(
        [torch.zeros(1, dtype=torch.long), right_in - right_out]
    ).cumsum(0)
    edges = torch.cat([thresholds[:1] - 1, thresholds, thresholds[-1:] + 1])
    widths = (edges[1:] - edges[:-1]).masked_fill(hits < hits.max(), -1)
    place = int(widths.argmax())
    return float((edges[place] + edges[place + 1]) / 2)


def fit_biases(logits: Tensor, labels: Tensor, *, classes: Sequence[int]) -> list[float]:
    """Return one bias for the logit of each class that together leave few errors.

    Coordinate descent on the number of errors: first `fit_bias` of all `classes` together, then of
    one class after the other, of all, until no bias changes the number. To be fitted on held-out
    images.

    Args:
        logits: Logits `[rows, all classes]`.
        labels: Labels `[rows]`.
        classes: Classes whose common bias is fitted first.

    Returns:
        One bias a class.

    Raises:
        ValueError: None or all of the classes are given.

    >>> logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 1.0, 0.0], [3.0, -2.0, 0.0]])
    >>> biases = torch.tensor(fit_biases(logits, torch.tensor([1, 1, 0]), classes=[1, 2]))
    >>> (logits + biases).argmax(dim=1).tolist()
    [1, 1, 0]
    """
    biases = torch.zeros(logits.shape[-1], dtype=torch.float64)
    wide = logits.double()
    biases[list(classes)] += fit_bias(wide, labels, classes=classes)

    def hits() -> int:
        return int(((wide + biases).argmax(dim=-1) == labels).sum())

    before = -1
    while (now := hits()) > before:
        before = now
        for label in range(len(biases)):
            biases[label] += fit_bias(wide + biases, labels, classes=[label])
    found: list[float] = biases.tolist()
    return found


def class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Return the accuracy within each class; None for a class without rows.

    >>> class_accuracy(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    [1.0, 0.0, None]
    """
    classes = logits.shape[-1]
    count = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[logits.argmax(dim=-1) == labels], minlength=classes)
    return [int(h) / int(n) if n else None for h, n in zip(hits, count, strict=True)]


def confusions(
    predicted: Tensor, labels: Tensor, *, names: Sequence[str], top: int = 10
) -> list[dict[str, Any]]:
    """Return the most frequent errors: the `label`, the `predicted` class and the `count`.

    Args:
        predicted: Predicted classes `[rows]`.
        labels: Labels `[rows]`.
        names: Names of the classes.
        top: Number of pairs of classes.

    >>> confusions(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), names=["cat", "dog"])
    [{'label': 'cat', 'predicted': 'dog', 'count': 2}]
    """
    wrong = predicted != labels
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        {"label": names[label], "predicted": names[other], "count": count}
        for (label, other), count in ordered[:top]
    ]


def mean_kl(logits: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence KL(p || q) of two models' probabilities, in nats.

    Args:
        logits: Logits `[rows, classes]` of p.
        other: Logits `[rows, classes]` of q.

    >>> round(mean_kl(torch.tensor([[9.0, -9.0]]), torch.zeros(1, 2)), 4)  # log 2
    0.6931
    """

    def kl(own: Tensor, of: Tensor) -> float:
        log_p, log_q = own.double().log_softmax(dim=-1), of.double().log_softmax(dim=-1)
        return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))

    return _mean(kl, logits, other)


def draft_acceptance(logits: Tensor, other: Tensor) -> float:
    """Return the share of tokens drafted by one model that speculative decoding with another keeps.

        mean over rows of sum_k min(p_k, q_k) = 1 - TV(p, q),    p and q at T = 1

    Args:
        logits: Logits `[rows, vocabulary]` of the model that drafts.
        other: Logits `[rows, vocabulary]` of the model that accepts.

    Reference:
        Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding",
        2023, https://arxiv.org/abs/2211.17192

    >>> round(draft_acceptance(torch.tensor([[9.0, -9.0]]), torch.zeros(1, 2)), 4)
    0.5
    """

    def overlap(own: Tensor, of: Tensor) -> float:
        p, q = own.double().softmax(dim=-1), of.double().softmax(dim=-1)
        return float(torch.minimum(p, q).sum(dim=-1).mean())

    return _mean(overlap, logits, other)


def agreement(logits: Tensor, other: Tensor) -> float:
    """Return the fraction of rows on which two models predict the same class.

    >>> agreement(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.3, 0.1]]))
    1.0
    """
    return float((logits.argmax(dim=-1) == other.argmax(dim=-1)).float().mean())
