"""The capacity curve: tests as SciPy's, corrected for the number of sizes; words for each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from selfkd.analysis.capacity import compare_size, describe_curve, judged, mean_gain
from selfkd.results import Evaluation, Size


def measured(values: Sequence[float]) -> list[Evaluation]:
    names = ("test_accuracy", "val_accuracy")
    return [
        Evaluation(hash="", metrics={**dict.fromkeys(names, v), "test_nll": 1 - v}) for v in values
    ]


def compared(labels: Sequence[float], distilled: Sequence[float], teacher: float) -> Size:
    return compare_size(measured(labels), measured(distilled), teacher, metric="test_accuracy")


def size(parameters: int, gain: float, *, room: float = 0.05, seeds: int = 5) -> Size:
    """A size that gains so much, and whose labels only are so far below the teacher."""
    rng = np.random.default_rng(parameters)
    labels = 0.9 + rng.normal(0, 0.002, seeds)
    distilled = labels + gain + rng.normal(0, 0.002, seeds)
    found = compared(labels.tolist(), distilled.tolist(), 0.9 + room)
    return replace(found, value=parameters, parameters=parameters)


def curve(*sizes: Size) -> tuple[list[str], str]:
    """The verdicts of sizes, and what is said of all."""
    found = judged(sizes)
    return [each.verdict for each in found], "\n".join(describe_curve(found, mean_gain(found)))


def test_a_size_is_compared_by_the_paired_t_test() -> None:
    labels, distilled = (0.90, 0.92, 0.91, 0.93), (0.93, 0.94, 0.95, 0.94)
    found = compared(labels, distilled, 0.96)
    expected = stats.ttest_rel(distilled, labels)
    assert found.p == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((ends.low, ends.high))
    assert found.difference.value == pytest.approx(0.025)
    assert found.room.value == pytest.approx(0.96 - 0.915)
    assert found.labels.runs == labels
    assert found.distilled.metrics["val_accuracy"] == pytest.approx(0.94)


def test_sizes_are_compared_by_the_metric_of_their_task() -> None:
    rows = measured([0.9, 0.8])
    found = compare_size(rows, rows, 0.3, metric="test_nll")
    assert found.labels.runs == pytest.approx((0.1, 0.2))
    assert found.room.value == pytest.approx(0.3 - 0.15)


def test_helps_in_the_middle() -> None:
    sizes = [size(600, 0.0), size(3000, 0.02), size(12_000, 0.02), size(50_000, 0.0, room=0.0)]
    verdicts, text = curve(*sizes)
    assert verdicts == ["no evidence", "helps", "helps", "no evidence"]
    assert text.splitlines()[0] == (
        "distillation helps from 3 k to 12 k parameters; no evidence outside"
    )
    assert "on average over the 4 sizes: +1." in text
    assert "\n50 k parameters: labels alone are not evidently below the teacher" in text
    assert "\n600 parameters: below the teacher with labels alone and not evidently helped" in text


def test_the_mean_gain_is_over_seeds_of_means_over_sizes() -> None:
    sizes = [size(1000, 0.02, seeds=4), size(2000, 0.01, seeds=4)]
    gains = np.array([np.subtract(s.distilled.runs, s.labels.runs) for s in sizes])
    expected = stats.ttest_1samp(gains.mean(axis=0), 0).confidence_interval()
    found = mean_gain(sizes)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert mean_gain([*sizes, size(3000, 0.0, seeds=3)]) is None


def test_what_only_looks_clear_alone_is_said() -> None:
    sizes = [size(1000 * (n + 1), 0.0) for n in range(6)]
    sizes[2] = replace(sizes[2], p=0.03)
    verdicts, text = curve(*sizes)
    assert set(verdicts) == {"no evidence"}
    assert "3 k parameters: the interval leaves out 0, but among 6 sizes looked at" in text


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([0.02, 0.02, 0.02], "distillation helps from 1 k to 3 k parameters"),
        ([0.02, 0.0, 0.02], "distillation helps at 1 k parameters and at 3 k parameters; no ev"),
        ([-0.02, 0.02, 0.02], "distillation helps from 2 k to 3 k parameters; distillation hurts"),
        ([-0.02, -0.02, 0.0], "distillation hurts from 1 k to 2 k parameters; no evidence outside"),
        (
            [0.0, 0.0, 0.0],
            "no evidence that distillation helps at any one size from 1 k to 3 k parameters",
        ),
    ],
)
def test_in_words(gains: list[float], words: str) -> None:
    _, text = curve(*(size(1000 * (n + 1), gain) for n, gain in enumerate(gains)))
    assert text.startswith(words)
    if min(gains) > 0:
        assert "no evidence" not in text


def test_one_seed_says_nothing() -> None:
    verdicts, text = curve(size(1000, 0.02, seeds=1), size(2000, 0.02, seeds=1))
    assert verdicts == ["unknown", "unknown"]
    assert text == "one seed: no interval, so no verdict on where distillation helps"


def test_equal_differences_are_no_evidence() -> None:
    verdicts, _ = curve(compared([0.5, 0.5], [0.75, 0.75], 0.9))
    assert verdicts == ["no evidence"]


def test_looking_at_many_sizes_finds_no_more_by_chance() -> None:
    """Of families of 8 sizes without any gain at most 5 % claim one, and half of them without."""
    claimed = single = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        pairs = [rng.normal(0.9, 0.01, (2, 5)).tolist() for _ in range(8)]
        sizes = judged([compared(a, b, 1.0) for a, b in pairs])
        claimed += any(each.verdict != "no evidence" for each in sizes)
        single += any(each.p is not None and each.p <= 0.05 for each in sizes)
    assert claimed / 200 < 0.08
    assert single / 200 > 0.25
