"""The loss of few classes against the one of many, its gradient, and what it must refuse."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from selfkd.losses import distillation_terms, soft_targets
from selfkd.losses.few_classes import few_classes_terms


def make_batch(batch=7, classes=5, members=None, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, classes) if members is None else (members, batch, classes)
    student = 3 * torch.randn(batch, classes, generator=draw, dtype=dtype)
    teacher = 3 * torch.randn(shape, generator=draw, dtype=dtype)
    labels = torch.randint(classes, (batch,), generator=draw)
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("members", [None, 3])
def test_it_is_the_loss_of_numpy_and_of_many_classes(alpha, temperature, smoothing, members):
    student, teacher, labels = make_batch(members=members)
    settings = {"temperature": temperature, "alpha": alpha, "label_smoothing": smoothing}
    targets = soft_targets(teacher, temperature=temperature)
    terms = few_classes_terms(student, targets, labels, **settings)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    other = distillation_terms(student, teacher, labels, **settings)
    (expected,) = torch.autograd.grad(other.loss, student)
    for mine, theirs in zip(terms, other, strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(gradient, expected)
    z = student.detach().numpy()
    p = softmax(teacher.numpy() / temperature, axis=-1)
    p = p if members is None else p.mean(axis=0)
    soft = temperature**2 * (p * (np.log(p) - log_softmax(z / temperature, axis=1))).sum(1).mean()
    y = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    hard = -(y * log_softmax(z, axis=1)).sum(1).mean()
    assert terms.soft_loss.item() == pytest.approx(soft)
    assert terms.hard_loss.item() == pytest.approx(hard)
    assert terms.loss.item() == pytest.approx((1 - alpha) * hard + alpha * soft)


def test_probabilities_are_labels_too_and_half_precision_is_computed_in_single():
    student, teacher, labels = make_batch(dtype=torch.float32)
    targets = soft_targets(teacher, temperature=2.0)
    mixed = torch.nn.functional.one_hot(labels, 5) * 0.75 + 0.05
    settings = {"temperature": 2.0, "alpha": 0.5}
    terms = few_classes_terms(student.half(), targets, mixed, **settings)
    expected = distillation_terms(student.half(), teacher, mixed, **settings)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_gradient_is_that_of_differences():
    student, teacher, labels = make_batch(batch=3)
    targets = soft_targets(teacher, temperature=3.0)

    def loss(logits):
        return few_classes_terms(logits, targets, labels, temperature=3.0, alpha=0.6).loss

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_the_terms_have_no_graph_and_no_memory_of_the_loss():
    student, teacher, labels = make_batch()
    for alpha in (0.0, 0.5, 1.0):
        targets = soft_targets(teacher, temperature=1.0)
        terms = few_classes_terms(student, targets, labels, temperature=1.0, alpha=alpha)
        before = [terms.hard_loss.item(), terms.soft_loss.item()]
        assert not terms.hard_loss.requires_grad
        assert not terms.soft_loss.requires_grad
        with torch.no_grad():
            terms.loss.mul_(0)
        assert [terms.hard_loss.item(), terms.soft_loss.item()] == before


def test_a_class_without_probability_adds_nothing():
    student, _, labels = make_batch(dtype=torch.float32)
    targets = torch.tensor([[1.0, 0, 0, 0, 0]]).expand(7, 5)
    terms = few_classes_terms(student, targets, labels, temperature=1.0, alpha=1.0)
    expected = torch.nn.functional.cross_entropy(student, torch.zeros(7, dtype=torch.int64))
    assert terms.soft_loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_label_out_of_range_is_named(label):
    student, teacher, labels = make_batch()
    labels[2] = label
    targets = soft_targets(teacher, temperature=1.0)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {label}"):
        few_classes_terms(student, targets, labels, temperature=1.0, alpha=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"temperature": math.nan}, "temperature must be > 0"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    student, teacher, labels = make_batch()
    targets = soft_targets(teacher, temperature=1.0)
    with pytest.raises(ValueError, match=message):
        few_classes_terms(student, targets, labels, **{"temperature": 1.0, "alpha": 0.5} | change)
