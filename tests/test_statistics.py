"""Intervals against SciPy, and how often they hold what they claim to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selfkd.statistics import holm, mean_interval, paired_p, ratio_interval


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_of_a_mean_is_scipys(n: int, confidence: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, n).tolist()
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    found = mean_interval(values, confidence=confidence)
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_value_has_no_interval() -> None:
    found = mean_interval([0.5])
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="values must be at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="must be pairs, got 2 and 1"):
        ratio_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_means_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    rng = np.random.default_rng(0)
    held = [
        interval.low <= 0.3 <= interval.high
        for interval in (mean_interval(rng.normal(0.3, 0.1, seeds).tolist()) for _ in range(4000))
        if interval.low is not None and interval.high is not None
    ]
    assert len(held) == 4000
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_the_ends_of_a_ratio_are_where_a_paired_test_turns() -> None:
    a, b = [0.6, 0.9, 0.7, 0.8], [1.3, 1.2, 1.5, 1.4]
    found = ratio_interval(a, b)
    assert found is not None
    assert found.value == pytest.approx(np.mean(a) / np.mean(b))
    for end in (found.low, found.high):
        assert end is not None
        p = stats.ttest_rel(a, np.multiply(b, end)).pvalue
        assert p == pytest.approx(0.05, abs=1e-9)


def test_intervals_of_ratios_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(4000):
        labels = rng.normal(0.90, 0.004, 4)  # one teacher for all seeds, as in a run
        student = labels + rng.normal(0.02, 0.003, 4)
        found = ratio_interval((student - labels).tolist(), (0.94 - labels).tolist())
        assert found is not None
        if found.low is not None and found.high is not None:
            held.append(found.low <= 0.5 <= found.high)
    assert len(held) > 3900
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_a_ratio_to_what_may_be_nothing_has_no_interval() -> None:
    found = ratio_interval([0.1, 0.2, 0.1], [0.5, -0.4, 0.3])
    assert found is not None
    assert (found.low, found.high) == (None, None)
    assert ratio_interval([0.1, 0.2], [-0.1, 0.05]) is None
    single = ratio_interval([0.1], [0.2])
    assert single is not None
    assert (single.value, single.low) == (0.5, None)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_paired_p_is_scipys(n: int) -> None:
    first, second = np.random.default_rng(n).normal(0, 1, (2, n)).tolist()
    assert paired_p(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue)


def test_without_spread_there_is_no_test() -> None:
    assert paired_p([0.5], [0.25]) is None
    assert paired_p([0.3, 0.4], [0.1, 0.2]) is None
    with pytest.raises(ValueError, match="values must be pairs, got 2 and 1"):
        paired_p([0.1, 0.2], [0.1])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_claims_falsely_in_at_most_one_family_of_twenty() -> None:
    uniform = np.random.default_rng(0).random((4000, 5))
    assert np.mean([min(holm(row.tolist())) <= 0.05 for row in uniform]) < 0.06
