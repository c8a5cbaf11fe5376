"""Sigmoid distillation against PyTorch's own losses and the sums of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from selfkd.losses import multi_label_terms
from tests.losses.batches import pair, randn

LABELS = (randn(6, 4) > 0).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_are_those_of_the_definition(
    temperature: float, alpha: float, smoothing: float
) -> None:
    student, teacher = pair((6, 4))
    terms = multi_label_terms(
        student,
        teacher,
        LABELS,
        temperature=temperature,
        alpha=alpha,
        label_smoothing=smoothing,
    )
    targets = LABELS * (1 - smoothing) + smoothing / 2
    hard = F.binary_cross_entropy_with_logits(student, targets)
    divergence = kl_divergence(
        Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature)
    )
    soft = temperature**2 * divergence.mean()
    expected = (1 - alpha) * hard + alpha * soft
    for found, value in zip(terms, (expected, hard, soft), strict=True):
        torch.testing.assert_close(found, value)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    by_hand = (1 - alpha) * (student.sigmoid() - targets) + alpha * temperature * (
        (student / temperature).sigmoid() - (teacher / temperature).sigmoid()
    )
    torch.testing.assert_close(gradient, by_hand.detach() / 24)


def test_two_labels_of_opposite_sign_are_the_softmax_of_two_classes() -> None:
    """Of one label z, the classes' logits are z / 2 and -z / 2."""
    from selfkd.losses import distillation_terms

    student, teacher = pair((6, 1))
    labels = LABELS[:, :1]
    terms = multi_label_terms(student, teacher, labels, temperature=3.0, alpha=0.4)
    classes = [torch.cat([-logits, logits], dim=1) / 2 for logits in (student, teacher)]
    expected = distillation_terms(*classes, labels[:, 0].long(), temperature=3.0, alpha=0.4)
    for found, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
def test_an_ensemble_is_averaged_by_probabilities_or_logits(weights: list[float] | None) -> None:
    student, teacher = pair((6, 4), (3, 6, 4))
    share = torch.tensor(weights or [1 / 3] * 3).double()
    more: dict[str, Any] = {"temperature": 2.0, "alpha": 1.0}
    mean_logits = torch.tensordot(share, teacher, dims=1)
    mean_p = torch.tensordot(share, (teacher / 2).sigmoid(), dims=1)
    for average, single in (("logits", mean_logits), ("probabilities", 2 * mean_p.logit())):
        found = multi_label_terms(
            student,
            teacher,
            None,
            average=average,  # type: ignore[arg-type]
            weights=weights,
            **more,
        )
        expected = multi_label_terms(student, single, None, **more)
        torch.testing.assert_close(found.soft_loss, expected.soft_loss, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher", [-1e4, -torch.inf, 1e4, torch.inf])
def test_a_sure_teacher_gives_finite_values(teacher: float) -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    terms = multi_label_terms(
        student, torch.full((2, 3), teacher), None, temperature=1.0, alpha=1.0
    )
    torch.testing.assert_close(terms.soft_loss, torch.tensor(2.0).log())
    terms.loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.abs().sum() == 0.5 * 6 / 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in pair((6, 4)))
    found = multi_label_terms(student, teacher, LABELS.int(), temperature=2.0, alpha=0.5)
    expected = multi_label_terms(
        student.float(), teacher.float(), LABELS, temperature=2.0, alpha=0.5
    )
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 4)])
@pytest.mark.parametrize("members", [(), (3,)])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_labels_of_any_shape_are_a_label_each(
    shape: tuple[int, ...], members: tuple[int, ...], average: Any
) -> None:
    student, teacher = pair((6, 4), (*members, 6, 4))
    more: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5, "average": average}
    expected = multi_label_terms(student, teacher, LABELS, **more)
    found = multi_label_terms(
        student.reshape(shape), teacher.reshape(*members, *shape), LABELS.reshape(shape), **more
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("teacher", "labels", "more", "kind", "message"),
    [
        (randn(6, 4), LABELS.tolist(), {}, TypeError, "labels must be a tensor, got list"),
        (randn(6, 4) * torch.nan, LABELS, {}, ValueError, r"teacher_logits .* got nan at \[0, 0\]"),
        (randn(6, 4), LABELS, {"weights": [1.0]}, ValueError, "weights must be one for each"),
        (randn(6, 4), torch.zeros(6), {}, ValueError, r"labels must be \[6, 4\] .* got \[6\]"),
        (randn(6, 4), LABELS * 2, {}, ValueError, r"labels must be in \[0, 1\], .* got 2.0"),
        (randn(6, 4), LABELS - 1, {}, ValueError, r"labels must be in \[0, 1\], .* got -1.0"),
        (randn(6, 4), LABELS * torch.nan, {}, ValueError, r"labels must be in \[0, 1\]"),
        (randn(6, 3), LABELS, {}, ValueError, r"teacher_logits must be \[6, 4\] .* got \[6, 3\]"),
        (randn(6, 4), None, {}, ValueError, "labels must be given where alpha is below 1"),
        (None, LABELS, {}, ValueError, "teacher must be given where alpha is above 0"),
        (randn(6, 4).long(), LABELS, {}, TypeError, "teacher_logits must be floating point"),
        (randn(2, 6, 4), LABELS, {"weights": [1.0]}, ValueError, "weights must be one for each"),
        (randn(6, 4), LABELS, {"temperature": 0.0}, ValueError, "temperature must be > 0"),
    ],
)
def test_bad_input(
    teacher: Tensor | None,
    labels: Any,
    more: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        multi_label_terms(randn(6, 4), teacher, labels, **{"temperature": 1.0, "alpha": 0.5} | more)
