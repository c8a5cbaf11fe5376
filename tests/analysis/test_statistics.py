"""Intervals and tests against SciPy, and the coverage of the intervals."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from selfkd.analysis.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_interval,
    paired_p,
    ratio_interval,
)


@pytest.mark.parametrize("n", [3, 4, 10])
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


@pytest.mark.parametrize("seeds", [3, 4, 5])
def test_intervals_of_means_have_their_coverage(seeds: int) -> None:
    rng = np.random.default_rng(0)
    held = [
        interval.low <= 0.3 <= interval.high
        for interval in (mean_interval(rng.normal(0.3, 0.1, seeds).tolist()) for _ in range(4000))
        if interval.low is not None and interval.high is not None
    ]
    assert len(held) == 4000
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_at_the_ends_of_a_ratio_the_paired_test_has_its_level() -> None:
    a, b = [0.6, 0.9, 0.7, 0.8], [1.3, 1.2, 1.5, 1.4]
    found = ratio_interval(a, b)
    assert found is not None
    assert found.value == pytest.approx(np.mean(a) / np.mean(b))
    for end in (found.low, found.high):
        assert end is not None
        p = stats.ttest_rel(a, np.multiply(b, end)).pvalue
        assert p == pytest.approx(0.05, abs=1e-9)


def test_intervals_of_ratios_have_their_coverage() -> None:
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


def test_a_ratio_to_an_insignificant_denominator_has_no_interval() -> None:
    found = ratio_interval([0.1, 0.2, 0.1], [0.5, -0.4, 0.3])
    assert found is not None
    assert (found.low, found.high) == (None, None)
    assert ratio_interval([0.1, 0.2], [-0.1, 0.05]) is None
    single = ratio_interval([0.1], [0.2])
    assert single is not None
    assert (single.value, single.low) == (0.5, None)


@pytest.mark.parametrize("n", [3, 4, 10])
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


def test_holm_rejects_falsely_in_at_most_one_family_of_twenty() -> None:
    uniform = np.random.default_rng(0).random((4000, 5))
    assert np.mean([min(holm(row.tolist())) <= 0.05 for row in uniform]) < 0.06


@pytest.mark.parametrize("n", [3, 4, 10])
def test_the_interval_of_paired_differences_is_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.96, 0.01, n).tolist(), rng.normal(0.95, 0.01, n).tolist()
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_interval(a, b)
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_equal_differences_have_no_interval() -> None:
    """One image of 1,197 more on every seed: there is no estimate of the spread."""
    other = [1149 / 1197, 1153 / 1197, 1160 / 1197]
    one_more = np.float32(np.add(other, 1 / 1197)).tolist()  # as a float32 mean has it
    found = paired_interval(one_more, other)
    assert found.value == pytest.approx(1 / 1197, rel=1e-3)
    assert (found.low, found.high) == (None, None)
    assert mean_interval([0.9, 0.9]) == Interval(0.9)
    assert paired_interval([0.9], [0.8]).low is None


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="values must be pairs, got 2 and 1"):
        paired_interval([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="values must be pairs, got 0 and 0"):
        paired_interval([], [])


def sure(interval: Interval) -> bool:
    return (
        interval.low is not None
        and interval.high is not None
        and not (interval.low <= 0 <= interval.high)
    )


@pytest.mark.parametrize("seeds", [3, 4, 5])
@pytest.mark.parametrize("gain", [0.0, 0.004])
def test_paired_intervals_have_their_coverage(seeds: int, gain: float) -> None:
    """With a common effect of the seed on both accuracies, and one on each of them."""
    rng = np.random.default_rng(seeds)
    held = []
    for _ in range(4000):
        shared = 0.96 + rng.normal(0, 0.004, seeds)
        student = shared + gain + rng.normal(0, 0.003, seeds)
        found = paired_interval(student.tolist(), (shared + rng.normal(0, 0.003, seeds)).tolist())
        assert found.low is not None
        assert found.high is not None
        held.append(found.low <= gain <= found.high)
    assert 0.94 < np.mean(held) < 0.96


@pytest.mark.parametrize("seeds", [3, 4, 5])
@pytest.mark.parametrize("images", [100, 360, 1197, 10_000])
@pytest.mark.parametrize("spread", [0.001, 0.004])
def test_without_a_gain_there_is_seldom_evidence(seeds: int, images: int, spread: float) -> None:
    """Accuracies as multiples of 1 / images: what is called better or worse is not."""
    rng = np.random.default_rng(seeds)
    a, b = np.round((0.96 + rng.normal(0, spread, (2, 3000, seeds))) * images) / images
    found = [paired_interval(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.mean([sure(interval) for interval in found]) <= 0.06


def test_mcnemar_is_scipys_exact_binomial_test() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * stats.binom.cdf(2, 12, 0.5))
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    with pytest.raises(ValueError, match="counts must be at least 0, got -1 and 2"):
        mcnemar(-1, 2)


@pytest.mark.parametrize("disagree", [0.02, 0.05])
def test_mcnemar_seldom_rejects_for_equally_good_models(disagree: float) -> None:
    rng = np.random.default_rng(0)
    apart = rng.binomial(1200, disagree, 1000)
    first = rng.binomial(apart, 0.5)
    found = [mcnemar(int(b), int(n - b)) for b, n in zip(first, apart, strict=True)]
    assert 0.01 < np.mean(np.less(found, 0.05)) <= 0.06


def test_bootstrap_over_images_is_that_of_the_binomial() -> None:
    """Means of resampled hits are binomial: the ends are quantiles of that, up to resampling."""
    found = bootstrap_interval([1.0] * 900 + [0.0] * 100)
    assert found.value == 0.9
    low, high = stats.binom(1000, 0.9).ppf([0.025, 0.975]) / 1000
    assert found.low == pytest.approx(low, abs=0.0015)
    assert found.high == pytest.approx(high, abs=0.0015)
    assert found == bootstrap_interval([1.0] * 900 + [0.0] * 100)


def test_equal_hits_have_no_interval() -> None:
    assert bootstrap_interval([1.0, 1.0, 1.0]) == Interval(1.0)
    with pytest.raises(ValueError, match="values must be at least one, got none"):
        bootstrap_interval([])


@pytest.mark.parametrize(("images", "accuracy"), [(300, 0.9), (600, 0.96)])
def test_intervals_over_images_have_their_coverage(images: int, accuracy: float) -> None:
    rng = np.random.default_rng(7)
    held = []
    for _ in range(400):
        hits = (rng.random(images) < accuracy).astype(float)
        found = bootstrap_interval(hits)
        assert found.low is not None
        assert found.high is not None
        held.append(found.low <= accuracy <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("size", [1e150, 1e200, 1e308])
def test_huge_values_do_not_overflow(size: float) -> None:
    values, others = [0.5, 0.75, 1.0], [0.25, 0.5, 0.125]
    huge, huge_others = [size * value for value in values], [size * value for value in others]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_interval(huge)
        paired = paired_interval(huge, huge_others)
        ratio = ratio_interval(huge, huge_others)
        p = paired_p(huge, huge_others)
    for interval, expected in (
        (found, mean_interval(values)),
        (paired, paired_interval(values, others)),
    ):
        assert interval.value / size == pytest.approx(expected.value)
        if interval.low is not None and interval.high is not None:
            assert expected.low is not None
            assert expected.high is not None
            assert interval.low / size == pytest.approx(expected.low)
            assert interval.high / size == pytest.approx(expected.high)
        else:
            assert size == 1e308  # an end is beyond the largest float
    expected_ratio = ratio_interval(values, others)
    assert ratio is not None
    assert expected_ratio is not None
    assert ratio.value == pytest.approx(expected_ratio.value)
    assert p == pytest.approx(paired_p(values, others))
