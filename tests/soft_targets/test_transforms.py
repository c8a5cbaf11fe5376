"""Transforms of cached logits: what they keep of the teacher, and what they remove."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from selfkd.distill.distiller import Distiller
from selfkd.losses.logits import hard_teacher_loss
from selfkd.losses.sequences import SampledTargets, sampled_targets
from selfkd.losses.sparse import SparseLogits, sparsify
from selfkd.soft_targets.transforms import (
    ClassMeanTargets,
    ConfidenceWeighted,
    HardTargets,
    PermutedTargets,
    VirtualTargets,
    transform_targets,
)

LOGITS = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([4, 40, 7, 11])


def cached(index: Tensor, view: int) -> Tensor:
    return LOGITS[index] + view


def test_the_largest_logit_stays_and_the_rest_is_permuted() -> None:
    found = PermutedTargets(cached, temperature=4.0, seed=1)(INDEX, 0)
    given = LOGITS[INDEX]
    assert torch.equal(found.argmax(1), given.argmax(1))
    assert torch.equal(found.amax(1), given.amax(1))
    assert torch.equal(found.sort(1).values, given.sort(1).values)
    assert all(not torch.equal(row, other) for row, other in zip(found, given, strict=True))


def test_the_order_depends_on_seed_view_and_images_alone() -> None:
    targets = PermutedTargets(cached, temperature=4.0, seed=1)
    first = targets(INDEX, 0)
    targets(torch.tensor([1, 2]), 0)  # another batch in between, as before a resume
    assert torch.equal(targets(INDEX, 0), first)
    assert torch.equal(PermutedTargets(cached, temperature=4.0, seed=1)(INDEX, 0), first)
    assert not torch.equal(PermutedTargets(cached, temperature=4.0, seed=2)(INDEX, 0), first)
    assert not torch.equal(targets(INDEX, 1), first + 1)
    assert not torch.equal(targets(INDEX.flip(0), 0), first.flip(0))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_the_average_of_an_ensemble_is_permuted(average: str) -> None:
    members = torch.stack([LOGITS, LOGITS.flip(1) * 2])
    targets = PermutedTargets(
        lambda index, view: members[:, index],
        temperature=3.0,
        average=average,  # type: ignore[arg-type]
        weights=[0.75, 0.25],
        seed=0,
    )
    softened = softmax(targets(INDEX, 0).double().numpy() / 3, axis=1)
    one, two = (each[INDEX].double().numpy() / 3 for each in members)
    if average == "probabilities":
        expected = 0.75 * softmax(one, axis=1) + 0.25 * softmax(two, axis=1)
    else:
        expected = softmax(0.75 * one + 0.25 * two, axis=1)
    assert torch.tensor(softened).sort(1).values.numpy() == pytest.approx(
        torch.tensor(expected).sort(1).values.numpy(), abs=1e-6
    )
    assert (softened.argmax(1) == expected.argmax(1)).all()


def test_a_confident_ensemble_stays_finite() -> None:
    members = torch.tensor([[[900.0, 0.0, -900.0]], [[800.0, 0.0, -900.0]]])
    targets = PermutedTargets(lambda index, view: members, temperature=1.0, seed=0)
    assert bool(targets(torch.tensor([0]), 0).isfinite().all())


def test_parts_of_the_logits_cannot_be_permuted() -> None:
    def sparse(index: Tensor, view: int) -> SparseLogits:
        return sparsify(LOGITS[index], 3)

    def sampled(index: Tensor, view: int) -> SampledTargets:
        return sampled_targets(LOGITS[index], 3, temperature=1.0)

    for targets in (sparse, sampled):
        with pytest.raises(ValueError, match="targets must hold all logits of the teacher"):
            PermutedTargets(targets, temperature=1.0, seed=0)(INDEX, 0)
        with pytest.raises(ValueError, match="targets must hold all logits of the teacher"):
            HardTargets(targets)(INDEX, 0)
        with pytest.raises(ValueError, match="targets must hold all logits of the teacher"):
            ClassMeanTargets(targets, torch.zeros(50).long(), classes=10, temperature=1.0)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_hard_targets_are_the_cross_entropy_with_the_predicted_class(average: str) -> None:
    members = torch.stack([LOGITS, LOGITS.flip(1) * 2])
    hard, temperature = transform_targets(
        lambda index, view: members[:, index],
        "hard",
        torch.zeros(50, dtype=torch.int64),
        classes=10,
        temperature=4.0,  # which a hard loss has none of
        average=average,  # type: ignore[arg-type]
        weights=[0.75, 0.25],
        seed=0,
    )
    student = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    terms = Distiller(targets=hard, temperature=temperature, alpha=1.0)(
        student, torch.zeros(4, dtype=torch.int64), index=INDEX
    )
    one, two = (each[INDEX].double().numpy() for each in members)
    if average == "probabilities":
        mean = 0.75 * softmax(one, axis=1) + 0.25 * softmax(two, axis=1)
    else:
        mean = 0.75 * one + 0.25 * two
    expected = hard_teacher_loss(student, torch.tensor(mean).float())
    assert terms["loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("members", [1, 2])
def test_class_means_are_of_the_items_of_the_label_at_the_temperature(members: int) -> None:
    every = torch.stack([LOGITS.half(), LOGITS.flip(1).half() * 2])[:members]
    labels = torch.arange(50) % 3
    labels[5] = -100  # of an item that is never trained on
    targets = ClassMeanTargets(
        lambda index, view: every[:, index] if members == 2 else every[0, index],
        labels,
        classes=10,
        temperature=3.0,
    )
    found = softmax(targets(INDEX, 4).double().numpy() / 3, axis=1)
    soft = softmax(every.double().numpy() / 3, axis=2).mean(0)
    expected = [soft[(labels == label).numpy()].mean(0) for label in labels[INDEX]]
    assert found == pytest.approx(np.stack(expected), abs=1e-6)
    assert torch.equal(targets(torch.tensor([1]), 0), targets(torch.tensor([4]), 1))


def test_a_class_mean_is_of_few_classes() -> None:
    with pytest.raises(ValueError, match=r"at most 8,192 classes, got 32,000"):
        ClassMeanTargets(cached, torch.zeros(50).long(), classes=32_000, temperature=1.0)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_are_weighted_by_the_confidence(members: int, smoothing: float) -> None:
    every = torch.stack([LOGITS.half(), LOGITS.flip(1).half() * 2])[:members]
    weights = [0.75, 0.25] if members == 2 else None
    loss = ConfidenceWeighted(
        lambda index, view: every[:, index] if members == 2 else every[0, index],
        weights=weights,
        label_smoothing=smoothing,
    )
    student = LOGITS[INDEX + 1].double().requires_grad_()
    terms = loss(student, INDEX % 10, index=INDEX, view=3)
    terms["loss"].backward()

    p_t = softmax(every[:, INDEX].double().numpy(), axis=2)
    confidence = np.average(p_t, axis=0, weights=weights).max(1)
    w = confidence / confidence.mean()
    q = (1 - smoothing) * np.eye(10)[INDEX % 10] + smoothing / 10
    losses = -(q * log_softmax(student.detach().numpy(), axis=1)).sum(1)
    assert terms["loss"].item() == pytest.approx((w * losses).mean(), rel=1e-6)
    assert terms["hard_loss"].item() == pytest.approx(losses.mean(), rel=1e-12)
    gradient = w[:, None] * (softmax(student.detach().numpy(), axis=1) - q) / len(w)
    assert student.grad is not None
    assert student.grad.numpy() == pytest.approx(gradient, rel=1e-5, abs=1e-8)
    assert not terms["hard_loss"].requires_grad


def test_equal_confidence_gives_plain_cross_entropy() -> None:
    loss = ConfidenceWeighted(lambda index, view: torch.eye(10)[index % 10] * 5)
    terms = loss(LOGITS[INDEX], INDEX % 10, index=INDEX)
    assert terms["loss"].item() == pytest.approx(terms["hard_loss"].item(), rel=1e-6)


def test_confidence_needs_images_and_all_logits() -> None:
    logits, labels = LOGITS[INDEX], INDEX % 10
    with pytest.raises(ValueError, match="index must be given where targets are cached, got None"):
        ConfidenceWeighted(cached)(logits, labels)
    sparse = ConfidenceWeighted(lambda index, view: sparsify(LOGITS[index], 3))
    with pytest.raises(ValueError, match="targets must hold all logits of the teacher"):
        sparse(logits, labels, index=INDEX)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        ConfidenceWeighted(cached, label_smoothing=2)(logits, labels, index=INDEX)


def test_a_virtual_teacher_is_uniform_over_the_other_classes() -> None:
    labels = torch.arange(50) % 10
    targets = VirtualTargets(labels, classes=10)
    found = targets(INDEX, 3).exp()
    assert torch.equal(found.argmax(1), labels[INDEX])
    assert found.amax(1).tolist() == pytest.approx([0.9] * 4)
    assert found.sort(1).values[:, :9].numpy() == pytest.approx(0.1 / 9)


def test_transforms_are_targets_of_a_distiller() -> None:
    student = torch.zeros(4, 10, requires_grad=True)
    labels = INDEX % 10
    for targets in (
        PermutedTargets(cached, temperature=2.0, seed=0),
        VirtualTargets(torch.arange(50) % 10, classes=10),
    ):
        terms = Distiller(targets=targets, temperature=2.0, alpha=0.5)(student, labels, index=INDEX)
        terms["loss"].backward()
        assert terms["soft_loss"] > 0
