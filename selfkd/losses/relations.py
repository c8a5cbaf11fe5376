"""Relational distillation: distances and angles between the embeddings of a batch.

The dimensions of student and teacher may differ. Both losses depend on how a batch is split.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.logits import check_finite


def rkd_distance(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Relational distillation of distances between pairs of embeddings.

        mean over pairs i != j of huber(psi_s_ij - psi_t_ij)
        psi_ij = ||x_i - x_j|| / mean over pairs i != j of ||x_i - x_j||
        huber(u) = u^2 / 2 if |u| <= 1 else |u| - 1/2

    The paper's sum over pairs is `batch * (batch - 1)` times this. The authors' code, a mean over
    batch^2 pairs with i = j among them, is `(batch - 1) / batch` times this: a weight of 25 at a
    batch of 64 is 24.6 here.

    A pair of coinciding embeddings has no gradient. If all coincide, psi = 0.

    Args:
        student_embeddings: Embeddings `[batch, dim]`. The loss is computed in float32 or wider, in
            autocast too.
        teacher_embeddings: Embeddings `[batch, dim]` of any dimension. Never gets a gradient.

    Returns:
        Scalar, dimensionless; 0 for a batch of 1.

    Raises:
        ValueError: Shapes that do not match, or (checked on the CPU only) an embedding of the
            teacher that is not finite.
        TypeError: Embeddings that are not floating point.

    >>> line = torch.tensor([[0.0], [1.0], [2.0]])
    >>> rkd_distance(line, torch.cat([7 * line, line], dim=1))
    tensor(0.)
    >>> rkd_distance(line, line**2)
    tensor(0.0469)

    Reference:
        Park et al., "Relational Knowledge Distillation", 2019, https://arxiv.org/abs/1904.05068
    """
    student, teacher = _pair(student_embeddings, teacher_embeddings)
    student_psi, teacher_psi = _relative_distances(student), _relative_distances(teacher)
    return F.smooth_l1_loss(student_psi, teacher_psi, reduction="sum") / max(len(teacher_psi), 1)


def rkd_angle(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Relational distillation of angles within triplets of embeddings.

        mean over triplets of distinct i, j, k of huber(c_s_ijk - c_t_ijk)
        c_ijk = <e_ij, e_kj>        e_ij = (x_i - x_j) / ||x_i - x_j||
        huber(u) = u^2 / 2 if |u| <= 1 else |u| - 1/2

    The paper's sum over triplets is `batch * (batch - 1) * (batch - 2)` times this. The authors'
    code, a mean over batch^3, is `(batch - 1) * (batch - 2) / batch ** 2` times this: a weight of
    50 at a batch of 64 is 47.7 here.

    Coinciding embeddings have e = 0 and no gradient. Needs memory for batch^2 (batch + dim)
    numbers.

    Args:
        student_embeddings: Embeddings `[batch, dim]`. The loss is computed in float32 or wider, in
            autocast too.
        teacher_embeddings: Embeddings `[batch, dim]` of any dimension. Never gets a gradient.

    Returns:
        Scalar, dimensionless; 0 for a batch of 1 or 2.

    Raises:
        ValueError, TypeError: Same as `rkd_distance`.

    >>> right = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    >>> rkd_angle(right, 2 * right)
    tensor(0.)
    >>> rkd_angle(right, torch.tensor([[-1.0], [0.0], [1.0]]))
    tensor(0.1953)

    Reference:
        Park et al., "Relational Knowledge Distillation", 2019, https://arxiv.org/abs/1904.05068
    """
    student, teacher = _pair(student_embeddings, teacher_embeddings)
    batch = len(student)
    with torch.autocast(student.device.type, enabled=False):
        student_cosines, teacher_cosines = _cosines(student), _cosines(teacher)
    # i = k is not a triplet: made equal, so that it adds 0
    teacher_cosines.diagonal(dim1=1, dim2=2).copy_(
        student_cosines.detach().diagonal(dim1=1, dim2=2)
    )
    total = F.smooth_l1_loss(student_cosines, teacher_cosines, reduction="sum")
    return total / max(batch * (batch - 1) * (batch - 2), 1)


def _relative_distances(embeddings: Tensor) -> Tensor:
    """Distances of pairs `[batch (batch - 1) / 2]` divided by their mean; 0 if the mean is 0."""
    distances: Tensor = _Distances.apply(embeddings)
    mean = distances.sum() / max(len(distances), 1)
    return distances / mean.masked_fill(mean == 0, math.inf)


def _cosines(embeddings: Tensor) -> Tensor:
    """Cosines `[j, i, k]` of the angles at j between i and k; 0 if i or k coincides with j."""
    differences = embeddings - embeddings[:, None]
    norms = torch.linalg.vector_norm(differences, dim=-1, keepdim=True)
    units = differences / norms.masked_fill(norms == 0, math.inf)
    return torch.bmm(units, units.mT)


class _Distances(torch.autograd.Function):
    """Distances as in `F.pdist`, with one backward matrix product: 3 times as fast if wide."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:
        distances = F.pdist(embeddings)
        ctx.save_for_backward(embeddings, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        embeddings, distances = ctx.saved_tensors
        batch = len(embeddings)
        weights = embeddings.new_zeros(batch, batch)
        weights[tuple(torch.triu_indices(batch, batch, 1, device=weights.device))] = (
            grad / distances.masked_fill(distances == 0, math.inf)
        )
        weights = weights + weights.t()
        with torch.autocast(embeddings.device.type, enabled=False):
            gradient: Tensor = weights.sum(dim=1, keepdim=True) * embeddings - weights @ embeddings
        return gradient


def _pair(student_embeddings: Tensor, teacher_embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return checked, centred embeddings in float32 or wider, the teacher's detached."""
    named = {"student_embeddings": student_embeddings, "teacher_embeddings": teacher_embeddings}
    for name, embeddings in named.items():
        if embeddings.ndim != 2 or not embeddings.numel():
            raise ValueError(f"{name} must be [batch, dim], got shape {tuple(embeddings.shape)}")
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {embeddings.dtype}")
    if len(student_embeddings) != len(teacher_embeddings):
        raise ValueError(
            f"teacher_embeddings must have {len(student_embeddings)} rows as student_embeddings "
            f"do, got {len(teacher_embeddings)}"
        )
    check_finite("teacher_embeddings", teacher_embeddings)
    dtype = torch.promote_types(student_embeddings.dtype, torch.float32)
    student, teacher = student_embeddings.to(dtype), teacher_embeddings.detach().to(dtype)
    # centred, because differences of pairs are computed by matrix products
    return student - student.mean(dim=0), teacher - teacher.mean(dim=0)
