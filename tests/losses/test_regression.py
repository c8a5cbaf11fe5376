"""Distillation of numbers against PyTorch's squared error, and the bound of Chen et al."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses import regression_terms
from tests.losses.batches import pair, randn


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3), (6, 2, 2)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_without_a_bound_it_is_the_mean_squared_error(shape: tuple[int, ...], alpha: float) -> None:
    student, teacher = pair(shape)
    labels = randn(*shape, seed=5)
    terms = regression_terms(student, teacher, labels, alpha=alpha, margin=None)
    hard, soft = F.mse_loss(student, labels), F.mse_loss(student, teacher)
    for found, value in zip(terms, ((1 - alpha) * hard + alpha * soft, hard, soft), strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_an_item_that_is_better_than_the_teachers_has_no_soft_term(margin: float) -> None:
    student, teacher = pair((40, 2))
    labels = randn(40, 2, seed=5)
    terms = regression_terms(student, teacher, labels, alpha=1.0, margin=margin)
    own = (student - labels).square().mean(dim=1)
    teachers = (teacher - labels).square().mean(dim=1)
    counted = own + margin > teachers
    assert 0 < int(counted.sum()) < 40
    expected = ((student - teacher).square().mean(dim=1) * counted).mean()
    torch.testing.assert_close(terms.soft_loss, expected.detach())
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient[~counted].abs().sum() == 0
    torch.testing.assert_close(gradient, (student - teacher).detach() * counted[:, None] / 40)


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
@pytest.mark.parametrize("weights", [None, [0.25, 0.75]])
def test_members_are_averaged(shape: tuple[int, ...], weights: list[float] | None) -> None:
    student, teacher = pair(shape, (2, *shape))
    mean = torch.tensordot(torch.tensor(weights or [0.5, 0.5]).double(), teacher, dims=1)
    found = regression_terms(student, teacher, None, alpha=1.0, weights=weights)
    torch.testing.assert_close(found.loss, F.mse_loss(student, mean))


@pytest.mark.parametrize(
    ("teacher", "labels", "more", "kind", "message"),
    [
        (randn(6, 1), torch.zeros(6), {}, ValueError, r"labels must be \[6, 1\] .* got \[6\]"),
        (randn(6), torch.zeros(6, 1), {}, ValueError, r"teacher_outputs must be \[6, 1\]"),
        (randn(6, 1), None, {}, ValueError, "labels must be given where alpha is below 1"),
        (randn(6, 1), [1.0] * 6, {}, TypeError, "labels must be a tensor, got list"),
        (randn(6, 1), randn(6, 1) * torch.nan, {}, ValueError, r"labels .* got nan at \[0, 0\]"),
        (randn(6, 1) * torch.nan, randn(6, 1), {}, ValueError, "teacher_outputs .* got nan at"),
        (randn(6, 1), randn(6, 1), {"weights": [1.0]}, ValueError, "weights must be one for each"),
        (randn(6, 1), randn(6, 1), {"margin": -1.0}, ValueError, "margin must be at least 0"),
        (randn(6, 1), randn(6, 1), {"alpha": 2.0}, ValueError, r"alpha must be in \[0, 1\]"),
        (randn(6, 1).long(), randn(6, 1), {}, TypeError, "teacher_outputs must be floating point"),
    ],
)
def test_bad_input(
    teacher: Tensor,
    labels: Any,
    more: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        regression_terms(randn(6, 1), teacher, labels, **{"alpha": 0.5} | more)
