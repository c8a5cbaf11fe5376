"""Distillation from the k largest logits of a teacher (sparse soft targets)."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import (
    DistillationTerms,
    check_labels,
    check_settings,
    check_tensors,
    check_weights,
    fused_is_faster,
    is_nan,
)
from selfkd.losses.fused_sparse import fused_sparse_terms, plain_sparse_terms
from selfkd.losses.moving import send

REST_TEMPERATURES = (1.5, 2.0, 3.0, 5.0, 8.0, 20.0)
"""Temperatures beside 1 at which `SparseLogits` keeps the mass of the rest."""


class SparseLogits(NamedTuple):
    """The k largest logits of each row, and the log-sum-exp of the others.

    A leading dimension for the members of an ensemble is allowed.
    """

    values: Tensor
    """The largest logits `[..., batch, k]`, floating point."""
    indices: Tensor
    """Classes of the values `[..., batch, k]`, int64, each once in a row."""
    rest: Tensor
    """Log-sum-exp of the other logits `[..., batch]`; -inf if there are none or all are -inf."""
    rest_grid: Tensor | None = None
    """Log-sum-exp of the other logits over T, `[..., batch, 6]`, at T = 1.5, 2, 3, 5, 8 and 20;
    None if it is known at T = 1 only."""

    def to(self, device: torch.device | str | int) -> SparseLogits:
        """Return a copy on `device`."""
        return self.map(lambda tensor: send(tensor, device))

    def map(self, change: Callable[[Tensor], Tensor]) -> SparseLogits:
        """Return the sparse logits with `change` applied to each of their tensors."""
        values, indices, rest, grid = self
        return SparseLogits(
            change(values), change(indices), change(rest), None if grid is None else change(grid)
        )


def sparsify(logits: Tensor, k: int) -> SparseLogits:
    """Keep the k largest logits of each row, and the log-sum-exp of the others at 7 temperatures.

    Args:
        logits: Logits `[..., classes]`.
        k: Number of logits to keep, from 1 to the number of classes.

    Returns:
        The sparse logits, in float32, or float64 if `logits` are; without a graph.

    Raises:
        ValueError: A k out of range.

    >>> sparse = sparsify(torch.tensor([[3.0, 0.0, 1.0, 0.0]]), 2)
    >>> sparse.values, sparse.indices, sparse.rest
    (tensor([[3., 1.]]), tensor([[0, 2]]), tensor([0.6931]))
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be in [1, {classes}], the number of classes, got {k}")
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    values, indices = logits.topk(k)
    return SparseLogits(values, indices, *rest_mass(logits, indices))


def rest_mass(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rest` and `rest_grid` of logits `[..., classes]` without those of `indices`."""
    others = logits.scatter(-1, indices, -torch.inf)
    grid = [(others / temperature).logsumexp(-1) for temperature in REST_TEMPERATURES]
    return others.logsumexp(-1), torch.stack(grid, dim=-1)


def sparse_terms(
    student_logits: Tensor,
    teacher: SparseLogits,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Distillation loss of a teacher's k largest logits, with its two terms by name.

        hard_loss = CE(y, p_s)
        soft_loss = T^2 KL(q_t^T || q_s^T)              over the k classes and a bucket of the rest
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    each a mean over the batch. The student's bucket is exact: the log-sum-exp of its other logits
    over T. So is the teacher's at T = 1, 1.5, 2, 3, 5, 8 and 20, from `rest_grid`. In between it is
    interpolated in 1 / T: the probability of the bucket is off by at most 0.001, and the loss of a
    student equal to the teacher is below 0.001 instead of 0 (docs/targets.md). Above 20 the error
    vanishes as T -> inf; below 1 the bucket is extrapolated, and a warning says so.

    Without `rest_grid` the rest is taken as spread evenly over the K - k other classes,

        (1 - 1 / T) log(K - k) + rest / T

    which is exact at T = 1, too large above it, as a warning says, and tends to the right mass as
    T -> inf.

    The bucket hides the teacher's ranking of the other classes: the loss is at most the full loss,
    and if many classes share the rest it becomes much smaller as T grows. With 20 of 1,000 classes
    known, the gradient has a cosine of 0.99 with the full gradient at T = 1, and 0.5 at T = 4.

    For an ensemble, the mean of the members' KL is taken. If all classes are known (k = K), its
    gradient is that of the KL from the members' mean distribution, and its value is larger by a
    constant: the mean KL of the members from their mean.

    Published weights hold here, of the KL over all classes, which this is where k = K.

    Args:
        student_logits: Logits `[batch, classes]`, floating point. Computed in float32 or wider, in
            autocast too.
        teacher: Sparse logits `[batch, k]`, or `[members, batch, k]` of an ensemble. Never gets a
            gradient. The range of its indices, like that of the labels, is checked on the CPU only.
        labels: Class indices `[batch]`, int64, or probabilities `[batch, classes]`.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        weights: Weights of the members, one each, at least 0, with sum 1; equal if not given.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph.

    Raises:
        ValueError: A setting out of range, shapes that do not match, or a class out of range.
        TypeError: Logits that are not floating point, or classes that are not int64.

    >>> logits = torch.tensor([[2.0, 0.0, -2.0, 0.0]], requires_grad=True)
    >>> teacher = sparsify(torch.tensor([[1.0, 0.5, -1.0, 0.5]]), 2)
    >>> terms = sparse_terms(logits, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]
    [0.278, 0.2539, 0.3022]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    check_settings(temperature, alpha, "probabilities", label_smoothing)
    check_tensors(student_logits, student_logits, labels)
    _check_form(teacher, student_logits)
    classes = student_logits.shape[1]
    if labels.ndim == 2 or not fused_is_faster(student_logits):
        check_labels(labels, classes)
        _check_range(teacher.indices, classes)
    try:
        terms = unchecked_sparse_terms(
            student_logits,
            teacher,
            labels,
            temperature=temperature,
            alpha=alpha,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    except RuntimeError:  # raised by `gather`, which checks each class anyway
        check_labels(labels, classes)
        _check_range(teacher.indices, classes)
        raise
    if is_nan(terms.soft_loss):
        _check_no_nan(teacher)
    return terms


def unchecked_sparse_terms(
    student_logits: Tensor,
    teacher: SparseLogits,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | Tensor | None = None,
) -> DistillationTerms:
    """Compute `sparse_terms` without checks; NaN of the teacher gives a NaN soft loss."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    with torch.no_grad():
        log_q_t = bucket_log_probabilities(teacher, temperature, student_logits.shape[-1], dtype)
    indices, shares = teacher.indices, [1.0]
    if indices.ndim == 2:
        log_q_t, indices = log_q_t[None], indices[None]
    else:
        shares = [1 / len(indices)] * len(indices)
    if weights is not None:
        shares = check_weights(weights, teacher.values)
        kept = [i for i, share in enumerate(shares) if share]  # 0 times NaN would be NaN
        if len(kept) < len(shares):
            log_q_t, indices, shares = log_q_t[kept], indices[kept], [shares[i] for i in kept]
    compute = fused_sparse_terms if fused_is_faster(student_logits) else plain_sparse_terms
    settings = float(temperature), float(alpha), float(label_smoothing), shares
    return DistillationTerms(*compute(student_logits, log_q_t, indices, labels.detach(), *settings))


def bucket_log_probabilities(
    teacher: SparseLogits, temperature: float, classes: int, dtype: torch.dtype
) -> Tensor:
    """Return log-probabilities at T of the known classes and, last, of the others, if any."""
    z_t = teacher.values.to(dtype) / temperature
    others = classes - z_t.shape[-1]
    if others:
        bucket = _rest_at(teacher.rest.to(dtype), teacher.rest_grid, temperature, others)
        z_t = torch.cat([z_t, bucket.unsqueeze(-1)], dim=-1)
    return F.log_softmax(z_t, dim=-1)


def _rest_at(rest: Tensor, grid: Tensor | None, temperature: float, others: int) -> Tensor:
    """Return the log-sum-exp of the other logits over T."""
    if temperature == 1:
        return rest
    if grid is None:
        _warn(
            "sparse logits without rest_grid are exact at T = 1 only: at other temperatures the "
            "mass of the other classes is taken as spread evenly, which is too much above 1; "
            "sparsify the teacher's logits again, or cache them again"
        )
        return (1 - 1 / temperature) * math.log(others) + rest / temperature
    if temperature < 1:
        _warn("the mass of the other classes of sparse logits is extrapolated below T = 1")
    compiling = torch.compiler.is_compiling()  # which warns of caches
    weights = _interpolation(temperature) if compiling else _cached_interpolation(temperature)
    first, *middle, last = weights
    inner = torch.tensor(middle, dtype=rest.dtype).to(rest.device, non_blocking=True)
    at_t = (grid * inner).sum(-1).add_(rest, alpha=first)
    if last:
        at_t = at_t + last * math.log(others)
    return torch.where(rest == -torch.inf, rest, at_t)


_NODES = (1.0, *(1 / temperature for temperature in REST_TEMPERATURES))  # of b = 1 / T
_SHIFT = 0.4
_KNOTS = [math.log(b + _SHIFT) for b in _NODES[2:-2]]


def _spline(b: float) -> list[float]:
    """Return the basis functions of a cubic spline in log(b + 0.4), `not-a-knot`."""
    x = math.log(b + _SHIFT)
    return [1.0, x, x * x, x**3, *(max(x - knot, 0.0) ** 3 for knot in _KNOTS)]


def _spline_slope(b: float) -> list[float]:
    """Return the derivatives of the basis functions with respect to b."""
    x = math.log(b + _SHIFT)
    slopes = [0.0, 1.0, 2 * x, 3 * x * x, *(3 * max(x - knot, 0.0) ** 2 for knot in _KNOTS)]
    return [slope / (b + _SHIFT) for slope in slopes]


_COEFFICIENTS: list[list[float]] = torch.linalg.inv(
    torch.tensor([_spline(b) for b in _NODES], dtype=torch.float64, device="cpu")
).tolist()


def _interpolation(temperature: float) -> list[float]:
    """Return the weights by which the log-sum-exp at T follows from those that are known.

    These are, in this order, the ones at T = 1, at `REST_TEMPERATURES`, and at T = inf, the
    logarithm of the number of classes. As a function of b = 1 / T the log-sum-exp is convex, and
    nearly linear for large b. A line is reproduced exactly; what is above it is a spline in
    log(b + 0.4), which makes the nodes nearly equidistant: of cubic splines, its error on
    classifiers and Zipf's laws is the least (tests/benchmarks/rest.py). Below the least b it is the
    parabola through log(K - k) that continues the spline, and above 1 its tangent.
    """
    b, least = 1 / temperature, _NODES[-1]
    if b > 1:
        slope = _on_nodes(_spline_slope(1.0), 1.0)
        return [1 + (b - 1) * slope[0], *((b - 1) * weight for weight in slope[1:]), 0.0]
    if b >= least:
        return [*_on_nodes(_spline(b), b), 0.0]
    u, slope = b / least, _on_nodes(_spline_slope(least), 1.0)
    bend = [least * weight for weight in slope]  # what the tangent changes from b = 0 to the node
    bend[-1] -= 1.0
    square = u * u - u
    weights = [square * weight for weight in bend]
    weights[-1] += u
    return [*weights, 1 - u + square]


_cached_interpolation = functools.lru_cache(maxsize=64)(_interpolation)


def _on_nodes(basis: list[float], moment: float) -> list[float]:
    """Return the weights of the nodes, such that they map b to `moment`."""
    weights = [
        sum(value * row[node] for value, row in zip(basis, _COEFFICIENTS, strict=True))
        for node in range(len(_NODES))
    ]
    missing = moment - sum(w * b for w, b in zip(weights, _NODES, strict=True))
    weights[0] += missing / (_NODES[0] - _NODES[-1])
    weights[-1] -= missing / (_NODES[0] - _NODES[-1])
    return weights


def _warn(message: str) -> None:
    """Warn once, as Python's default filter drops the same words of the same line."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, stacklevel=2)


def _check_no_nan(teacher: SparseLogits) -> None:
    nan = teacher.values.isnan().any(dim=-1) | teacher.rest.isnan()
    if teacher.rest_grid is not None:
        nan |= teacher.rest_grid.isnan().any(dim=-1)
    rows = nan.nonzero()
    if len(rows):
        *member, row = rows[0].tolist()
        suffix = f" of member {member[0]}" if member else ""
        raise ValueError(f"teacher must have numbers for soft_loss, got nan in row {row}{suffix}")


def check_sparse(teacher: SparseLogits, student_logits: Tensor) -> None:
    """Check that sparse logits, or those of members, fit `student_logits [..., classes]`.

    Raises:
        ValueError: Shapes that do not match, or (checked on the CPU only) a class out of range.
        TypeError: Values or rest that are not floating point, or indices that are not int64.
    """
    _check_form(teacher, student_logits)
    _check_range(teacher.indices, student_logits.shape[-1])


def _check_form(teacher: SparseLogits, student_logits: Tensor) -> None:
    values, indices, rest, grid = teacher
    *rows, classes = student_logits.shape
    k = values.shape[-1] if values.ndim else 0
    if (
        list(values.shape[-len(rows) - 1 : -1]) != rows
        or values.ndim > len(rows) + 2
        or not len(values)
        or not 1 <= k <= classes
    ):
        raise ValueError(
            f"teacher must have values {[*rows, 'k']} with k in [1, {classes}], or that for each "
            f"of the members, got {list(values.shape)}"
        )
    if indices.shape != values.shape or rest.shape != values.shape[:-1]:
        raise ValueError(
            f"teacher must have indices {list(values.shape)} as its values and rest "
            f"{list(values.shape[:-1])}, got {list(indices.shape)} and {list(rest.shape)}"
        )
    if grid is not None and grid.shape != (*rest.shape, len(REST_TEMPERATURES)):
        raise ValueError(
            f"teacher must have rest_grid {[*rest.shape, len(REST_TEMPERATURES)]}, got "
            f"{list(grid.shape)}"
        )
    if grid is not None and not grid.is_floating_point():
        raise TypeError(f"teacher must have a floating-point rest_grid, got {grid.dtype}")
    if not values.is_floating_point() or not rest.is_floating_point():
        raise TypeError(
            f"teacher must have floating-point values and rest, got {values.dtype}, {rest.dtype}"
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher must have indices of torch.int64, got {indices.dtype}")


def _check_range(indices: Tensor, classes: int) -> None:
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= classes:
            index = low if low < 0 else high
            raise ValueError(f"teacher must have indices in [0, {classes}), got {index}")
