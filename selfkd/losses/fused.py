"""The distillation loss with an analytic gradient, in one pass over the logits.

The plain expression computes seven exponentials of the logits and keeps several arrays of their
size for the backward pass. Here a chunk of rows is read once, both losses and the gradient

    [(1 - alpha) (p_s - y) + alpha T (p_s^T - p_t^T)] / batch

are computed while the chunk is in cache, and only the gradient is kept. Powers of 2 replace powers
of e (with the factor in 1 / T), because PyTorch computes them more than twice as fast on a CPU.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import (
    Weights,
    add_softmax,
    average_logits,
    exponents,
    mean_softmax,
    member_weights,
)

_CHUNK = 2**17
"""Elements of a chunk per thread; two arrays of that size are the extra memory. On a core with
1 MiB of cache 2^15 and 2^16 are slower, and 2^18 is no faster."""
_LN_2 = math.log(2)

_Scalar = TypeVar("_Scalar", float, Tensor)


def weighted_sum(hard: _Scalar, soft: _Scalar, alpha: float) -> _Scalar:
    """Return `(1 - alpha) hard + alpha soft`, exactly one of them where the other has weight 0.

    The sum shares no memory with the terms, so that `loss /= n` does not change what is logged.
    """
    if alpha in (0.0, 1.0):  # an infinite term times 0 would be NaN
        term = soft if alpha else hard
        return term.clone() if isinstance(term, Tensor) else term
    return (1 - alpha) * hard + alpha * soft


def smooth(labels: Tensor, label_smoothing: float) -> Tensor:
    """Spread a share of the mass of probabilities `[batch, classes]` over all classes."""
    if not label_smoothing:
        return labels
    return labels * (1 - label_smoothing) + label_smoothing / labels.shape[-1]


def fused_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
    weights: Weights = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `plain_terms` together with its gradient."""
    settings = temperature, alpha, average, label_smoothing, weights
    with torch.no_grad():
        hard, soft, gradient = _losses_and_gradient(
            student_logits, teacher_logits, labels, *settings
        )
    loss = _PrecomputedGradient.apply(
        weighted_sum(hard, soft, alpha), gradient, student_logits, teacher_logits, labels, settings
    )
    return loss, gradient.new_full((), hard), gradient.new_full((), soft)


class _PrecomputedGradient(torch.autograd.Function):
    """A loss with its gradient, both computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: float,
        gradient: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        settings: tuple[float, float, str, float, Weights],
    ) -> Tensor:
        ctx.save_for_backward(student_logits, teacher_logits, labels)
        ctx.settings, ctx.gradient, ctx.dtype = settings, [gradient], student_logits.dtype
        return gradient.new_full((), loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # double backward
            gradient = _gradient(*ctx.saved_tensors, *ctx.settings) * grad_loss
        else:
            if ctx.gradient:  # handed over, so that it can be scaled in place
                gradient = ctx.gradient.pop()
            else:  # a second backward pass
                gradient = _losses_and_gradient(*ctx.saved_tensors, *ctx.settings)[-1]
            if grad_loss.item() != 1:
                gradient.mul_(grad_loss)
        return None, None, gradient.to(ctx.dtype), None, None, None


def _losses_and_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
    weights: Weights,
) -> tuple[float, float, Tensor]:
    """Return hard loss, soft loss and the gradient of their weighted sum, chunk by chunk."""
    batch, classes = student_logits.shape
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    limit = _CHUNK * torch.get_num_threads()
    chunks = min(batch, math.ceil(batch * classes / limit))
    rows = math.ceil(batch / chunks)
    gradient = student_logits.new_empty((batch, classes), dtype=dtype)
    shares = None  # weights of members whose probabilities are averaged
    if teacher_logits.ndim == 3 and average == "probabilities":
        shares = member_weights(teacher_logits, weights, dtype)
    at_once = 1 if shares is None else min(len(shares), max(1, int(limit / (rows * classes))))
    work = gradient.new_empty((1 + at_once, rows, classes))
    sums = gradient.new_empty((6, batch, 1))
    scale = 1 / (_LN_2 * temperature)
    hard_weight, soft_weight = (1 - alpha) / batch, alpha * temperature / batch
    soft_labels = labels.ndim == 2
    shared = temperature == 1 and not soft_labels  # one softmax for both terms
    targets = labels.to(dtype) if soft_labels else labels.unsqueeze(1)
    whole = (
        (student_logits, 0),
        (teacher_logits, -2),
        (targets, 0),
        (gradient, 0),
        (sums, 1),
    )
    parts = (tensor.tensor_split(chunks, dim) if chunks > 1 else (tensor,) for tensor, dim in whole)
    for student, teacher, label, p_s, totals in zip(*parts, strict=True):
        # in place, exponents become unnormalised probabilities; the totals normalise them
        log_y, cross, total_1, total_s, total_t, mass = totals.unbind()
        here = work if chunks == 1 else work[:, : p_s.shape[0]]
        p_t, p_1, *_ = here.unbind()
        exponents(student.to(dtype), scale, out=p_s)
        if shares is None:
            exponents(average_logits(teacher, weights, dtype), scale, out=p_1)
            torch.sum(torch.exp2(p_1, out=p_t), -1, True, out=total_t)
        else:
            add_softmax(teacher, shares, scale, work=here[1:], out=p_t)
            torch.log2(p_t, out=p_1)
            torch.mul(p_t[:, :1], 0, out=total_t).add_(1)  # NaN where a member's logits are
        torch.nansum(p_1.sub_(p_s).mul_(p_t), -1, True, out=cross)  # 0 log 0 = 0; total_t has NaN
        if soft_labels:
            torch.nansum(torch.mul(p_s, label, out=p_1), -1, True, out=log_y)
        else:
            torch.gather(p_s, 1, label, out=log_y)
        if label_smoothing:
            log_y.lerp_(p_s.mean(-1, True), label_smoothing)
        torch.sum(torch.mul(p_s, temperature, out=p_1).exp2_(), -1, True, out=total_1)
        if soft_labels:  # their sum is 1 up to rounding
            torch.sum(label, -1, True, out=mass)
            p_1.mul_(mass.mul_(1 - label_smoothing).add_(label_smoothing))
        if shared:
            total_s.copy_(total_1)
            torch.mul(p_1, total_s.reciprocal().mul_(soft_weight), out=p_s)
        else:
            torch.sum(p_s.exp2_(), -1, True, out=total_s)
            p_s.mul_(total_s.reciprocal().mul_(soft_weight))
        p_s.addcmul_(p_t, total_t.reciprocal(), value=-soft_weight)
        if hard_weight:
            p_s.addcmul_(p_1, total_1.reciprocal(), value=hard_weight)
    if hard_weight and soft_labels:
        gradient.sub_(targets, alpha=hard_weight * (1 - label_smoothing))
    elif hard_weight:
        gradient.scatter_(1, targets, -hard_weight * (1 - label_smoothing), reduce="add")
    if hard_weight and label_smoothing:
        gradient.sub_(hard_weight * label_smoothing / classes)
    sums = sums.double()
    sums[1].div_(sums[4])
    sums[2:5].log2_()
    if soft_labels:
        sums[2].mul_(sums[5])
    nats = _LN_2 / batch
    log_y, cross, log_1, log_s, log_t = sums[:5].sum((1, 2)).tolist()
    hard, soft = log_1 - temperature * log_y, temperature**2 * (cross + log_s - log_t)
    return nats * hard, nats * soft, gradient


def _gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
    weights: Weights,
) -> Tensor:
    """Return the gradient by differentiable operations, for double backward."""
    student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    batch, classes = student_logits.shape
    members = teacher_logits.to(student_logits.dtype)
    if average == "logits":
        members = average_logits(members, weights, members.dtype)
    p_t = mean_softmax(members / temperature, weights)
    y = (labels if labels.ndim == 2 else F.one_hot(labels, classes)).to(p_t.dtype)
    y = smooth(y, label_smoothing)
    hard = F.softmax(student_logits, dim=-1) * y.sum(-1, True) - y
    soft = F.softmax(student_logits / temperature, dim=-1) - p_t
    return ((1 - alpha) * hard + alpha * temperature * soft) / batch
