"""Hard and soft term of a batch for each kind of label: one class, several labels, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from selfkd.losses.averaging import Average
from selfkd.losses.distillation import DistillationTerms, distillation_terms, hard_loss
from selfkd.losses.multi_label import multi_label_terms
from selfkd.losses.regression import regression_terms
from selfkd.losses.sequences import SampledTargets, sequence_terms
from selfkd.losses.sparse import SparseLogits, sparse_terms

Task = Literal["single_label", "multi_label", "regression"]
"""Kind of label: one class of several, several labels of which each may hold, or numbers."""


def hard_term(
    task: Task, student_logits: Tensor, labels: Tensor | None, *, label_smoothing: float
) -> Tensor:
    """Return the loss without a teacher: cross-entropy, binary cross-entropy or squared error."""
    if labels is None:
        raise ValueError(
            "labels must be given where there is neither a teacher nor targets, got None"
        )
    if task == "single_label":
        return hard_loss(student_logits, labels, label_smoothing=label_smoothing)
    if task == "regression":
        return regression_terms(student_logits, None, labels, alpha=0.0).loss
    return multi_label_terms(
        student_logits,
        None,
        labels,
        temperature=1.0,
        alpha=0.0,
        label_smoothing=label_smoothing,
    ).loss


def masked_hard_term(
    task: Task,
    student_logits: Tensor,
    labels: Tensor,
    unlabelled: int,
    share: float | None,
    label_smoothing: float,
) -> Tensor:
    """Return the loss without a teacher of a batch whose last items have no label.

    Args:
        task: Kind of label.
        student_logits: Logits `[batch, classes]`, or numbers `[batch, ...]`, of all items.
        labels: Labels of all but the last.
        unlabelled: Number of items without a label.
        share: Fraction of the items with a label in all parts of the batch; that of this part when
            None.
        label_smoothing: Label smoothing.

    Raises:
        ValueError: Labels of another number of items.
    """
    labelled = len(student_logits) - unlabelled
    if labelled < 0 or labelled != len(labels):
        raise ValueError(
            f"labels must be of the {len(student_logits)} images less the {unlabelled} of "
            f"unlabelled, got {len(labels)}"
        )
    if not labelled:  # they are in other parts of the batch
        return student_logits.float().sum() * 0
    own = student_logits[:labelled]
    if task != "single_label":
        labels = as_outputs(labels, own)
    loss = hard_term(task, own, labels, label_smoothing=label_smoothing)
    return loss if share is None else loss * (labelled / (share * len(student_logits)))


def task_terms(
    task: Task,
    student_logits: Tensor,
    teacher_logits: Tensor | SparseLogits | SampledTargets,
    labels: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    average: Average,
    label_smoothing: float,
    weights: Sequence[float] | None,
    margin: float | None,
) -> DistillationTerms:
    """Return the terms of a task's loss.

    Args:
        task: Kind of label.
        student_logits: Logits `[batch, classes]`, or numbers `[batch, ...]`.
        teacher_logits: Those of the teacher, or `[members, batch, ...]` of an ensemble.
        labels: Labels of the task's loss; None with `alpha` 1, for a hard term without meaning.
        temperature: Temperature of the soft term.
        alpha: Weight of the soft term.
        average: Whether an ensemble's probabilities or logits are averaged.
        label_smoothing: Label smoothing of the hard term.
        weights: Weights of an ensemble's members.
        margin: Margin of a regression's bound.

    Raises:
        ValueError: Logits of the largest classes or samples with another task than `single_label`,
            or an average of the former; otherwise as the task's loss.
    """
    if isinstance(teacher_logits, SparseLogits | SampledTargets) and task != "single_label":
        kind = "samples" if isinstance(teacher_logits, SampledTargets) else "the largest of them"
        raise ValueError(f"targets must have all logits for {task}, got {kind}")
    if isinstance(teacher_logits, SampledTargets):  # rows are the tokens of one sequence
        return sequence_terms(
            student_logits[None],
            teacher_logits.map(lambda tensor: tensor[None]),
            _or_none_of_weight(labels, student_logits)[None],
            temperature=temperature,
            alpha=alpha,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    if isinstance(teacher_logits, SparseLogits):
        if average == "logits" and teacher_logits.values.ndim == 3:
            raise ValueError(
                "average must be 'probabilities' where targets are SparseLogits of several "
                "members, got 'logits'"
            )
        return sparse_terms(
            student_logits,
            teacher_logits,
            _or_none_of_weight(labels, student_logits),
            temperature=temperature,
            alpha=alpha,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    if task == "single_label":
        return distillation_terms(
            student_logits,
            teacher_logits,
            _or_none_of_weight(labels, student_logits),
            temperature=temperature,
            alpha=alpha,
            average=average,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    if task == "regression":
        return regression_terms(
            student_logits, teacher_logits, labels, alpha=alpha, margin=margin, weights=weights
        )
    return multi_label_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=alpha,
        average=average,
        label_smoothing=label_smoothing,
        weights=weights,
    )


def _or_none_of_weight(labels: Tensor | None, logits: Tensor) -> Tensor:
    """Return the labels, or the class 0 for all, which has no weight at alpha 1."""
    if labels is None:
        return logits.new_zeros(logits.shape[:1], dtype=torch.int64)
    return labels


def as_outputs(values: Any, outputs: Tensor) -> Any:
    """Return values of one number an item as the outputs are, `[batch]` or `[batch, 1]`.

    Args:
        values: Labels, or outputs of a teacher, also of an ensemble's members; anything but such a
            tensor is returned as it is.
        outputs: Outputs of the student.

    >>> as_outputs(torch.zeros(2, 5), torch.zeros(5, 1)).shape
    torch.Size([2, 5, 1])
    """
    if isinstance(values, Tensor) and outputs.ndim in (1, 2) and outputs.numel() == len(outputs):
        for members in (values.shape[:0], values.shape[:1]):
            one_each = (*members, len(outputs))
            if values.shape in (one_each, (*one_each, 1)):
                return values.reshape(*members, *outputs.shape)
    return values
