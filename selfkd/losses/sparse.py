"""Distillation from the k largest logits of a teacher (sparse soft targets)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import (
    DistillationTerms,
    check_settings,
    check_weights,
    hard_loss,
    is_nan,
)
from selfkd.losses.fused import weighted_sum


class SparseLogits(NamedTuple):
    """The k largest logits of each row, and the log-sum-exp of the others.

    A leading dimension for the members of an ensemble is allowed.
    """

    values: Tensor
    """The largest logits `[..., batch, k]`, floating point."""
    indices: Tensor
    """Classes of the values `[..., batch, k]`, int64, each once in a row."""
    rest: Tensor
    """Log-sum-exp of the other logits `[..., batch]`; -inf if there are none or all are -inf."""

    def to(self, device: torch.device | str | int) -> SparseLogits:
        """Return a copy on `device`."""
        return SparseLogits(*(tensor.to(device) for tensor in self))


def sparsify(logits: Tensor, k: int) -> SparseLogits:
    """Keep the k largest logits of each row, and the log-sum-exp of the others.

    Args:
        logits: Logits `[..., classes]`.
        k: Number of logits to keep, from 1 to the number of classes.

    Returns:
        The sparse logits, in float32, or float64 if `logits` are; without a graph.

    Raises:
        ValueError: A k out of range.

    >>> sparsify(torch.tensor([[3.0, 0.0, 1.0, 0.0]]), 2)
    SparseLogits(values=tensor([[3., 1.]]), indices=tensor([[0, 2]]), rest=tensor([0.6931]))
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be in [1, {classes}], the number of classes, got {k}")
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    values, indices = logits.topk(k)
    rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return SparseLogits(values, indices, rest)


def sparse_terms(
    student_logits: Tensor,
    teacher: SparseLogits,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Distillation loss of a teacher's k largest logits, with its two terms by name.

        hard_loss = CE(y, p_s)
        soft_loss = T^2 KL(q_t^T || q_s^T)              over the k classes and a bucket of the rest
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    each a mean over the batch. The student's bucket is exact: the log-sum-exp of its other logits
    over T. The teacher's bucket assumes that its rest is spread evenly over the K - k other
    classes,

        (1 - 1 / T) log(K - k) + rest / T

    which is exact at T = 1, too large above it, and tends to the right mass as T -> inf. The bucket
    hides the teacher's ranking of the other classes: at T = 1 the loss is at most the full loss,
    and if many classes share the rest it becomes much smaller as T grows. With 20 of 1,000 classes
    known, the gradient has a cosine of 0.99 with the full gradient at T = 1, and 0.4 at T = 4.

    For an ensemble, the mean of the members' KL is taken. If all classes are known (k = K), its
    gradient is that of the KL from the members' mean distribution, and its value is larger by a
    constant: the mean KL of the members from their mean.

    Args:
        student_logits: Logits `[batch, classes]`, floating point. Computed in float32 or wider, in
            autocast too.
        teacher: Sparse logits `[batch, k]`, or `[members, batch, k]` of an ensemble. Never gets a
            gradient. The range of its indices, like that of the labels, is checked on the CPU only.
        labels: Class indices `[batch]`, int64, or probabilities `[batch, classes]`.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        weights: Weights of the members, one each, at least 0, with sum 1; equal if not given.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph.

    Raises:
        ValueError: A setting out of range, shapes that do not match, or a class out of range.
        TypeError: Logits that are not floating point, or classes that are not int64.

    >>> logits = torch.tensor([[2.0, 0.0, -2.0, 0.0]], requires_grad=True)
    >>> teacher = sparsify(torch.tensor([[1.0, 0.5, -1.0, 0.5]]), 2)
    >>> terms = sparse_terms(logits, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]
    [0.2933, 0.2539, 0.3326]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    check_settings(temperature, alpha, "probabilities", label_smoothing)
    check_sparse(teacher, student_logits)
    terms = unchecked_sparse_terms(
        student_logits,
        teacher,
        labels,
        temperature=temperature,
        alpha=alpha,
        label_smoothing=label_smoothing,
        weights=weights,
    )
    if is_nan(terms.soft_loss):
        _check_no_nan(teacher)
    return terms


def unchecked_sparse_terms(
    student_logits: Tensor,
    teacher: SparseLogits,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Compute `sparse_terms` without checking the teacher; its NaN gives a NaN soft loss."""
    hard = hard_loss(student_logits, labels, label_smoothing=label_smoothing)
    shares: Sequence[float] = [1.0]
    if weights is not None:
        shares = check_weights(weights, teacher.values)
    elif teacher.values.ndim == 3:
        shares = [1 / len(teacher.values)] * len(teacher.values)
    members = [teacher] if teacher.values.ndim == 2 else map(SparseLogits, *teacher)
    log_p_s = F.log_softmax(student_logits.to(hard.dtype) / temperature, dim=-1)
    divergences = [
        share * bucket_divergence(log_p_s, member, temperature).mean()
        for share, member in zip(shares, members, strict=True)
        if share
    ]
    soft = temperature**2 * torch.stack(divergences).sum()
    return DistillationTerms(weighted_sum(hard, soft, alpha), hard.detach(), soft.detach())


def bucket_divergence(log_p_s: Tensor, teacher: SparseLogits, temperature: float) -> Tensor:
    """Return each row's KL over the k classes and the bucket of the others, `[...]`.

    Args:
        log_p_s: Log-probabilities of the student at T, `[..., classes]`.
        teacher: Sparse logits `[..., k]`.
        temperature: Temperature T, above 0.
    """
    values, indices, rest = (tensor.detach() for tensor in teacher)
    others = log_p_s.shape[-1] - values.shape[-1]
    z_t = values.to(log_p_s.dtype) / temperature
    log_q_s = log_p_s.gather(-1, indices)
    if others:
        spread = (1 - 1 / temperature) * math.log(others)
        bucket = rest.to(log_p_s.dtype).unsqueeze(-1) / temperature + spread
        z_t = torch.cat([z_t, bucket], dim=-1)
        # masked rather than subtracted from 1, and with the least number rather than -inf, because
        # the log-sum-exp of -inf alone has a NaN gradient
        masked = log_p_s.scatter(-1, indices, torch.finfo(log_p_s.dtype).min)
        log_q_s = torch.cat([log_q_s, masked.logsumexp(-1, keepdim=True)], dim=-1)
    log_q_t = F.log_softmax(z_t, dim=-1)
    q_t = log_q_t.exp()
    return torch.where(q_t == 0, 0.0, q_t * (log_q_t - log_q_s)).sum(-1)  # 0 log 0 = 0, NaN stays


def _check_no_nan(teacher: SparseLogits) -> None:
    rows = (teacher.values.isnan().any(dim=-1) | teacher.rest.isnan()).nonzero()
    if len(rows):
        *member, row = rows[0].tolist()
        suffix = f" of member {member[0]}" if member else ""
        raise ValueError(f"teacher must have numbers for soft_loss, got nan in row {row}{suffix}")


def check_sparse(teacher: SparseLogits, student_logits: Tensor) -> None:
    """Check that sparse logits, or those of members, fit `student_logits [..., classes]`.

    Raises:
        ValueError: Shapes that do not match, or (checked on the CPU only) a class out of range.
        TypeError: Values or rest that are not floating point, or indices that are not int64.
    """
    values, indices, rest = teacher
    *rows, classes = student_logits.shape
    k = values.shape[-1] if values.ndim else 0
    if (
        list(values.shape[-len(rows) - 1 : -1]) != rows
        or values.ndim > len(rows) + 2
        or not len(values)
        or not 1 <= k <= classes
    ):
        raise ValueError(
            f"teacher must have values {[*rows, 'k']} with k in [1, {classes}], or that for each "
            f"of the members, got {list(values.shape)}"
        )
    if indices.shape != values.shape or rest.shape != values.shape[:-1]:
        raise ValueError(
            f"teacher must have indices {list(values.shape)} as its values and rest "
            f"{list(values.shape[:-1])}, got {list(indices.shape)} and {list(rest.shape)}"
        )
    if not values.is_floating_point() or not rest.is_floating_point():
        raise TypeError(
            f"teacher must have floating-point values and rest, got {values.dtype}, {rest.dtype}"
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher must have indices of torch.int64, got {indices.dtype}")
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= classes:
            index = low if low < 0 else high
            raise ValueError(f"teacher must have indices in [0, {classes}), got {index}")
