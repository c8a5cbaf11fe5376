"""Metrics against scikit-learn and NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.metrics import accuracy_score, log_loss

from selfkd.metrics import accuracy, agreement, ece, ensemble_logits, nll


def make_logits(rows=500, classes=10, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits[torch.arange(rows), labels] += scale
    return logits, labels


SCALES = [0.0, 0.1, 1.0, 3.0, 30.0, 1000.0]


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
def test_accuracy_is_sklearns(classes, scale):
    logits, labels = make_logits(classes=classes, scale=scale)
    assert accuracy(logits, labels) == pytest.approx(
        accuracy_score(labels.numpy(), logits.numpy().argmax(1)), abs=1e-7
    )


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0])
def test_nll_is_sklearns(classes, scale):
    logits, labels = make_logits(classes=classes, scale=scale)
    expected = log_loss(
        labels.numpy(), softmax(logits.double().numpy(), axis=1), labels=range(classes)
    )
    assert nll(logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [30.0, 1000.0, 1e30])
def test_nll_of_saturated_logits_is_finite_and_right(scale):
    logits, labels = make_logits(scale=scale)
    rows = np.arange(len(labels))
    expected = -log_softmax(logits.double().numpy(), axis=1)[rows, labels.numpy()].mean()
    assert nll(logits, labels) == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(nll(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    logits, labels = make_logits()
    logits = logits.to(dtype)
    assert nll(logits, labels) == nll(logits.float(), labels)
    assert ece(logits, labels) == ece(logits.float(), labels)
    members = torch.stack([logits, logits])
    assert torch.equal(ensemble_logits(members), ensemble_logits(members.float()))


def ece_reference(probabilities, labels, bins=15):
    """Guo et al., 2017: sum over bins (m/bins, (m+1)/bins] of share * |accuracy - confidence|."""
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for bin_ in range(bins):
        inside = which == bin_
        if inside.any():
            gap = abs((predicted == labels)[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return error


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0, 30.0, 1000.0])
def test_ece_is_that_of_fifteen_equal_bins(classes, scale):
    logits, labels = make_logits(rows=2000, classes=classes, scale=scale)
    labels = torch.where(torch.arange(2000) % 3 == 0, (labels + 1) % classes, labels)
    expected = ece_reference(softmax(logits.double().numpy(), axis=1), labels.numpy())
    assert ece(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_ece_of_known_cases():
    # all of (14/15, 1] is one bin: a confidence of exactly 1 has none of its own
    logits = torch.tensor([[200.0, 0.0]] * 50 + [[math.log(19), 0.0]] * 50)  # 1 and 0.95
    labels = torch.tensor([1] * 5 + [0] * 95)
    assert ece(logits, labels) == pytest.approx(0.975 - 0.95, abs=1e-6)
    always_sure = torch.tensor([[50.0, 0.0]]).repeat(4, 1)
    assert ece(always_sure, torch.tensor([0, 0, 0, 0])) == pytest.approx(0, abs=1e-6)
    assert ece(always_sure, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5, abs=1e-6)
    assert ece(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(0, abs=1e-6)


def test_agreement_is_the_share_of_equal_choices():
    one, _ = make_logits(seed=0)
    two, _ = make_logits(seed=1)
    expected = (one.numpy().argmax(1) == two.numpy().argmax(1)).mean()
    assert agreement(one, two) == agreement(two, one) == pytest.approx(expected, abs=1e-7)
    assert agreement(one, one) == 1.0
    assert agreement(one, 7 * one - 3) == 1.0
    assert agreement(one, -one) == 0.0


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("scale", [*SCALES, 1e30])
def test_mean_probabilities_is_numpys(members, scale):
    logits = torch.stack([make_logits(rows=40, scale=scale, seed=s)[0] for s in range(members)])
    found = ensemble_logits(logits)
    wide = logits.double().numpy()
    np.testing.assert_allclose(found.exp(), softmax(wide, axis=2).mean(axis=0), atol=1e-6)
    expected = logsumexp(log_softmax(wide, axis=2), axis=0) - np.log(members)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.exp().sum(1), 1, atol=1e-5)


def test_the_mean_is_over_members():
    sure, unsure = torch.tensor([[[20.0, 0.0]], [[0.0, 0.0]]])
    mean = ensemble_logits(torch.stack([sure, unsure])).exp()
    np.testing.assert_allclose(mean, [[0.75, 0.25]], atol=1e-6)  # not that of mean logits: [1, 0]


def test_a_log_of_probabilities_can_be_measured_like_logits():
    logits, labels = make_logits()
    log_probabilities = ensemble_logits(logits[None])
    assert nll(log_probabilities, labels) == pytest.approx(nll(logits, labels), rel=1e-5)
    assert ece(log_probabilities, labels) == pytest.approx(ece(logits, labels), abs=1e-6)
    assert accuracy(log_probabilities, labels) == accuracy(logits, labels)
