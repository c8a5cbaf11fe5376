"""The distillation loss with its gradient written out, in one pass over the data.

The plain expression runs seven exponentials over the logits and keeps several arrays of their
size for the backward pass. Here a chunk of rows is read once, both losses and the gradient

    [(1 - alpha) (p_s - y) + alpha T (p_s^T - p_t^T)] / batch

are computed while it lies in cache, and the gradient is all that is kept. Powers of 2 are used for
those of e (the factor goes into 1 / T): PyTorch computes them more than twice as fast on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**17
"""Elements in a chunk for each thread; two arrays of that size are the extra memory. 2^15 and 2^16
are slower, 2^18 is no faster (a core with 1 MiB of cache)."""
_LN_2 = math.log(2)

Weights = Sequence[float] | None
"""Of an ensemble's members, with sum 1; None where all are the same."""

_Scalar = TypeVar("_Scalar", float, Tensor)


def weigh(hard: _Scalar, soft: _Scalar, alpha: float) -> _Scalar:
    """Return `(1 - alpha) hard + alpha soft`; at either end exactly the term that is left."""
    if alpha in (0.0, 1.0):  # so that an infinite term of weight 0 does not make NaN
        return soft if alpha else hard
    return (1 - alpha) * hard + alpha * soft


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
    """`plain_terms`, computed with its gradient."""
    settings = temperature, alpha, average, label_smoothing, weights
    with torch.no_grad():
        hard, soft, gradient = _losses_and_gradient(
            student_logits, teacher_logits, labels, *settings
        )
    loss = _GradientAtHand.apply(
        weigh(hard, soft, alpha), gradient, student_logits, teacher_logits, labels, settings
    )
    return loss, gradient.new_full((), hard), gradient.new_full((), soft)


class _GradientAtHand(torch.autograd.Function):
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
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            gradient = _gradient(*ctx.saved_tensors, *ctx.settings) * grad_loss
        else:
            if ctx.gradient:  # given away, so that it may be scaled in place
                gradient = ctx.gradient.pop()
            else:  # asked for a second time
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
    batch, classes = student_logits.shape
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    limit = _CHUNK * torch.get_num_threads()
    chunks = min(batch, math.ceil(batch * classes / limit))
    rows = math.ceil(batch / chunks)
    gradient = student_logits.new_empty(batch, classes, dtype=dtype)
    shares = None  # of members whose probabilities are to be averaged
    if teacher_logits.ndim == 3 and average == "probabilities":
        shares = share_of_members(teacher_logits, weights, dtype)
    at_once = 1 if shares is None else min(len(shares), max(1, int(limit / (rows * classes))))
    work = gradient.new_empty(1 + at_once, rows, classes)
    sums = gradient.new_empty(5, batch, 1)
    scale = 1 / (_LN_2 * temperature)
    hard_weight, soft_weight = (1 - alpha) / batch, alpha * temperature / batch
    indices = labels.unsqueeze(1)
    parts = (
        tensor.tensor_split(chunks, dim) if chunks > 1 else (tensor,)
        for tensor, dim in (
            (student_logits, 0),
            (teacher_logits, -2),
            (indices, 0),
            (gradient, 0),
            (sums, 1),
        )
    )
    for student, teacher, label, p_s, (log_y, cross, total_1, total_s, total_t) in zip(
        *parts, strict=True
    ):
        # in place, exponents become probabilities, each row up to a factor: its total
        here = work[:, : len(p_s)]
        p_t, p_1 = here[0], here[1]
        _exponents(student.to(dtype), scale, out=p_s)
        if shares is None:
            _exponents(average_logits(teacher, weights, dtype), scale, out=p_1)
            torch.sum(torch.exp2(p_1, out=p_t), -1, True, out=total_t)
        else:
            _mix(teacher, shares, scale, work=here[1:], out=p_t)
            torch.log2(p_t, out=p_1)
            torch.mul(p_t[:, :1], 0, out=total_t).add_(1)  # NaN where a member's is
        torch.gather(p_s, 1, label, out=log_y)
        if label_smoothing:
            log_y.lerp_(p_s.mean(-1, True), label_smoothing)
        torch.nansum(p_1.sub_(p_s).mul_(p_t), -1, True, out=cross)  # 0 log 0 = 0; NaN is in total_t
        torch.sum(torch.mul(p_s, temperature, out=p_1).exp2_(), -1, True, out=total_1)
        torch.sum(p_s.exp2_(), -1, True, out=total_s)
        p_s.mul_(total_s.reciprocal().mul_(soft_weight))
        p_s.addcmul_(p_t, total_t.reciprocal(), value=-soft_weight)
        p_s.addcmul_(p_1, total_1.reciprocal(), value=hard_weight)
    gradient.scatter_(1, indices, -hard_weight * (1 - label_smoothing), reduce="add")
    if label_smoothing:
        gradient.sub_(hard_weight * label_smoothing / classes)
    sums = sums.double()
    sums[1].div_(sums[4])
    sums[2:].log2_()
    nats = _LN_2 / batch
    log_y, cross, log_1, log_s, log_t = sums.sum((1, 2)).tolist()
    hard, soft = log_1 - temperature * log_y, temperature**2 * (cross + log_s - log_t)
    return nats * hard, nats * soft, gradient


def _exponents(logits: Tensor, scale: float, *, out: Tensor) -> None:
    """Write `scale (logits - largest of the row)` to `out`."""
    torch.add(logits.amax(-1, True) * -scale, logits, alpha=scale, out=out)


def _mix(logits: Tensor, shares: Tensor, scale: float, *, work: Tensor, out: Tensor) -> None:
    """Write the mean of the members' softmax to `out`; as many at once as there is `work` for."""
    out.zero_()
    for part, share in zip(*(torch.split(t, len(work)) for t in (logits, shares)), strict=True):
        members = work[: len(part)]
        _exponents(part.to(work.dtype), scale, out=members)
        factors = share / members.exp2_().sum(-1, True)
        if len(members) == 1:
            out.addcmul_(members[0], factors[0])
        else:
            out.add_(members.mul_(factors).sum(0))


def average_logits(logits: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return the mean of the members' logits, or the only one's."""
    if logits.ndim == 2:
        return logits.to(dtype)
    if weights is None:
        return logits.mean(0, dtype=dtype)
    return (logits.to(dtype) * share_of_members(logits, weights, dtype)).sum(0)


def mean_softmax(logits: Tensor, weights: Weights) -> Tensor:
    """Return the mean of the members' softmax, or the only one's."""
    p = F.softmax(logits, dim=-1)
    if p.ndim == 2:
        return p
    return p.mean(0) if weights is None else (p * share_of_members(p, weights, p.dtype)).sum(0)


def share_of_members(logits: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return the members' weights as `[members, 1, 1]`."""
    if weights is None:
        return logits.new_full((len(logits), 1, 1), 1 / len(logits), dtype=dtype)
    return torch.tensor(weights, dtype=dtype, device=logits.device).view(-1, 1, 1)


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
    """The gradient by operations that can be differentiated in turn."""
    student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    batch, classes = student_logits.shape
    members = teacher_logits.to(student_logits.dtype)
    if average == "logits":
        members = average_logits(members, weights, members.dtype)
    p_t = mean_softmax(members / temperature, weights)
    y = F.one_hot(labels, classes).to(p_t.dtype) * (1 - label_smoothing) + label_smoothing / classes
    hard = F.softmax(student_logits, dim=-1) - y
    soft = F.softmax(student_logits / temperature, dim=-1) - p_t
    return ((1 - alpha) * hard + alpha * temperature * soft) / batch
