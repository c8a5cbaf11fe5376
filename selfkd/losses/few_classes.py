"""The distillation loss of few classes, by torch's own kernels: a step of it takes least calls.

Over ten classes and small batches, the calls take the time and not the arithmetic:
`fused_terms` makes some forty of them, this a dozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import (
    DistillationTerms,
    as_single,
    check_labels,
    check_settings,
    check_tensors,
    cross_entropy,
    detached,
)
from selfkd.losses.fused import weighted_sum

MOST = 200
"""Most classes of which it is faster than `fused_terms` on a CPU."""
HOTTEST = 32.0
"""Highest temperature at which it is as exact: T^2 times the difference of two entropies, each of
which is rounded, is off by 5e-5 there and by 0.05 at 1,000."""


def few_classes_terms(
    student_logits: Tensor,
    soft_targets: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> DistillationTerms:
    """Distillation loss of few classes with its two terms, as `distillation_terms`.

        hard_loss = CE(y, p_s)
        soft_loss = T^2 KL(p_t^T || p_s^T)                    p^T = softmax(z / T)
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    Args:
        student_logits: Logits `[batch, classes]`.
        soft_targets: Probabilities p_t^T `[batch, classes]`, as of `soft_targets` at T; never get a
            gradient.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        temperature: Temperature T, above 0; at most `HOTTEST`, or the soft loss is inexact.
        alpha: Weight of the soft term, in [0, 1].
        label_smoothing: Share of the labels' mass spread over all classes.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph. The soft loss is NaN where a
        class of the student has no probability at all.

    Raises:
        ValueError, TypeError: Same as `distillation_terms`.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    check_settings(temperature, alpha, "probabilities", label_smoothing)
    check_tensors(student_logits, soft_targets, labels)
    if labels.ndim == 2:
        check_labels(labels, student_logits.shape[1])
    logits = as_single(student_logits)
    try:
        hard = cross_entropy(logits, detached(labels), label_smoothing)
    except (IndexError, RuntimeError):
        check_labels(labels, student_logits.shape[1])
        raise
    log_p_s = F.log_softmax(logits / temperature, dim=-1)
    p_t = detached(soft_targets).to(logits.dtype)
    divergence = torch.kl_div(log_p_s, p_t, reduction=2)
    soft = divergence * (temperature**2 / logits.shape[0])
    return DistillationTerms(weighted_sum(hard, soft, alpha), hard.detach(), soft.detach())
