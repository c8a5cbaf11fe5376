"""The distillation loss with its gradient written out, in one pass over the data.

The plain expression runs seven exponentials over the logits and keeps several arrays of their
size for the backward pass. Here a chunk of rows is read once, both losses and the gradient

    [(1 - alpha) (p_s - y) + alpha T (p_s^T - p_t^T)] / batch

are computed while it lies in cache, and the gradient is all that is kept. Powers of 2 are used for
those of e (the factor goes into 1 / T): PyTorch computes them more than twice as fast on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**18
"""Elements a chunk. The fastest of 2^15 ... 2^19; three arrays of this size are the extra memory."""
_LOG2_E = 1 / math.log(2)


def fused_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_terms`, computed with its gradient."""
    loss, hard, soft = _Fused.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits, labels, temperature, alpha, average, label_smoothing
    )
    return loss, hard, soft


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        temperature: float,
        alpha: float,
        average: str,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(student_logits, teacher_logits, labels)
        ctx.settings = temperature, alpha, average, label_smoothing
        hard, soft, ctx.gradient = _losses_and_gradient(
            student_logits, teacher_logits, labels, temperature, alpha, average, label_smoothing
        )
        loss = (1 - alpha) * hard + alpha * soft if 0 < alpha < 1 else soft if alpha else hard
        terms = [ctx.gradient.new_tensor(value) for value in (loss, hard, soft)]
        ctx.mark_non_differentiable(*terms[1:])
        return terms[0], terms[1], terms[2]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, labels = ctx.saved_tensors
        # given away, so that it may be scaled in place here and written to by whoever gets it
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():  # a second time, or to be differentiated
            gradient = _gradient(student_logits, teacher_logits, labels, *ctx.settings) * grad_loss
        elif grad_loss != 1:
            gradient.mul_(grad_loss)
        return gradient.to(student_logits.dtype), None, None, None, None, None, None


def _losses_and_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
) -> tuple[float, float, Tensor]:
    batch, classes = student_logits.shape
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    rows = min(batch, max(1, _CHUNK // classes))
    gradient = student_logits.new_empty(batch, classes, dtype=dtype)
    work = gradient.new_empty(3, rows, classes)
    scale = _LOG2_E / temperature
    hard_weight, soft_weight = (1 - alpha) / batch, alpha * temperature / batch
    hard = soft = 0.0
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        grad = gradient[part]
        p_s, log_t, p_t = work[:, : len(grad)].unbind()  # each up to a factor or summand a row
        student = student_logits[part].to(dtype)
        top = _exponents(student, scale, out=p_s)  # log2 p_s^T, until it is exponentiated
        total_t = _teacher(teacher_logits[..., part, :], scale, average, log_t, p_t)
        if temperature != 1:
            total_1 = torch.mul(p_s, temperature, out=grad).exp2_().sum(-1, True)
        cross = log_t.sub_(p_s).mul_(p_t).nansum(-1, True)  # 0 log 0 = 0
        total_s = p_s.exp2_().sum(-1, True)
        if temperature != 1:
            grad.mul_(hard_weight / total_1).addcmul_(p_s, soft_weight / total_s)
        else:
            total_1 = total_s
            torch.mul(p_s, (hard_weight + soft_weight) / total_s, out=grad)
        grad.addcmul_(p_t, -soft_weight / total_t)
        hard += total_1.log().add_(top).sum().item()
        soft += (
            torch.add((total_s / total_t).log_(), cross / total_t, alpha=1 / _LOG2_E).sum().item()
        )
    indices = labels[:, None]
    hard -= (1 - label_smoothing) * student_logits.gather(1, indices).to(dtype).sum().item()
    share = gradient.new_full(indices.shape, -hard_weight * (1 - label_smoothing))
    gradient.scatter_add_(1, indices, share)
    if label_smoothing:
        hard -= label_smoothing * student_logits.sum(dtype=dtype).item() / classes
        gradient.sub_(hard_weight * label_smoothing / classes)
    return hard / batch, temperature**2 * soft / batch, gradient


def _exponents(logits: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """Write `scale (logits - largest of the row)` to `out`; return the largest."""
    top = logits.amax(-1, True)
    torch.add(top * -scale, logits, alpha=scale, out=out)
    return top


def _teacher(logits: Tensor, scale: float, average: str, log_p: Tensor, p: Tensor) -> Tensor:
    """Write probabilities times a total to `p`, their log2 to `log_p`; return each row's total."""
    if logits.ndim == 2 or average == "logits":
        _exponents(_mean(logits, log_p.dtype), scale, out=log_p)
        return torch.exp2(log_p, out=p).sum(-1, True)
    p.zero_()
    for member in logits:
        _exponents(member.to(log_p.dtype), scale, out=log_p)
        total = log_p.exp2_().sum(-1, True)
        p.addcmul_(log_p, total.reciprocal_())
    torch.log2(p, out=log_p)
    return p.new_full((1, 1), len(logits))


def _mean(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.to(dtype) if logits.ndim == 2 else logits.mean(0, dtype=dtype)


def _gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    average: str,
    label_smoothing: float,
) -> Tensor:
    """The gradient by operations that can be differentiated in turn."""
    student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    batch, classes = student_logits.shape
    members = teacher_logits.to(student_logits.dtype)
    if average == "logits":
        members = _mean(members, members.dtype)
    p_t = F.softmax(members / temperature, dim=-1).view(-1, batch, classes).mean(dim=0)
    y = F.one_hot(labels, classes) * (1 - label_smoothing) + label_smoothing / classes
    hard = F.softmax(student_logits, dim=-1) - y
    soft = F.softmax(student_logits / temperature, dim=-1) - p_t
    return ((1 - alpha) * hard + alpha * temperature * soft) / batch
