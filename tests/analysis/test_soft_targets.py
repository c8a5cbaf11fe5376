"""What soft targets hold beside the labels, against NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from selfkd.analysis import soft_targets
from selfkd.analysis.soft_targets import measure_targets
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits, sparsify

CLASSES, ITEMS = 7, 60
GENERATOR = torch.Generator().manual_seed(0)
MEMBERS = (4 * torch.randn(3, ITEMS, CLASSES, generator=GENERATOR)).half()
LABELS = torch.randint(CLASSES - 1, (ITEMS,), generator=GENERATOR)  # the last has no item
LABELS[5] = -100
KNOWN = (LABELS >= 0).numpy()
WEIGHTS = [2.0, 1.0, 1.0]

Array = NDArray[Any]


def mean_of(average: str, temperature: float) -> Array:
    """Return the probabilities of the average of the members."""
    z, w = MEMBERS.double().numpy() / temperature, np.array(WEIGHTS)[:, None, None] / 4
    return (softmax(z, 2) * w).sum(0) if average == "probabilities" else softmax((z * w).sum(0), 1)


def wrong_of(p: Array) -> Array:
    wrong = p[KNOWN].copy()
    wrong[np.arange(len(wrong)), LABELS[KNOWN]] = 0
    return wrong


@pytest.fixture(params=[1, 2**21])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_targets, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_of_members_the_average_is_measured(average: Any) -> None:
    settings: dict[str, Any] = {"weights": [w / 4 for w in WEIGHTS], "average": average}
    found = measure_targets(
        lambda items: MEMBERS[:, items],
        LABELS,
        classes=CLASSES,
        temperatures=[1.0, 5.0],
        temperature=2.0,
        most=4,
        **settings,
    )
    assert (found.items, found.of) == (KNOWN.sum(), KNOWN.sum())
    for row, temperature in zip(found.softness, (1.0, 5.0), strict=True):
        p = mean_of(average, temperature)[KNOWN]
        assert row.temperature == temperature
        assert row.entropy == pytest.approx(entropy(p, base=2, axis=1).mean(), rel=1e-5)
        wrong = entropy(wrong_of(mean_of(average, temperature)), base=2, axis=1)
        assert row.wrong_entropy == pytest.approx(wrong.mean(), rel=1e-5)
        assert row.largest == pytest.approx(p.max(1).mean(), rel=1e-5)
    wrong = wrong_of(mean_of(average, 2.0))
    shares = wrong / wrong.sum(1, keepdims=True)
    for label in range(CLASSES):
        own = shares[LABELS[KNOWN].numpy() == label]
        expected = own.mean(0) if len(own) else np.zeros(CLASSES)
        assert found.shares[label] == pytest.approx(expected, abs=1e-5)
        near = [row for row in found.near if row.label == label]
        assert [row.other for row in near] == expected.argsort()[::-1][: len(near)].tolist()
        assert len(near) == (3 if len(own) else 0)
        for row in near:
            mass = wrong[LABELS[KNOWN].numpy() == label].mean(0)[row.other]
            assert row.probability == pytest.approx(mass, abs=1e-5)
    p = mean_of(average, 1.0)
    second = np.sort(p, axis=1)[:, -2]
    order = [item for item in second.argsort()[::-1] if KNOWN[item]][:4]
    assert [row.item for row in found.seconds] == order
    for row in found.seconds:
        assert row.classes == tuple(p[row.item].argsort()[::-1][:2])
        assert row.label == LABELS[row.item]
        assert row.probabilities[1] == pytest.approx(second[row.item], rel=1e-5)


@pytest.mark.usefixtures("chunk")
def test_members_disagree_by_their_choices_and_by_their_probabilities() -> None:
    found = measure_targets(
        lambda items: MEMBERS[:, items],
        LABELS,
        classes=CLASSES,
        weights=WEIGHTS,
    ).disagreement
    p = softmax(MEMBERS.double().numpy(), 2)[:, KNOWN]
    chosen, w = p.argmax(2), np.array(WEIGHTS) / 4
    apart = np.mean([chosen[a] != chosen[b] for a, b in combinations(range(3), 2)])
    mean = (p * w[:, None, None]).sum(0)
    information = entropy(mean, base=2, axis=1) - w @ entropy(p, base=2, axis=2)
    assert found is not None
    assert found.pairs == pytest.approx(apart)
    assert found.information == pytest.approx(information.mean(), rel=1e-5)
    assert found.agreement == pytest.approx((chosen == mean.argmax(1)).mean(1))


def single(k: int | None) -> Callable[[Tensor], Tensor | SparseLogits]:
    logits = MEMBERS[0].float()
    return lambda items: logits[items] if k is None else sparsify(logits[items], k)


def test_of_one_teacher_nobody_disagrees() -> None:
    assert measure_targets(single(None), LABELS, classes=CLASSES).disagreement is None


def test_all_but_one_of_the_logits_say_the_same_as_all() -> None:
    whole, sparse = (measure_targets(single(k), LABELS, classes=CLASSES) for k in (None, 6))
    assert [row.entropy for row in sparse.softness] == pytest.approx(
        [row.entropy for row in whole.softness], abs=2e-3
    )
    assert np.array(sparse.shares) == pytest.approx(np.array(whole.shares), abs=1e-3)
    assert not whole.notes
    assert "the 6 largest of 7 logits are cached" in sparse.notes[0]


def test_the_rest_of_the_largest_logits_is_spread_evenly() -> None:
    logits = MEMBERS[0].double().numpy()[KNOWN]
    p = softmax(logits, 1)
    for row in p:
        rest = row.argsort()[:-3]
        row[rest] = row[rest].mean()
    found = measure_targets(single(3), LABELS, classes=CLASSES, temperatures=[1.0]).softness[0]
    assert found.entropy == pytest.approx(entropy(p, base=2, axis=1).mean(), rel=1e-5)
    assert found.entropy > entropy(softmax(logits, 1), base=2, axis=1).mean()


def test_of_samples_only_shares_are_known() -> None:
    drawn = torch.tensor([[[0, 1, 1, 2]], [[2, 2, 2, 2]]]).expand(2, 1, 4)
    labels = torch.tensor([0])
    for indices, expected in ((drawn[0], (2 / 3, 1 / 3)), (drawn, (2 / 7, 5 / 7))):
        found = measure_targets(
            lambda items, indices=indices: SampledTargets(indices), labels, classes=3
        )
        assert {row.other: row.share for row in found.near} == pytest.approx(
            {1: expected[0], 2: expected[1]}, abs=1e-5
        )
        assert (found.softness, found.seconds, found.disagreement) == ((), (), None)
        assert "only samples" in found.notes[0]


@pytest.mark.parametrize("classes", [40, 1200])
def test_of_many_classes_some_are_kept(classes: int) -> None:
    """The most confused pairs; of a vocabulary the nearest of the most frequent tokens."""
    labels = torch.tensor([*range(classes), 7, 7, 7, 30])
    logits = torch.zeros(len(labels), classes)
    logits[torch.arange(len(labels)), labels] = 9.0
    logits[labels == 7, 3] = 8.0
    found = measure_targets(lambda items: logits[items], labels, classes=classes)
    assert found.shares == ()
    assert found.pairs == (classes == 40)
    assert (found.near[0].label, found.near[0].other) == (7, 3)
    assert len({row.label for row in found.near}) <= 30
    assert len(found.near) <= 60


def test_of_many_items_evenly_spaced_ones_are_read() -> None:
    read: list[int] = []

    def cached(items: Tensor) -> Tensor:
        read.extend(items.tolist())
        return MEMBERS[0][items]

    found = measure_targets(cached, LABELS, classes=CLASSES, most_values=5 * CLASSES)
    assert (found.items, found.of) == (5, ITEMS - 1)
    assert read == [0, *read[1:-1], ITEMS - 1]
    assert len(read) == 5


def test_a_confident_teacher_has_finite_shares() -> None:
    logits = torch.tensor([[900.0, -60.0, -61.0]])
    found = measure_targets(lambda items: logits[items], torch.tensor([0]), classes=3)
    expected = softmax(np.array([-60.0, -61.0]))
    assert [row.share for row in found.near] == pytest.approx(expected, abs=1e-5)
    assert found.softness[0].wrong_entropy == pytest.approx(entropy(expected, base=2), rel=1e-5)
    assert log_softmax(logits.double().numpy(), 1)[0, 1] < -900


def test_without_labels_there_is_no_telling() -> None:
    with pytest.raises(ValueError, match="at least one item with a label"):
        measure_targets(single(None), torch.full((3,), -1), classes=CLASSES)
