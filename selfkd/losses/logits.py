"""Further losses between logits, and transforms of teacher logits that any loss accepts.

All are means over the batch, computed in float32 or wider. The teacher never gets a gradient. Of
teacher logits `[members, batch, classes]` the mean over the members is taken; to distil from the
mean of the members' probabilities instead, give `T soft_targets(...).log()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import (
    check_classes,
    check_floating,
    check_label_form,
    check_labels,
    check_settings,
    check_tensor,
    cross_entropy,
    detached,
)

_LEAST_RANGE = 1e-12
"""Range below which a row of logits is constant, whatever its magnitude."""


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """Cross-entropy with the teacher's soft targets at a temperature.

        -sum_k p_t^T log p_s^T                                p^T = softmax(z / T)

    Equal to the KL divergence plus the teacher's entropy, without the factor T^2. The paper's soft
    term is `T ** 2` times this: its weight beta is `beta * T ** 2` here. TinyBERT's code, with a
    mean over batch and classes, is `1 / classes` times this.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Temperature T, above 0.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: T out of range, shapes that do not match, or teacher logits that are not finite
            (values are checked on the CPU only, so that a GPU is not waited for).
        TypeError: Logits that are not floating point.

    >>> soft_cross_entropy(torch.zeros(1, 4), torch.zeros(1, 4), temperature=2.0)
    tensor(1.3863)

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return F.cross_entropy(student, F.softmax(teacher, dim=-1))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Reverse, mode-seeking KL divergence: of the student from the teacher.

        T^2 KL(p_s^T || p_t^T)                                p^T = softmax(z / T)

    The paper's divergence of a text, a sum over its tokens without T^2, is `tokens / T ** 2` times
    this mean over tokens: a weight beta of it is `beta * tokens / T ** 2` here.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Temperature T, above 0.

    Returns:
        Scalar, in nats; finite even if a probability of the teacher underflows to 0.

    Raises:
        ValueError, TypeError: Same as `soft_cross_entropy`.

    >>> teacher_logits = torch.tensor([[0.0, 2000.0]])
    >>> reverse_kl(torch.tensor([[2000.0, 0.0]]), teacher_logits, temperature=1.0)
    tensor(2000.)

    Reference:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2024,
        https://arxiv.org/abs/2306.08543
    """
    log_p_s, log_p_t = _log_softmax(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_p_s, log_p_t)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, beta: float = 0.5
) -> Tensor:
    """Generalised Jensen-Shannon divergence between teacher and student.

        T^2 [beta KL(p_t^T || m) + (1 - beta) KL(p_s^T || m)]
        m = beta p_t^T + (1 - beta) p_s^T                     p^T = softmax(z / T)

    Divided by beta it tends to KL(p_t || p_s) as beta -> 0, and divided by 1 - beta to
    KL(p_s || p_t) as beta -> 1. The paper and TRL have the same beta and no T^2, which is
    `1 / T ** 2` times this: at T = 1 a published weight is the same here.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Temperature T, above 0.
        beta: Weight of the teacher in the mixture m, in (0, 1).

    Returns:
        Scalar, in nats, at most T^2 log 2.

    Raises:
        ValueError: A beta out of range; otherwise as `soft_cross_entropy`.
        TypeError: Same as `soft_cross_entropy`.

    >>> apart = torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]])
    >>> jensen_shannon(*apart, temperature=1.0)
    tensor(0.6931)

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", 2024, https://arxiv.org/abs/2306.13649
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}")
    log_p_s, log_p_t = _log_softmax(student_logits, teacher_logits, temperature)
    log_m = torch.logaddexp(log_p_t + math.log(beta), log_p_s + math.log(1 - beta))
    return temperature**2 * (beta * _kl(log_p_t, log_m) + (1 - beta) * _kl(log_p_s, log_m))


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, centre: bool = False) -> Tensor:
    """Mean squared difference of the logits, over batch and classes.

        mean_k (z_s - z_t)^2

    With centred logits it is twice the limit of T^2 KL(p_t^T || p_s^T) for T -> inf. The half sum
    over classes of Ba and Caruana is `classes / 2` times this: its weight beta is
    `beta * classes / 2` here. Of `MSELoss()`, as in the code of Kim et al., published weights hold
    here.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        centre: Whether to subtract the mean of each row first, which a softmax ignores.

    Returns:
        Scalar.

    Raises:
        ValueError, TypeError: Same as `soft_cross_entropy`.

    >>> student_logits, teacher_logits = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    >>> logit_mse(student_logits, teacher_logits)
    tensor(5.)
    >>> logit_mse(student_logits, teacher_logits, centre=True)
    tensor(1.)

    Reference:
        Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014,
        https://arxiv.org/abs/1312.6184
        Buciluă, Caruana, Niculescu-Mizil, "Model Compression", 2006,
        https://doi.org/10.1145/1150402.1150464
    """
    student, teacher = _pair(student_logits, teacher_logits, finite=False, one_class=not centre)
    if centre:
        student = student - student.mean(dim=-1, keepdim=True)
        teacher = teacher - teacher.mean(dim=-1, keepdim=True)
    loss = F.mse_loss(student, teacher)
    if not _is_finite(loss):  # any teacher logit that is not finite makes the loss so
        check_finite("teacher_logits", teacher_logits)
    return loss


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
) -> Tensor:
    """Decoupled distillation (DKD): the label against the rest, and the distribution of the rest.

        T^2 [target_weight KL(b_t || b_s) + nontarget_weight KL(q_t || q_s)]
        b = (p^T_y, 1 - p^T_y)      q = softmax of z / T over the classes other than y

    Weights of 1 and, row by row, 1 - p_t^T_y give the softened KL divergence. Published weights
    hold here, beside 1 times the cross-entropy with the labels.

    Args:
        student_logits: Logits `[batch, classes]` of at least two classes; for two classes the
            second term is 0.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        labels: Class indices y `[batch]`, int64.
        temperature: Temperature T, above 0.
        target_weight: Weight alpha of the paper, at least 0.
        nontarget_weight: Weight beta of the paper, at least 0; the paper uses 8 for most pairs of
            networks on CIFAR-100.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: A weight or label out of range, or fewer than two classes; otherwise as
            `soft_cross_entropy`.
        TypeError: Labels that are not int64; otherwise as `soft_cross_entropy`.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> dkd_loss(logits, -logits, torch.tensor([0]), temperature=4.0)
    tensor(4.9280)

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", 2022, https://arxiv.org/abs/2203.08679
    """
    _check_weight("target_weight", target_weight)
    _check_weight("nontarget_weight", nontarget_weight)
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    _check_labels(labels, student)
    (student_b, student_q), (teacher_b, teacher_q) = (
        _decouple(logits, labels[:, None]) for logits in (student, teacher)
    )
    target, nontarget = _kl(teacher_b, student_b), _kl(teacher_q, student_q)
    return temperature**2 * (target_weight * target + nontarget_weight * nontarget)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST: one minus the correlation of the rows, and of the columns, of the probabilities.

        inter_weight mean_i [1 - r(s_i:, t_i:)] + intra_weight mean_k [1 - r(s_:k, t_:k)]
        s, t = softmax(z_s / T), softmax(z_t / T)

    with Pearson's r. The gradient does not shrink as T grows, so there is no factor T^2. The
    authors' code has it and is `T ** 2` times this: its weight beta is `beta * T ** 2` here. A row
    or column that is constant, or whose variance underflows, has r = 0 and no gradient. The second
    term depends on how a batch is split.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Temperature T, above 0.
        inter_weight: Weight of the relation between classes (rows), at least 0.
        intra_weight: Weight of the relation within a class (columns), at least 0.

    Returns:
        Scalar, dimensionless.

    Raises:
        ValueError: A weight out of range; otherwise as `soft_cross_entropy`.
        TypeError: Same as `soft_cross_entropy`.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    >>> dist_loss(logits, -logits)
    tensor(3.8671)

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
        https://arxiv.org/abs/2205.10536
    """
    _check_weight("inter_weight", inter_weight)
    _check_weight("intra_weight", intra_weight)
    p_s, p_t = (
        F.softmax(logits, dim=-1) for logits in _pair(student_logits, teacher_logits, temperature)
    )
    inter, intra = (1 - _correlation(p_s, p_t, dim) for dim in (1, 0))
    return inter_weight * inter + intra_weight * intra


def standardize_logits(logits: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Z-score of the logits, row by row.

        (z - mean_k z) / sqrt(mean_k (z - mean_k z)^2)

    Applied to student and teacher before a loss at a base temperature, so that the student need not
    match the magnitude of the teacher's logits. The authors' code divides by classes - 1 instead of
    classes under the root, which is a temperature of sqrt(classes / (classes - 1)).

    Args:
        logits: Logits `[..., classes]`.
        eps: Largest range of a row, relative to its largest magnitude, at which the row counts as
            constant and becomes zeros without a gradient; at least 0. It does so below 1e-12, too.

    Returns:
        Standardised logits `[..., classes]` in float32 or wider, with the graph.

    Raises:
        ValueError: An eps out of range.
        TypeError: Logits that are not floating point.

    >>> standardize_logits(torch.tensor([[3.0, 1.0], [300.0, 100.0], [5.0, 5.0]]))
    tensor([[ 1., -1.],
            [ 1., -1.],
            [ 0.,  0.]])

    Reference:
        Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
        https://arxiv.org/abs/2403.01427
    """
    _check_weight("eps", eps)
    check_floating("logits", logits)
    rows = _widened(logits)
    high, low = rows.detach().amax(-1, keepdim=True), rows.detach().amin(-1, keepdim=True)
    least = (eps * torch.maximum(high.abs(), low.abs())).clamp_min(_LEAST_RANGE)
    varies = high - low > least
    # a tiny eps, so that constant rows are finite; they and their gradients are multiplied by 0
    return F.layer_norm(rows, rows.shape[-1:], eps=1e-30) * varies


def standardized_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """KL divergence of standardised logits.

        T^2 KL(p_t^T || p_s^T)              p^T = softmax(standardize_logits(z) / T)

    The authors' code (see `standardize_logits`) at T is `(classes - 1) / classes` times this at
    T sqrt(classes / (classes - 1)): of 100 classes a weight of 9 at T = 2 is 8.91 at T = 2.01 here.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        temperature: Base temperature T, above 0.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError, TypeError: Same as `soft_cross_entropy`.

    >>> student_logits = torch.tensor([[3.0, 1.0, 2.0]])
    >>> loss = standardized_loss(student_logits, 10 * student_logits - 4, temperature=2.0)
    >>> round(loss.item(), 4)
    0.0

    Reference:
        Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
        https://arxiv.org/abs/2403.01427
    """
    check_settings(temperature, 0.0, "probabilities", 0.0)
    log_p_s, log_p_t = (
        F.log_softmax(standardize_logits(logits) / temperature, dim=-1)
        for logits in _pair(student_logits, teacher_logits)
    )
    return temperature**2 * _kl(log_p_t, log_p_s)


def hard_teacher_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's predicted class.

        -log p_s(argmax_k z_t)

    Published weights hold here: DeiT's halves of this and of the labels' cross-entropy.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError, TypeError: Same as `soft_cross_entropy`.

    >>> hard_teacher_loss(torch.zeros(1, 4), torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    tensor(1.3863)

    Reference:
        Touvron et al., "Training data-efficient image transformers & distillation through
        attention", 2021, https://arxiv.org/abs/2012.12877
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def confidence_weights(
    teacher_logits: Tensor, *, mean: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    """Confidence of the teacher in each row, relative to the batch.

        w_i = max_k p_t_ik / mean_j max_k p_t_jk

    Args:
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        mean: Function for the mean over j; if processes share a batch, the mean over all of it.

    Returns:
        Weights `[batch]` of mean 1, float32 or wider, without a graph.

    Raises:
        ValueError: Teacher logits of another shape or not finite.
        TypeError: Teacher logits that are not floating point.

    >>> confidence_weights(torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log())
    tensor([1.2000, 0.8000])

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """
    confidence = F.softmax(_teacher(teacher_logits), dim=-1).amax(dim=-1)
    return confidence / mean(confidence)


def confidence_weighted_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """Cross-entropy with the labels, weighted by the teacher's confidence (CWTM).

        mean_i w_i CE(y_i, p_s_i)                             w = confidence_weights(z_t)

    Published weights hold here: the paper's sum over the batch, with weights of sum 1, is this mean
    with weights of mean 1.

    Args:
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        labels: Class indices y `[batch]`, int64, or probabilities `[batch, classes]`.
        label_smoothing: Share of the labels' mass spread over all classes, in [0, 1].
        mean: Function for the mean of the teacher's confidence, as for `confidence_weights`.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: A label or the smoothing out of range; otherwise as `soft_cross_entropy`.
        TypeError: Labels of another type; otherwise as `soft_cross_entropy`.

    >>> student_logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    >>> teacher_logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    >>> confidence_weighted_loss(student_logits, teacher_logits, torch.tensor([0, 1]))
    tensor(0.4159)

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """
    student, teacher = _pair(student_logits, teacher_logits)
    check_label_form(labels, student)
    check_labels(labels, student.shape[1])
    check_settings(1.0, 0.0, "probabilities", label_smoothing)
    losses = cross_entropy(student, labels.detach(), label_smoothing, reduction="none")
    return (confidence_weights(teacher, mean=mean) * losses).mean()


def permute_nontarget(teacher_logits: Tensor, *, generator: torch.Generator) -> Tensor:
    """Teacher logits with all but the largest of each row permuted (DKPP), for any loss.

    The predicted class and the confidence are kept; the similarities between classes are lost.

    Args:
        teacher_logits: Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        generator: Random generator of the permutations, on the device of the teacher logits.

    Returns:
        Logits `[batch, classes]` in float32 or wider, without a graph.

    Raises:
        ValueError, TypeError: Same as `confidence_weights`.

    >>> permuted = permute_nontarget(
    ...     torch.tensor([[1.0, 9.0, 2.0, 3.0]]), generator=torch.Generator().manual_seed(0)
    ... )
    >>> permuted[0, 1].item(), sorted(permuted[0].tolist())
    (9.0, [1.0, 2.0, 3.0, 9.0])

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """
    teacher = _teacher(teacher_logits)
    largest, chosen = teacher.max(dim=-1, keepdim=True)
    keys = torch.rand(teacher.shape, generator=generator, device=teacher.device)
    permuted = teacher.gather(1, keys.argsort(dim=-1))
    # swap the largest logit back to its class
    displaced = permuted.gather(1, chosen)
    permuted.scatter_(1, permuted.argmax(dim=-1, keepdim=True), displaced)
    return permuted.scatter_(1, chosen, largest)


def teacher_free_logits(labels: Tensor, *, classes: int, confidence: float) -> Tensor:
    """Log-probabilities of a virtual teacher that always predicts the label, as logits of any loss.

        p_k = confidence if k = y else (1 - confidence) / (classes - 1)

    At temperature T a loss uses p^(1/T), normalised; the authors' code uses softmax(p / T). With
    `confidence=1 / classes` the teacher is uniform, and distilling from it at T = 1 is label
    smoothing of `alpha`, up to a constant.

    Args:
        labels: Class indices y `[batch]`, int64.
        classes: Number of classes, at least 2.
        confidence: Probability of the label, in (0, 1).

    Returns:
        Log-probabilities `[batch, classes]`, float32.

    Raises:
        ValueError: A setting or a label out of range, or labels of another shape.
        TypeError: Labels that are not int64.

    >>> teacher_free_logits(torch.tensor([1]), classes=3, confidence=0.9).exp()
    tensor([[0.0500, 0.9000, 0.0500]])

    Reference:
        Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020,
        https://arxiv.org/abs/1909.11723
    """
    if classes < 2:
        raise ValueError(f"classes must be >= 2, got {classes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    others = math.log1p(-confidence) - math.log(classes - 1)
    logits = torch.full((len(labels), classes), others, device=labels.device)
    _check_labels(labels, logits)
    return logits.scatter_(1, labels[:, None], math.log(confidence))


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError for NaN or infinity, naming the row; only on the CPU, not to wait for a GPU.

    The sum is one quick pass; an infinite sum of finite values raises nothing.
    """
    if _is_finite(values.detach().sum()):
        return
    rows = (~values.isfinite().all(dim=-1)).nonzero().tolist()
    if rows:
        *member, row = rows[0]
        value = next(value for value in values[tuple(rows[0])].tolist() if not math.isfinite(value))
        position = f"row {row} of member {member[0]}" if member else f"row {row}"
        raise ValueError(f"{name} must be finite, got {value} in {position}")


def _is_finite(value: Tensor) -> bool:
    """Whether a scalar is finite; true where reading it would wait for a GPU or break a graph."""
    return not value.is_cpu or torch.compiler.is_compiling() or math.isfinite(value.item())


def _pair(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    finite: bool = True,
    one_class: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return checked logits `[batch, classes]` in float32 or wider, divided by the temperature.

    Members are averaged and the teacher is detached.
    """
    if temperature != 1:
        check_settings(temperature, 0.0, "probabilities", 0.0)
    check_floating("student_logits", student_logits)
    shape = student_logits.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"student_logits must be [batch, classes], got shape {tuple(shape)}")
    if not one_class:
        check_classes(shape)
    if teacher_logits.shape[-2:] != shape:
        raise ValueError(
            f"teacher_logits must be {list(shape)} as student_logits are, or that for each of the "
            f"members, got {list(teacher_logits.shape)}"
        )
    student, teacher = _widened(student_logits), _teacher(teacher_logits, finite=finite)
    if teacher.dtype != student.dtype:
        teacher = teacher.to(student.dtype)
    return (
        (student, teacher) if temperature == 1 else (student / temperature, teacher / temperature)
    )


def _teacher(teacher_logits: Tensor, *, finite: bool = True) -> Tensor:
    """Return checked teacher logits `[batch, classes]` in float32 or wider, detached."""
    check_floating("teacher_logits", teacher_logits)
    if teacher_logits.ndim not in (2, 3) or not teacher_logits.numel():
        raise ValueError(
            "teacher_logits must be [batch, classes] or [members, batch, classes], "
            f"got shape {tuple(teacher_logits.shape)}"
        )
    if finite:
        check_finite("teacher_logits", teacher_logits)
    teacher = _widened(detached(teacher_logits))
    return teacher if teacher.ndim == 2 else teacher.mean(dim=0)


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider, without a call if it already is."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_softmax(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    student, teacher = _pair(student_logits, teacher_logits, temperature)
    return F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over rows of KL(p || q), of finite logs: a probability that underflows adds 0."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def _decouple(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of label and rest `[batch, 2]`, and of the classes within the rest.

    The latter are `[batch, classes]`, with 0 at the label, so that `_kl` adds 1 (0 - 0) there.
    """
    others = logits.scatter(1, index, -math.inf)
    rest = others.logsumexp(dim=-1, keepdim=True)
    label_or_rest = F.log_softmax(torch.cat([logits.gather(1, index), rest], dim=-1), dim=-1)
    return label_or_rest, (others - rest).scatter(1, index, 0.0)


def _correlation(p_s: Tensor, p_t: Tensor, dim: int) -> Tensor:
    """Mean of Pearson's r along `dim`; r is 0 if one side is constant up to rounding."""
    (student, student_norm), (teacher, teacher_norm) = (_centre(p, dim) for p in (p_s, p_t))
    unit = teacher / teacher_norm
    return ((student * unit).sum(dim, keepdim=True) / student_norm).mean()


def _centre(p: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return centred probabilities and their norm, which is infinite if they are constant."""
    mean = p.mean(dim, keepdim=True)
    centred = p - mean
    norm = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    rounding = 10 * torch.finfo(p.dtype).eps * math.sqrt(p.shape[dim])
    return centred, norm.masked_fill(norm <= rounding * mean.detach(), math.inf)


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {weight}")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    batch, classes = logits.shape
    check_tensor("labels", labels)
    if labels.shape != (batch,):
        raise ValueError(f"labels must be [{batch}], one a row, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be class indices of torch.int64, got {labels.dtype}")
    if batch:
        check_labels(labels, classes)
