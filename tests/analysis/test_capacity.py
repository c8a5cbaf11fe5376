"""The capacity curve: tests as SciPy's, corrected for the number of sizes; words for each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from selfkd.analysis.capacity import compare_size, describe_curve, judge_sizes
from selfkd.analysis.families import Terms
from selfkd.results import Evaluation, Size, Verdict


def measured(values: Sequence[float]) -> list[Evaluation]:
    names = ("test_accuracy", "val_accuracy")
    return [
        Evaluation(hash="", metrics={**dict.fromkeys(names, v), "test_nll": 1 - v}) for v in values
    ]


def compared(labels: Sequence[float], distilled: Sequence[float], teacher: float) -> Size:
    rows = measured(labels), measured(distilled)
    return compare_size(*rows, teacher, metric="test_accuracy", terms=Terms())


def size(parameters: int, gain: float, *, room: float = 0.05, seeds: int = 5) -> Size:
    """A size that gains so much, and whose labels only are so far below the teacher."""
    rng = np.random.default_rng(parameters)
    labels = 0.9 + rng.normal(0, 0.002, seeds)
    distilled = labels + gain + rng.normal(0, 0.002, seeds)
    found = compared(labels.tolist(), distilled.tolist(), 0.9 + room)
    return replace(found, value=parameters, parameters=parameters)


def judged(sizes: Sequence[Size]) -> tuple[list[Size], Verdict]:
    seeds = [range(len(each.labels.runs)) for each in sizes]
    return judge_sizes(sizes, seeds, terms=Terms())


def curve(*sizes: Size) -> tuple[list[str], str]:
    """The verdicts of sizes, and what is said of all."""
    found, verdict = judged(sizes)
    lines = [*verdict.sentences, *describe_curve(found)]
    return [each.verdict for each in found], "\n".join(lines)


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
    found = compare_size(rows, rows, 0.3, metric="test_nll", terms=Terms())
    assert found.labels.runs == pytest.approx((0.1, 0.2))
    assert found.room.value == pytest.approx(0.3 - 0.15)


def test_helps_in_the_middle() -> None:
    sizes = [size(600, 0.0), size(3000, 0.02), size(12_000, 0.02), size(50_000, 0.0, room=0.0)]
    verdicts, text = curve(*sizes)
    assert verdicts == ["no evidence", "helps", "helps", "no evidence"]
    headline, by_size, *_ = text.splitlines()
    assert headline.startswith(
        "distilled students of 4 sizes, taken together, are better than the same from labels only: "
        "+1."
    )
    assert by_size == (
        "distillation helps from 3 k to 12 k parameters; no evidence outside, corrected for all "
        "5 comparisons (Holm)"
    )
    assert "\n50 k parameters: labels alone are not evidently below the teacher" in text
    assert "\n600 parameters: below the teacher with labels alone and not evidently helped" in text


def test_the_headline_is_over_seeds_of_means_over_sizes() -> None:
    sizes = [size(1000, 0.02, seeds=4), size(2000, 0.01, seeds=4)]
    gains = np.array([np.subtract(s.distilled.runs, s.labels.runs) for s in sizes])
    expected = stats.ttest_1samp(gains.mean(axis=0), 0).confidence_interval()
    _, verdict = judged(sizes)
    assert verdict.difference is not None
    assert (verdict.difference.low, verdict.difference.high) == pytest.approx(
        (expected.low, expected.high)
    )
    _, fewer = judged([*sizes, size(3000, 0.0, seeds=3)])
    assert fewer.seeds == 3


def test_what_only_looks_clear_alone_is_said() -> None:
    sizes = [size(1000 * (n + 1), 0.0) for n in range(6)]
    noise = np.array([0.001, 0.0022, 0.0034, 0.0008, 0.0018])
    labels = np.full(5, 0.9)
    clear = compared(labels.tolist(), (labels + noise - 0.0005).tolist(), 0.95)
    assert clear.p is not None
    assert 0.01 < clear.p < 0.05
    sizes[2] = replace(clear, value=3000, parameters=3000)
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
    assert words in text.splitlines()[1]
    if min(gains) > 0:
        assert "no evidence" not in text


def test_one_seed_says_nothing() -> None:
    verdicts, text = curve(size(1000, 0.02, seeds=1), size(2000, 0.02, seeds=1))
    assert verdicts == ["unknown", "unknown"]
    assert text == (
        "distilled students of 2 sizes, taken together, and the same from labels only differ by "
        "+2.04 points over 1 fresh seed, too few for an interval"
    )


def test_equal_differences_are_no_evidence() -> None:
    verdicts, _ = curve(compared([0.5] * 3, [0.75] * 3, 0.9))
    assert verdicts == ["no evidence"]


def test_looking_at_many_sizes_finds_no_more_by_chance() -> None:
    """Of families of 8 sizes without any gain at most 5 % claim one, and half of them without."""
    claimed = single = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        pairs = [rng.normal(0.9, 0.01, (2, 5)).tolist() for _ in range(8)]
        sizes, verdict = judged([compared(a, b, 1.0) for a, b in pairs])
        claimed += verdict.outcome != "none" or any(each.verdict != "no evidence" for each in sizes)
        single += any(each.p is not None and each.p <= 0.05 for each in sizes)
    assert claimed / 200 < 0.08
    assert single / 200 > 0.25


def test_labels_only_are_above_the_nll_of_their_teacher() -> None:
    lines = describe_curve(judged([size(600, 0.0), size(50_000, 0.0, room=0.0)])[0], mode="min")
    assert any("alone are not evidently above the teacher" in line for line in lines)
    assert any("600 parameters: above the teacher" in line for line in lines)
