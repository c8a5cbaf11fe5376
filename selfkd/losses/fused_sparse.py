"""The loss of a teacher's k largest logits with an analytic gradient, chunk by chunk of rows.

With p the student's probabilities at T, R the sum of those of the classes that a teacher's k
largest leave, and q the teacher's probabilities of the k classes and of the bucket of the rest, the
gradient of the soft term is

    alpha T (p - q) / batch  of a known class,    alpha T p (1 - q_bucket / R) / batch  of another.

As in `selfkd.losses.fused`, a chunk of rows is read once, with powers of 2, and only the gradient
is kept. At T = 1 both terms share one softmax. A term of weight 0 has no part in the gradient.
Against `fused_terms` on one core it takes 0.5 to 0.85 times the time at 10,000 classes and more,
0.6 to 1.1 times at 1,000, and 1.2 to 1.6 times at 100 and fewer, where a step takes 0.2 to 0.3 ms
(tests/benchmarks/sparse.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import exponents
from selfkd.losses.distillation import cross_entropy
from selfkd.losses.fused import weighted_sum

_CHUNK = 2**17
"""Elements of a chunk per thread, as in `selfkd.losses.fused`."""
_LN_2 = math.log(2)
_LEAST = {torch.float32: -100.0, torch.float64: -960.0}
"""Binary logarithm of a probability below which a row is computed with logarithms throughout."""


def plain_sparse_terms(
    student_logits: Tensor,
    log_q_t: Tensor,
    indices: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    shares: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, hard and soft loss in plain PyTorch, without checks.

    Args:
        student_logits: Logits `[batch, classes]`.
        log_q_t: Log-probabilities of the teachers at T, `[members, batch, k + 1]`, the bucket last;
            `[members, batch, k]` if all classes are known. Float32 or wider, as the result.
        indices: Known classes `[members, batch, k]`.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1].
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        shares: Weights of the members, above 0.
    """
    student_logits = student_logits.to(log_q_t.dtype)
    hard = cross_entropy(student_logits, labels, label_smoothing)
    log_p_s = F.log_softmax(student_logits / temperature, dim=-1)
    divergences = [
        share * _divergence(log_p_s, log_q, places).mean()
        for share, log_q, places in zip(shares, log_q_t, indices, strict=True)
    ]
    soft = temperature**2 * torch.stack(divergences).sum()
    return weighted_sum(hard, soft, alpha), hard.detach(), soft.detach()


def fused_sparse_terms(
    student_logits: Tensor, log_q_t: Tensor, indices: Tensor, labels: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `plain_sparse_terms` together with its gradient."""
    tensors = student_logits, log_q_t, indices, labels
    with torch.no_grad():
        hard, soft, gradient = _losses_and_gradient(*tensors, *settings)
    _, alpha, *_ = settings
    loss = _PrecomputedGradient.apply(weighted_sum(hard, soft, alpha), gradient, settings, *tensors)
    return loss, gradient.new_full((), hard), gradient.new_full((), soft)


class _PrecomputedGradient(torch.autograd.Function):
    """A loss with its gradient, both computed before."""

    @staticmethod
    def forward(
        ctx: Any, loss: float, gradient: Tensor, settings: tuple[Any, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.gradient, ctx.dtype = settings, [gradient], tensors[0].dtype
        return gradient.new_full((), loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # double backward
            loss, _, _ = plain_sparse_terms(*ctx.saved_tensors, *ctx.settings)
            (gradient,) = torch.autograd.grad(loss, ctx.saved_tensors[0], create_graph=True)
            gradient = gradient * grad_loss
        else:
            if ctx.gradient:  # handed over, so that it can be scaled in place
                gradient = ctx.gradient.pop()
            else:  # a second backward pass
                gradient = _losses_and_gradient(*ctx.saved_tensors, *ctx.settings)[-1]
            if grad_loss.item() != 1:
                gradient.mul_(grad_loss)
        return None, None, None, gradient.to(ctx.dtype), None, None, None


def _losses_and_gradient(
    student_logits: Tensor,
    log_q_t: Tensor,
    indices: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    shares: Sequence[float],
) -> tuple[float, float, Tensor]:
    """Return hard loss, soft loss and the gradient of their weighted sum, chunk by chunk."""
    batch, classes = student_logits.shape
    members, _, k = indices.shape
    chunks = min(batch, math.ceil(batch * classes / (_CHUNK * torch.get_num_threads())))
    shared = temperature == 1  # one softmax for both terms
    gradient, p_s = log_q_t.new_empty(batch, classes), torch.empty_like(log_q_t)
    work = log_q_t.new_empty((members > 1) + (not shared), math.ceil(batch / chunks), classes)
    log_y, mass, total_1, total_s = sums = log_q_t.new_ones(4, batch, 1)
    q_t = log_q_t.exp()
    hard_weight, soft_weight = (1 - alpha) / batch, alpha * temperature / batch
    only_hard = soft_weight == 0 and not shared
    soft_labels = labels.ndim == 2
    targets = labels.to(gradient.dtype) if soft_labels else labels.unsqueeze(1)
    parts = (
        tensor.tensor_split(chunks, dim) if chunks > 1 else (tensor,)
        for tensor, dim in (
            (student_logits, 0), (q_t, 1), (indices, 1), (targets, 0), (gradient, 0), (p_s, 1),
            (sums, 1),
        )
    )  # fmt: skip
    for student, q_here, places_here, target, out, p_here, sums_here in zip(*parts, strict=True):
        # in place, exponents become unnormalised probabilities; the totals normalise them
        x = out if members == 1 else work[0, : len(out)]
        exponents(student.to(x.dtype), 1 / _LN_2, out=x)
        hard_here: float | Tensor = hard_weight
        if soft_labels:
            torch.nansum(x * target, -1, True, out=sums_here[0])
            torch.sum(target, -1, True, out=sums_here[1])  # 1 up to rounding
            hard_here = sums_here[1].mul_(1 - label_smoothing).add_(label_smoothing) * hard_weight
        else:
            torch.gather(x, 1, target, out=sums_here[0])
        if label_smoothing:
            # not `lerp`, which is NaN where both are -inf
            sums_here[0].mul_(1 - label_smoothing).add_(x.mean(-1, True), alpha=label_smoothing)
        if not shared:
            p_1 = torch.exp2(x, out=work[-1, : len(out)])
            torch.sum(p_1, -1, True, out=sums_here[2])
            x.mul_(1 / temperature)
        x.exp2_()
        for member, share in enumerate(shares):
            places, p, q = places_here[member], p_here[member], q_here[member]
            known, bucket = p[:, :k], p[:, k:]
            torch.gather(x, 1, places, out=known)
            x.scatter_(1, places, 0.0)  # 1 less the known ones would lose a small rest
            if k < classes:
                torch.sum(x, -1, True, out=bucket)
            if not member:
                torch.sum(p, -1, True, out=sums_here[3])
                inverse_1, inverse_s = sums_here[2:].reciprocal()
            if only_hard:  # of which x has no part
                x.scatter_(1, places, known)
                continue
            ours = torch.mul(p, inverse_s * (share * (soft_weight + hard_here * shared)))
            ours.sub_(q, alpha=share * soft_weight)
            if k == classes:
                out = out if member else out.zero_()
            elif member:
                out.addcmul_(x, ours[:, k:] / bucket)
            else:
                torch.mul(x, ours[:, k:] / bucket, out=out)
            if members > 1:
                x.scatter_(1, places, known)
            out.scatter_add_(1, places, ours[:, :k])
        if only_hard:
            torch.mul(p_1, inverse_1 * hard_here, out=out)
        elif hard_weight and not shared:
            out.addcmul_(p_1, inverse_1 * hard_here)
    if hard_weight:
        if soft_labels:
            gradient.sub_(targets, alpha=hard_weight * (1 - label_smoothing))
        else:
            gradient.scatter_(1, targets, -hard_weight * (1 - label_smoothing), reduce="add")
        if label_smoothing:
            gradient.sub_(hard_weight * label_smoothing / classes)
    log_1 = (total_s if shared else total_1).log2()
    hard = (log_1 * mass if soft_labels else log_1).sub_(log_y)
    log_p = p_s.div_(total_s).log2_()
    kl = torch.add(log_q_t, log_p, alpha=-_LN_2).mul_(q_t)
    if members > 1:
        kl.mul_(kl.new_tensor(shares)[:, None, None])
    hard_sum, soft_sum = (each.sum(dtype=torch.float64).item() for each in (hard, kl))
    least = _LEAST[kl.dtype]
    if not (math.isfinite(soft_sum) and log_p.amin().item() >= least):
        rows = (~kl.isfinite() | (log_p < least)).any(-1).any(0).nonzero()[:, 0]
        kl[:, rows] = 0
        with torch.enable_grad():
            z = student_logits[rows].to(kl.dtype).requires_grad_()
            loss, _, soft = plain_sparse_terms(
                z, log_q_t[:, rows], indices[:, rows], labels[rows],
                temperature, alpha, label_smoothing, shares,
            )  # fmt: skip
            gradient[rows] = torch.autograd.grad(loss * (len(rows) / batch), z)[0]
        soft_sum = kl.sum(dtype=torch.float64).item() + len(rows) / temperature**2 * soft.item()
    return _LN_2 / batch * hard_sum, temperature**2 / batch * soft_sum, gradient


def _divergence(log_p_s: Tensor, log_q_t: Tensor, indices: Tensor) -> Tensor:
    """Return each row's KL over the k classes and the bucket of the others, if any."""
    log_q_s = log_p_s.gather(-1, indices)
    if log_q_t.shape[-1] > indices.shape[-1]:
        # masked rather than subtracted from 1, and with the least number rather than -inf, because
        # the log-sum-exp of -inf alone has a NaN gradient
        masked = log_p_s.scatter(-1, indices, torch.finfo(log_p_s.dtype).min)
        log_q_s = torch.cat([log_q_s, masked.logsumexp(-1, keepdim=True)], dim=-1)
    q_t = log_q_t.exp()
    return torch.where(q_t == 0, 0.0, q_t * (log_q_t - log_q_s)).sum(-1)  # 0 log 0 = 0, NaN stays
