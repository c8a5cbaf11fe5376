"""Metrics against scikit-learn and NumPy in float64."""

import math

import numpy as np
import pytest
import sklearn
import torch
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from selfkd.analysis.metrics import (
    accuracy,
    agreement,
    brier,
    class_accuracy,
    confusions,
    ece,
    fit_bias,
    fit_biases,
    fit_temperature,
    mean_kl,
    nll,
    reliability,
)
from selfkd.losses import ensemble_logits


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
    known = multiclass_calibration_error(
        logits.softmax(-1).clamp(max=1 - torch.finfo(torch.float32).eps),
        labels,
        num_classes=classes,
        n_bins=15,
    )
    assert ece(logits, labels) == float(known), "to the bit, so that no figure of a run changes"


@pytest.mark.parametrize("scale", [0.1, 1, 5, 40])
@pytest.mark.parametrize("classes", [2, 10])
def test_ece_is_that_of_torchmetrics_to_the_bit(classes, scale):
    """It is not called, as it imports transformers and matplotlib: two seconds a worker."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(1000, classes, generator=generator)
    labels = torch.randint(classes, (1000,), generator=generator)
    probabilities = logits.softmax(dim=-1).clamp(max=1 - torch.finfo(torch.float32).eps)
    expected = multiclass_calibration_error(
        probabilities, labels, num_classes=classes, n_bins=15, norm="l1"
    )
    assert ece(logits, labels) == float(expected)


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


def test_a_log_of_probabilities_can_be_measured_like_logits():
    logits, labels = make_logits()
    log_probabilities = ensemble_logits(logits[None])
    assert nll(log_probabilities, labels) == pytest.approx(nll(logits, labels), rel=1e-5)
    assert ece(log_probabilities, labels) == pytest.approx(ece(logits, labels), abs=1e-6)
    assert accuracy(log_probabilities, labels) == accuracy(logits, labels)


@pytest.mark.skipif(sklearn.__version__ < "1.7", reason="sklearn's Brier score was of two classes")
@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_brier_is_sklearns(classes, scale):
    logits, labels = make_logits(classes=classes, scale=scale)
    probabilities = softmax(logits.double().numpy(), axis=1)
    expected = brier_score_loss(
        labels.numpy(), probabilities, labels=range(classes), scale_by_half=False
    )
    assert brier(logits, labels) == pytest.approx(expected, rel=1e-9)


def test_brier_of_known_cases():
    # of all classes, and both the label's and the others' errors count
    assert brier(torch.zeros(1, 4), torch.tensor([2])) == pytest.approx(0.75**2 + 3 * 0.25**2)
    assert brier(torch.tensor([[50.0, 0.0]]), torch.tensor([1])) == pytest.approx(2)


@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_reliability_bins_make_the_ece(scale):
    logits, labels = make_logits(rows=2000, scale=scale)
    labels = torch.where(torch.arange(2000) % 3 == 0, (labels + 1) % 10, labels)
    rows = reliability(logits, labels)
    assert [round(row["low"] * 15) for row in rows] == list(range(15))
    assert [row["high"] for row in rows[:-1]] == [row["low"] for row in rows[1:]]
    assert sum(row["count"] for row in rows) == 2000
    full = [row for row in rows if row["count"]]
    gaps = [row["count"] / 2000 * abs(row["accuracy"] - row["confidence"]) for row in full]
    assert sum(gaps) == pytest.approx(ece(logits, labels), abs=1e-6)
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in full)
    empty = [row for row in rows if not row["count"]]
    assert all(row["confidence"] is None and row["accuracy"] is None for row in empty)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_is_that_of_the_labels(sharpness):
    """Labels drawn from softmax(z): of logits z s, the temperature is s."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(sharpness * logits, labels) == pytest.approx(sharpness, rel=0.03)


def test_the_fitted_temperature_has_the_least_nll():
    logits, labels = make_logits(scale=2.0)
    found = fit_temperature(logits, labels)
    best = nll(logits.double() / found, labels)
    assert all(best <= nll(logits.double() / (found * factor), labels) for factor in (0.98, 1.02))
    assert accuracy(logits / found, labels) == accuracy(logits, labels)


def test_without_an_error_there_is_no_temperature_to_fit():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 1.0


def test_a_model_that_knows_nothing_has_a_bounded_temperature():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    assert fit_temperature(logits, torch.tensor([1, 1])) == pytest.approx(20, rel=0.01)


def test_class_accuracy_and_confusions_are_the_confusion_matrix():
    logits, labels = make_logits(classes=5, scale=0.7)
    labels = labels % 4  # of the last class there is none
    predicted = logits.argmax(1)
    matrix = confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(5))
    *found, absent = class_accuracy(logits, labels)
    assert absent is None
    assert found == pytest.approx((matrix.diagonal() / matrix.sum(1).clip(1))[:4].tolist())
    rows = confusions(predicted, labels, names="abcde")
    assert len(rows) == 10
    for row in rows:
        place = "abcde".index(row["label"]), "abcde".index(row["predicted"])
        assert place[0] != place[1]
        assert row["count"] == matrix[place]
    counts = [row["count"] for row in rows]
    assert counts == sorted(counts, reverse=True)
    np.fill_diagonal(matrix, 0)
    assert counts == sorted(matrix.flatten().tolist(), reverse=True)[:10]


def test_mean_kl_is_scipys():
    one, two = make_logits(seed=0)[0], make_logits(seed=1)[0]
    p, q = (softmax(logits.double().numpy(), axis=1) for logits in (one, two))
    assert mean_kl(one, two) == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-9)
    assert mean_kl(one, one) == pytest.approx(0, abs=1e-12)
    assert mean_kl(one, two) != pytest.approx(mean_kl(two, one), rel=1e-3)
    assert math.isfinite(mean_kl(1e4 * one, 1e4 * two))


@pytest.mark.parametrize("classes", [[3], [0, 1, 2, 4], [2, 4]])
@pytest.mark.parametrize("seed", range(5))
def test_the_bias_of_some_classes_leaves_the_fewest_errors(classes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 5, generator=generator) * 3
    labels = torch.randint(5, (60,), generator=generator)

    def wrong(bias: float) -> int:
        shifted = logits.double()
        shifted[:, classes] += bias
        return int((shifted.argmax(dim=1) != labels).sum())

    found = fit_bias(logits, labels, classes=classes)
    assert wrong(found) == min(wrong(float(bias)) for bias in np.linspace(-25, 25, 20_001))
    assert wrong(found - 1e-9) == wrong(found + 1e-9) == wrong(found)  # it lies on no threshold


@pytest.mark.parametrize("seed", range(5))
def test_biases_of_all_classes_are_no_worse_than_one_and_cannot_be_bettered_one_by_one(
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (80,), generator=generator)
    logits = torch.randn(80, 4, generator=generator) + 2 * torch.eye(4)[labels]
    logits[:, 2:] += 3

    def wrong(biases: torch.Tensor) -> int:
        return int(((logits.double() + biases).argmax(dim=1) != labels).sum())

    found = torch.tensor(fit_biases(logits, labels, classes=[0, 1]), dtype=torch.float64)
    one = fit_bias(logits, labels, classes=[0, 1]) * torch.tensor([1.0, 1, 0, 0]).double()
    assert wrong(found) <= wrong(one) < wrong(torch.zeros(4))
    steps = torch.linspace(-8, 8, 801, dtype=torch.float64)
    for label in torch.eye(4, dtype=torch.float64):
        assert all(wrong(found + step * label) >= wrong(found) for step in steps)


def test_the_bias_of_a_class_that_is_never_right_is_finite() -> None:
    logits = torch.tensor([[5.0, 0.0], [4.0, 0.0]])
    assert fit_bias(logits, torch.tensor([0, 0]), classes=[1]) < 4
    assert fit_bias(logits, torch.tensor([1, 1]), classes=[1]) > 5


@pytest.mark.parametrize("classes", [[], [0, 1]])
def test_a_bias_is_of_some_classes(classes: list[int]) -> None:
    with pytest.raises(ValueError, match="some of all 2"):
        fit_bias(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), classes=classes)
