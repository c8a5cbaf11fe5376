"""Divergences of the soft term other than KL(p_t || p_s), and its cut to a common vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import Average, average_logits, member_weights
from selfkd.losses.distillation import DistillationTerms, check_weights
from selfkd.losses.fused import weighted_sum

Divergence = Literal["forward_kl", "reverse_kl", "js"]
"""Divergence of the soft term: KL(p_t || p_s), KL(p_s || p_t), or generalised Jensen-Shannon."""


class SoftTerm(NamedTuple):
    """Settings of the soft term beside its temperature."""

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    """Weight of the teacher in the mixture of `js`, in [0, 1]."""
    vocabulary: int | None = None
    """Number of the first classes compared; all if not given."""

    def is_whole(self, classes: int) -> bool:
        """Whether all classes of the student are compared."""
        return self.vocabulary in (None, classes)

    def checked(self) -> SoftTerm:
        """Return the settings with `js` at the ends of beta resolved.

        Raises:
            ValueError: An unknown divergence, or a beta or a vocabulary out of range.
        """
        if self.divergence not in get_args(Divergence):
            raise ValueError(
                f"divergence must be 'forward_kl', 'reverse_kl' or 'js', got {self.divergence!r}"
            )
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(f"vocabulary must be at least 2, got {self.vocabulary}")
        if self.divergence == "js" and self.beta in (0, 1):
            return self._replace(divergence="reverse_kl" if self.beta else "forward_kl")
        return self


def divergence_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    average: Average,
    weights: Sequence[float] | Tensor | None,
    soft: SoftTerm,
) -> DistillationTerms:
    """Compute the terms with any divergence over the first classes, without checks.

    The hard term is over all classes of the student. Classes of which the student's logit is -inf
    add nothing to the soft term, and get no gradient.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, vocabulary]`, or `[members, batch, vocabulary]`.
        labels: Class indices `[batch]`.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1].
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average, with sum 1.
        soft: Divergence and its settings.

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", 2024, https://arxiv.org/abs/2306.13649
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(dtype)
    hard = F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    log_p_s = F.log_softmax(student_logits[:, : soft.vocabulary] / temperature, dim=-1)
    log_p_t = _log_teacher(teacher_logits.detach().to(dtype), temperature, average, weights)
    if soft.divergence == "forward_kl":
        divergence = _kl(log_p_t, log_p_s)
    elif soft.divergence == "reverse_kl":
        divergence = _kl(log_p_s, log_p_t)
    else:
        # the gradient through the mixture is the same for all classes, which a softmax ignores
        log_m = torch.logaddexp(
            log_p_t + math.log(soft.beta), log_p_s.detach() + math.log1p(-soft.beta)
        )
        divergence = soft.beta * _kl(log_p_t, log_m) + (1 - soft.beta) * _kl(log_p_s, log_m)
    soft_loss = temperature**2 * divergence
    return DistillationTerms(
        weighted_sum(hard, soft_loss, alpha), hard.detach(), soft_loss.detach()
    )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the mean over rows of KL(p || q), with 0 log 0 = 0 and no NaN in the gradient."""
    difference = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    return (log_p.exp() * difference).sum(-1).mean()


def _log_teacher(
    logits: Tensor,
    temperature: float,
    average: Average,
    weights: Sequence[float] | Tensor | None,
) -> Tensor:
    """Return the log-probabilities at T of a teacher, or of members averaged into one."""
    if logits.ndim == 2:
        return F.log_softmax(logits / temperature, dim=-1)
    shares = [1 / len(logits)] * len(logits) if weights is None else check_weights(weights, logits)
    kept = [number for number, share in enumerate(shares) if share]
    if len(kept) < len(shares):  # 0 times -inf would be NaN
        logits, shares = logits[kept], [shares[number] for number in kept]
    if average == "logits":
        mean = average_logits(logits, shares, logits.dtype)
        return F.log_softmax(mean / temperature, dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return torch.logsumexp(log_p + member_weights(logits, shares, logits.dtype).log(), dim=0)
