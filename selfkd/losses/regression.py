"""Knowledge distillation of numbers: the squared error to a teacher, while it is the better one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfkd.losses.averaging import average_logits
from selfkd.losses.distillation import DistillationTerms, check_settings, check_weights
from selfkd.losses.fused import weighted_sum
from selfkd.losses.multi_label import check_no_nan, check_values


def regression_terms(
    student_outputs: Tensor,
    teacher_outputs: Tensor | None,
    labels: Tensor | None,
    *,
    alpha: float,
    margin: float | None = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Distillation loss of regression, with its two terms by name.

        hard_loss = ||s - y||^2
        soft_loss = ||s - t||^2    where ||s - y||^2 + margin > ||t - y||^2, else 0
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    each a mean over the batch, with ||.||^2 the mean over the values of an item, as of
    `torch.nn.MSELoss`. The teacher bounds the student: an item for which the student is better than
    the teacher by the margin is trained on its label alone.

    The paper's sum over the values of an item is `values` times this mean: its weight beta is
    `beta * values` here. Its bounded term is the error to the label, not to the teacher.

    Args:
        student_outputs: Values `[batch, ...]`, floating point; computed in float32 or wider.
        teacher_outputs: Values of the same shape, or `[members, batch, ...]` of an ensemble, which
            are averaged; None for the hard term alone, with `alpha` 0. Never gets a gradient.
        labels: Values of the same shape; None for data without labels, with `alpha` 1, for which
            the soft term is not bounded.
        alpha: Weight of the soft term, in [0, 1].
        margin: Margin, in squared units of the labels; None for a soft term that is not bounded.
        weights: Weights of the members, at least 0, with sum 1; equal if not given.

    Returns:
        Scalars in squared units of the labels, of at least float32. Only `loss` carries the graph;
        a term without labels or teacher is 0.

    Raises:
        ValueError: A setting out of range, shapes that do not match, NaN of the labels or the
            teacher (checked on the CPU only), or labels or a teacher missing where `alpha` gives
            them a weight.
        TypeError: Outputs that are not floating point, or labels that are no tensor.

    >>> student = torch.tensor([1.0, 5.0], requires_grad=True)
    >>> teacher, labels = torch.tensor([2.0, 9.0]), torch.tensor([3.0, 5.0])
    >>> terms = regression_terms(student, teacher, labels, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]  # the second item is the student's own
    [1.25, 2.0, 0.5]

    Reference:
        Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", 2017,
        https://papers.nips.cc/paper/6676, whose bounded term is the error to the label
    """
    check_settings(1.0, alpha, "probabilities", 0.0)
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be at least 0, or None, got {margin}")
    check_values("student_outputs", student_outputs, teacher_outputs, labels, alpha)
    dtype = torch.promote_types(student_outputs.dtype, torch.float32)
    student = student_outputs.to(dtype)
    hard = soft = student.new_zeros(())
    errors = None
    if labels is not None:
        errors = _squared_error(student, labels.to(dtype))
        hard = errors.mean()
    if teacher_outputs is not None:
        teacher = teacher_outputs.detach().to(dtype)
        members = teacher.shape[: teacher.ndim - student.ndim]
        rows = teacher.reshape(*members, len(student), -1)
        shares = None if weights is None else check_weights(weights, rows)
        teacher = average_logits(rows, shares, dtype).reshape_as(student)
        distances = _squared_error(student, teacher)
        if margin is not None and errors is not None and labels is not None:
            bound = _squared_error(teacher, labels.to(dtype))
            distances = distances * (errors.detach() + margin > bound)
        soft = distances.mean()
    terms = DistillationTerms(weighted_sum(hard, soft, alpha), hard.detach(), soft.detach())
    check_no_nan("labels", labels, terms.hard_loss)
    check_no_nan("teacher_outputs", teacher_outputs, terms.soft_loss)
    return terms


def _squared_error(values: Tensor, others: Tensor) -> Tensor:
    """Return the mean squared difference of each item, `[batch]`."""
    return (values - others).square().reshape(len(values), -1).mean(dim=1)
