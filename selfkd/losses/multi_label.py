"""Knowledge distillation where several labels may hold: a sigmoid for each, not one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import Average, average_logits, member_weights
from selfkd.losses.distillation import (
    DistillationTerms,
    check_floating,
    check_settings,
    check_tensor,
    check_weights,
    is_nan,
)
from selfkd.losses.fused import weighted_sum


def multi_label_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    average: Average = "probabilities",
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Distillation loss of independent labels, with its two terms by name.

        hard_loss = BCE(y, p_s)
        soft_loss = T^2 KL(p_t^T || p_s^T)                    p^T = sigmoid(z / T)
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    each a mean over batch and labels, as of `torch.nn.BCEWithLogitsLoss`; KL is that of the two
    Bernoulli distributions of a label:

        d loss / d z_s = [(1 - alpha) (p_s - y) + alpha T (p_s^T - p_t^T)] / (batch labels)

    The paper's soft loss, a sum over labels at T = 1, is `labels` times this: its weight beta is
    `beta * labels` here, beside a hard term that is a mean over labels.

    Args:
        student_logits: Logits `[batch, labels]`, or of more dimensions, floating point; computed
            in float32 or wider.
        teacher_logits: Logits of the same shape, or `[members, batch, labels]` of an ensemble;
            None for the hard term alone, with `alpha` 0. Never gets a gradient.
        labels: Labels or their probabilities of the same shape, in [0, 1], of any dtype; None for
            data without labels, with `alpha` 1.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1].
        average: Mean of an ensemble's `probabilities` at T, or of its `logits`.
        label_smoothing: Label smoothing: labels become `y (1 - s) + s / 2`.
        weights: Weights of the members, at least 0, with sum 1; equal if not given.

    Returns:
        Scalars in nats, of at least float32. Only `loss` carries the graph; a term without labels
        or teacher is 0.

    Raises:
        ValueError: A setting out of range, shapes that do not match, labels outside [0, 1], NaN of
            the teacher (checked on the CPU only), or labels or a teacher missing where `alpha`
            gives them a weight.
        TypeError: Logits that are not floating point, or labels that are no tensor.

    >>> student, teacher = torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 0.0]])
    >>> labels = torch.tensor([[1, 1]])
    >>> terms = multi_label_terms(student, teacher, labels, temperature=2.0, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]
    [0.4116, 0.7201, 0.1031]

    Reference:
        Yang et al., "Multi-Label Knowledge Distillation", 2023, https://arxiv.org/abs/2308.06453
    """
    check_settings(temperature, alpha, average, label_smoothing)
    check_values("student_logits", student_logits, teacher_logits, labels, alpha)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits.to(dtype).reshape(len(student_logits), -1)
    hard = soft = student.new_zeros(())
    if labels is not None:
        _check_probabilities(labels)
        targets = labels.to(dtype) * (1 - label_smoothing) + label_smoothing / 2
        hard = F.binary_cross_entropy_with_logits(student, targets.reshape_as(student))
    if teacher_logits is not None:
        members = teacher_logits.shape[: teacher_logits.ndim - student_logits.ndim]
        teacher = teacher_logits.detach().to(dtype).reshape(*members, *student.shape)
        positive, negative = _log_probabilities(teacher, temperature, average, weights)
        scaled = student / temperature
        kl = _part(positive, F.logsigmoid(scaled)) + _part(negative, F.logsigmoid(-scaled))
        soft = temperature**2 * kl.mean()
    terms = DistillationTerms(weighted_sum(hard, soft, alpha), hard.detach(), soft.detach())
    check_no_nan("teacher_logits", teacher_logits, terms.soft_loss)
    return terms


def check_values(
    name: str, student: Tensor, teacher: Tensor | None, labels: Tensor | None, alpha: float
) -> None:
    """Check that the student's, the teacher's and the given values of a batch fit each other.

    Raises:
        ValueError: Shapes that do not match, or what `alpha` gives a weight is missing.
        TypeError: Values that are not floating point, or labels that are no tensor.
    """
    if labels is not None:
        check_tensor("labels", labels)
    shape = list(student.shape)
    if not shape or 0 in shape:
        raise ValueError(f"{name} must be [batch, ...], got shape {shape}")
    check_floating(name, student)
    if labels is None and alpha < 1:
        raise ValueError(f"labels must be given where alpha is below 1, got None with {alpha=}")
    if teacher is None and alpha > 0:
        raise ValueError(f"the teacher must be given where alpha is above 0, got {alpha=}")
    if labels is not None and list(labels.shape) != shape:
        raise ValueError(f"labels must be {shape} as {name}, got {list(labels.shape)}")
    if teacher is not None:
        check_floating(name.replace("student", "teacher"), teacher)
        if list(teacher.shape) not in (shape, [*teacher.shape[:1], *shape]) or not len(teacher):
            raise ValueError(
                f"{name.replace('student', 'teacher')} must be {shape} as {name}, or that for each "
                f"of the members, got {list(teacher.shape)}"
            )


def check_no_nan(name: str, value: Tensor | None, term: Tensor) -> None:
    """Raise ValueError where a term is NaN because a value is.

    Nothing is checked where reading the term would wait for a GPU.
    """
    if value is not None and is_nan(term) and value.isnan().any():
        place = value.isnan().nonzero()[0].tolist()
        raise ValueError(f"{name} must be numbers, got nan at {place}")


def _check_probabilities(labels: Tensor) -> None:
    """Raise ValueError for a label outside [0, 1], where reading it would not wait for a GPU."""
    if labels.is_cpu and not torch.compiler.is_compiling():
        low, high = (float(bound) for bound in torch.aminmax(labels))
        if not (low >= 0 and high <= 1):
            wrong = high if low >= 0 else low
            raise ValueError(f"labels must be in [0, 1], one for each logit, got {wrong}")


def _log_probabilities(
    logits: Tensor, temperature: float, average: Average, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the log of the teacher's probability that each label holds, and that it does not.

    Args:
        logits: Logits `[batch, labels]`, or `[members, batch, labels]`.
        temperature: Temperature T.
        average: Average of probabilities or of logits.
        weights: Weights of the members.
    """
    shares = None if weights is None else check_weights(weights, logits)
    if logits.ndim == 3:
        if average == "logits":
            logits = average_logits(logits, shares, logits.dtype)
        else:
            share = member_weights(logits, shares, logits.dtype).log()
            scaled = logits / temperature
            both = (F.logsigmoid(scaled), F.logsigmoid(-scaled))
            positive, negative = (torch.logsumexp(part + share, dim=0) for part in both)
            return positive, negative
    scaled = logits / temperature
    return F.logsigmoid(scaled), F.logsigmoid(-scaled)


def _part(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q))
