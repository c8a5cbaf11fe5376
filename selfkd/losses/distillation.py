"""Knowledge distillation for classifiers: cross-entropy and softened KL divergence, weighted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import (
    Average,
    Weights,
    average_logits,
    mean_softmax,
    member_weights,
)
from selfkd.losses.fused import fused_terms, smooth, weighted_sum

_AVERAGES = get_args(Average)
_NO_LABEL = 1 - 2**63
"""Label that torch leaves out without a word: one that no data has, unlike its default of -100 and
-2^63, which NaN becomes as an integer."""


class DistillationTerms(NamedTuple):
    """A loss and its parts, all scalars; the parts are unweighted and detached, for logging."""

    loss: Tensor
    """Weighted sum of the two terms, in nats, with the graph."""
    hard_loss: Tensor
    """Mean cross-entropy with the labels, in nats."""
    soft_loss: Tensor
    """Mean KL divergence from the teacher times the temperature squared, in nats."""


def distillation_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: Average = "probabilities",
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Distillation loss, with its two terms by name.

        hard_loss = CE(y, p_s)
        soft_loss = T^2 KL(p_t^T || p_s^T)                    p^T = softmax(z / T)
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    each a mean over the batch. T^2 keeps the gradient of the soft term from shrinking as T grows:

        d loss / d z_s = [(1 - alpha) (p_s - y) + alpha T (p_s^T - p_t^T)] / batch

    T -> inf matches centred logits; T -> 0 matches the teacher's argmax, with loss / T the
    student's largest logit less its logit for that class.

    Published weights hold here: the paper's cross-entropy with soft targets is KL plus a constant.
    `KLDivLoss()` with its default mean, over batch and classes, is `1 / classes` times this soft
    loss: a weight beta of it is `beta / classes` here.

    Args:
        student_logits: Logits `[batch, classes]`, floating point. Computed in float32 or wider, in
            autocast too.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble;
            half precision is enough. Never gets a gradient.
        labels: Class indices `[batch]`, int64, or probabilities y `[batch, classes]`, floating
            point, such as those of mixup. Never get a gradient. Their values are checked on the CPU
            only, so that a GPU is not waited for.
        temperature: Temperature T, above 0, dimensionless like the logits.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        average: Soft targets of an ensemble: `probabilities` for the mean of the members' softmax
            at T, `logits` for the softmax of their mean logits. No effect on a single teacher.
        label_smoothing: Share of the labels' mass in the hard term spread over all classes,
            in [0, 1].
        weights: Weights of the members in either mean, one each, at least 0, with sum 1; equal if
            not given. Never get a gradient. Preferably a sequence, since reading a tensor waits
            for the GPU.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph.

    Raises:
        ValueError: A setting out of range, shapes that do not match, a label out of range, or
            probabilities that are negative or not of sum 1.
        TypeError: Logits that are not floating point, or labels of another type.

    >>> student_logits = torch.tensor([[2.0, 0.0, -2.0]], requires_grad=True)
    >>> teacher_logits = torch.tensor([[1.0, 0.5, -1.0]])
    >>> terms = distillation_terms(
    ...     student_logits, teacher_logits, torch.tensor([0]), temperature=2.0, alpha=0.5
    ... )
    >>> [round(term.item(), 4) for term in terms]
    [0.2458, 0.1429, 0.3486]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    check_settings(temperature, alpha, average, label_smoothing)
    check_tensors(student_logits, teacher_logits, labels)
    if labels.ndim == 2 or not fused_is_faster(student_logits):
        check_labels(labels, student_logits.shape[1])
    try:
        terms = unchecked_terms(
            student_logits,
            teacher_logits,
            labels,
            temperature=temperature,
            alpha=alpha,
            average=average,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    except RuntimeError:  # raised by `gather`, which checks each label anyway
        check_labels(labels, student_logits.shape[1])
        raise
    if is_nan(terms.soft_loss):
        _check_no_nan(teacher_logits)
    return terms


def unchecked_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: Average = "probabilities",
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Compute `distillation_terms` without checks; NaN teacher logits give a NaN soft loss."""
    members, shares = _weighted_members(teacher_logits, weights)
    compute = fused_terms if fused_is_faster(student_logits) else plain_terms
    terms = compute(
        student_logits,
        detached(members),
        detached(labels),
        temperature=float(temperature),
        alpha=float(alpha),
        average=average,
        label_smoothing=float(label_smoothing),
        weights=shares,
    )
    return DistillationTerms(*terms)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: Average = "probabilities",
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Distillation loss as one scalar.

        (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    Published weights hold here; with `KLDivLoss()` as it is, the soft term is `1 / classes` times
    this (see `distillation_terms`).

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average, with sum 1.

    Returns:
        Scalar, mean over the batch, in nats.

    Raises:
        ValueError, TypeError: Same as `distillation_terms`, whose docstring has the details.

    >>> logits = torch.tensor([[2.0, 0.0, -2.0]])
    >>> distillation_loss(logits, logits, torch.tensor([0]), temperature=4.0, alpha=1.0)
    tensor(0.)

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    return distillation_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=alpha,
        average=average,
        weights=weights,
    ).loss


def soft_targets(
    teacher_logits: Tensor,
    *,
    temperature: float,
    average: Average = "probabilities",
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Soft targets of a teacher, or of an ensemble averaged into one, at a temperature.

        probabilities: sum_m w_m softmax(z_m / T)        logits: softmax(sum_m w_m z_m / T)

    Args:
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Temperature T, above 0.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights w of the members, at least 0, with sum 1; equal if not given.

    Returns:
        Probabilities `[batch, classes]` in float32, or float64 where `teacher_logits` are.

    Raises:
        ValueError: A setting out of range, or teacher logits of another shape.

    >>> soft_targets(torch.tensor([[5.0, 2.0, 1.0, 0.5, 0.1]]), temperature=2.0)
    tensor([[0.6451, 0.1439, 0.0873, 0.0680, 0.0557]])

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    check_settings(temperature, 0.0, average, 0.0)
    if teacher_logits.ndim not in (2, 3) or not teacher_logits.numel():
        raise ValueError(
            "teacher_logits must be [batch, classes] or [members, batch, classes], "
            f"got shape {tuple(teacher_logits.shape)}"
        )
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    teacher_logits, shares = _weighted_members(teacher_logits.detach(), weights)
    members = teacher_logits.to(dtype)
    if average == "logits":
        members = average_logits(members, shares, dtype)
    return mean_softmax(members / temperature, shares)


def hard_loss(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with the labels, in float32 or wider: the loss without a teacher.

    Published weights hold here: it is the usual mean over the batch.

    Args:
        student_logits: Logits `[batch, classes]`.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        label_smoothing: Share of the labels' mass spread over all classes, in [0, 1].

    Returns:
        Scalar, in nats.

    Raises:
        ValueError, TypeError: Same as `distillation_terms`.

    >>> hard_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    if not 0 <= label_smoothing <= 1:
        check_settings(1.0, 0.0, "probabilities", label_smoothing)
    check_tensors(student_logits, student_logits, labels)
    if labels.ndim == 2:
        check_labels(labels, student_logits.shape[1])
    try:
        return cross_entropy(as_single(student_logits), detached(labels), label_smoothing)
    except (IndexError, RuntimeError):  # torch checks each label of a class anyway
        check_labels(labels, student_logits.shape[1])
        raise


def cross_entropy(
    student_logits: Tensor, labels: Tensor, label_smoothing: float, reduction: str = "mean"
) -> Tensor:
    """Return the cross-entropy with labels of either kind, without checks.

    Args:
        student_logits: Logits `[batch, classes]`, float32 or wider.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        label_smoothing: Share of the labels' mass spread over all classes.
        reduction: Whether the `mean` over the rows is taken, or `none`.
    """
    if labels.ndim == 1:
        return F.cross_entropy(
            student_logits,
            labels,
            ignore_index=_NO_LABEL,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    y = smooth(labels.to(student_logits.dtype), label_smoothing)
    log_p = F.log_softmax(student_logits, dim=-1)
    losses = -torch.where(y == 0, 0.0, y * log_p).sum(dim=-1)  # a class without mass may be -inf
    return losses.mean() if reduction == "mean" else losses


def plain_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: Average,
    label_smoothing: float,
    weights: Weights = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `distillation_terms` in plain PyTorch, without checks."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(dtype)
    hard = cross_entropy(student_logits, labels, label_smoothing)
    log_p_s = F.log_softmax(student_logits / temperature, dim=-1)
    if average == "logits":
        teacher_logits = average_logits(teacher_logits, weights, dtype)
    log_p_t = _log_soft_targets(teacher_logits.to(dtype) / temperature, weights)
    p_t = log_p_t.exp()
    kl = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s))  # 0 log 0 = 0, but NaN stays
    soft = temperature**2 * kl.sum(dim=-1).mean()
    return weighted_sum(hard, soft, alpha), hard.detach(), soft.detach()


def _log_soft_targets(logits: Tensor, weights: Weights) -> Tensor:
    log_p = F.log_softmax(logits, dim=-1)
    if logits.ndim == 2:
        return log_p
    if weights is None:
        return torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    return torch.logsumexp(log_p + member_weights(logits, weights, logits.dtype).log(), dim=0)


def _weighted_members(
    teacher_logits: Tensor, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Weights]:
    """Drop members of weight 0; return the others' logits and weights.

    Of a single member the logits are `[batch, classes]`. Members of weight 0 are dropped because
    0 times a logit of -inf would be NaN.
    """
    shares = None
    if weights is not None:
        shares = check_weights(weights, teacher_logits)
        if 0 in shares:
            teacher_logits = teacher_logits[[i for i, share in enumerate(shares) if share]]
            shares = [share for share in shares if share]
    if teacher_logits.ndim == 3 and len(teacher_logits) == 1:
        return teacher_logits[0], None
    return teacher_logits, shares


def fused_is_faster(student_logits: Tensor) -> bool:
    """Whether `fused_terms` is faster than `plain_terms`: on the CPU, with a gradient.

    Against the expression of tutorials, fused is as fast at 10 classes, 0.85 times as fast at 100,
    1.3 to 2 times at 1,000 and 2.5 to 5 times at 32,000 (tests/benchmarks/loss.py). A GPU would
    idle over chunks of rows; a compiler fuses the plain expression itself.
    """
    return (
        student_logits.is_cpu
        and student_logits.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def check_settings(temperature: float, alpha: float, average: str, label_smoothing: float) -> None:
    """Raise ValueError for a setting out of range."""
    if not 0 < temperature < math.inf:  # catches NaN too
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if average not in _AVERAGES:
        raise ValueError(f"average must be 'probabilities' or 'logits', got {average!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_weights(weights: Sequence[float] | Tensor, members: Tensor) -> list[float]:
    """Return the weights of members `[members, batch, ...]`, rescaled so that their sum is 1.

    Raises:
        ValueError: Weights that are negative, not of sum 1, or not one for each member.
    """
    values = [float(w) for w in (weights.tolist() if isinstance(weights, Tensor) else weights)]
    if members.ndim != 3 or len(values) != len(members):
        raise ValueError(
            "weights must be one for each of the members of [members, batch, classes], got "
            f"{len(values)} for {list(members.shape)}"
        )
    if not all(value >= 0 for value in values) or not abs(sum(values) - 1) <= 1e-6:
        raise ValueError(f"weights must be >= 0 and of sum 1, got {values}")
    return [value / sum(values) for value in values]


def as_single(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or wider if it is."""
    dtype = tensor.dtype
    return (
        tensor if dtype == torch.float32 else tensor.to(torch.promote_types(dtype, torch.float32))
    )


def check_tensors(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError or TypeError for shapes that do not match, or types that are not right."""
    if _is_usual(student_logits, teacher_logits, labels):
        return
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    check_tensor("labels", labels)
    shape, teacher = student_logits.shape, teacher_logits.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"student_logits must be [batch, classes], got shape {tuple(shape)}")
    check_classes(shape)
    if teacher != shape and (teacher[-2:] != shape or len(teacher) > 3 or not teacher[0]):
        raise ValueError(
            f"teacher_logits must be {list(shape)} as student_logits are, or that for each of the "
            f"members, got {list(teacher)}"
        )
    check_label_form(labels, student_logits)
    if not (student_logits.dtype.is_floating_point and teacher_logits.dtype.is_floating_point):
        raise TypeError(
            "logits must be floating point, got "
            f"{student_logits.dtype} of the student, {teacher_logits.dtype} of the teacher"
        )


def _is_usual(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> bool:
    """Whether a batch is right at first sight: in a small step, the further checks take long."""
    return (
        isinstance(student_logits, Tensor)
        and isinstance(teacher_logits, Tensor)
        and isinstance(labels, Tensor)
        and len(shape := student_logits.shape) == 2
        and shape[0] > 0
        and shape[1] > 1
        and teacher_logits.shape == shape
        and labels.shape == shape[:1]
        and labels.dtype is torch.int64
        and student_logits.dtype is torch.float32
        and teacher_logits.dtype is torch.float32
    )


def check_label_form(labels: Tensor, logits: Tensor) -> None:
    """Check shape and type of class indices `[batch]` or probabilities `[batch, classes]`.

    Raises:
        ValueError: Labels of another shape.
        TypeError: Class indices that are not int64, or probabilities that are not floating point.
    """
    shape, expected, dtype = labels.shape, logits.shape, labels.dtype
    if shape != expected[:1] and shape != expected:
        raise ValueError(
            f"labels must be [{expected[0]}], one a row, or probabilities {list(expected)}, got "
            f"{list(shape)}"
        )
    if len(shape) == 2 and not dtype.is_floating_point:
        raise TypeError(
            f"labels {list(shape)} must be floating-point probabilities, got {labels.dtype}"
        )
    if len(shape) == 1 and dtype != torch.int64:
        raise TypeError(f"labels must be class indices of torch.int64, got {labels.dtype}")


def check_classes(shape: Sequence[int]) -> None:
    """Raise ValueError for logits of one class, of which each loss of probabilities is 0."""
    if shape[-1] == 1:
        raise ValueError(
            f"student_logits must be of at least 2 classes, got shape {tuple(shape)}: the softmax "
            "of one class is 1 whatever its logit; for yes or no give two logits, or train by "
            "binary cross-entropy (BCE, as for multi-label data)"
        )


def _on_cpu(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a GPU or breaking a compiled graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def is_nan(value: Tensor) -> bool:
    """Whether a scalar is NaN; false where reading it would wait for a GPU."""
    return _on_cpu(value) and math.isnan(value.item())


def detached(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph; a copy if it was made in inference mode.

    Autograd refuses to save a tensor of inference mode for the backward pass.
    """
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor.detach() if tensor.requires_grad else tensor


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError for a value that is no tensor, such as a list or an array."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor that is not floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label out of range, where reading it would not wait for a GPU."""
    if not _on_cpu(labels):
        return
    if labels.ndim == 2:
        _check_probabilities(labels.detach())
    else:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= classes:
            hint = ""
            if low == -100:  # the label of ignored tokens in PyTorch and transformers
                hint = ": leave such rows out, or give sequences to sequence_terms (ignore_index)"
            wrong = low if low < 0 else high
            raise ValueError(f"labels must be in [0, {classes}), got {wrong}{hint}")


def _check_probabilities(labels: Tensor) -> None:
    sums = labels.sum(dim=-1, dtype=torch.float64)
    # rows of 21,000 classes in half precision are off by as much
    tolerance = 1e-3 if labels.element_size() >= 4 else 1e-2
    off = (sums - 1).abs()
    if not off.max().item() <= tolerance:  # catches NaN too
        row = int(off.nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"labels must be probabilities of sum 1, got a sum of {sums[row].item():.4g} in row "
            f"{row}"
        )
    if labels.min().item() < 0:
        row = int(labels.amin(dim=-1).argmin())
        raise ValueError(
            f"labels must be probabilities >= 0, got {labels[row].min().item():.4g} in row {row}"
        )


def _check_no_nan(teacher_logits: Tensor) -> None:
    if not torch.isnan(teacher_logits.detach().sum()):  # quick; infinities may give NaN as well
        return
    rows = teacher_logits.isnan().any(dim=-1).nonzero()
    if len(rows):
        *member, row = rows[0].tolist()
        suffix = f" of member {member[0]}" if member else ""
        raise ValueError(
            f"teacher_logits must be numbers for soft_loss, got nan in row {row}{suffix}"
        )
