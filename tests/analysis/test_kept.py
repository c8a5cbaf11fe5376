"""What is kept of a score, a plain ratio where that says something, beside what is kept of size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from selfkd.analysis.kept import describe_kept, score_kept


def test_the_interval_is_that_of_the_seeds_over_one_reference() -> None:
    values = [0.90, 0.92, 0.93, 0.91]
    found = score_kept(values, 0.95, metric="accuracy")
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2 / 0.95
    assert found is not None
    assert found.value == pytest.approx(np.mean(values) / 0.95)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


@pytest.mark.parametrize("values", [[0.9], [0.9, 0.91], [0.9, 0.9, 0.9]])
def test_too_few_seeds_or_equal_ones_have_no_interval(values: list[float]) -> None:
    found = score_kept(values, 0.95, metric="accuracy")
    assert found is not None
    assert (found.low, found.high) == (None, None)


@pytest.mark.parametrize(
    ("values", "reference", "metric"),
    [
        ([1.2, 1.3], 1.1, "nll"),  # less is better
        ([3.3], 3.0, "perplexity"),
        ([0.5], 0.4, "f1_of_mine"),  # perhaps no fraction, perhaps below 0
        ([0.5], 0.0, "accuracy"),
        ([0.5], None, "accuracy"),
        ([], 0.9, "accuracy"),
        ([math.nan], 0.9, "accuracy"),
    ],
)
def test_a_ratio_that_says_nothing_is_not_made(
    values: list[float], reference: float | None, metric: str
) -> None:
    assert score_kept(values, reference, metric=metric) is None


@pytest.mark.parametrize(
    ("values", "reference", "metric", "size", "text"),
    [
        ([0.97], 1.0, "accuracy", 0.6,
         "a keeps 97.00 % of b's test accuracy at 60 % of its parameters"),
        ([0.97], 1.0, "accuracy", None, "a keeps 97.00 % of b's test accuracy"),
        ([0.93, 0.95, 0.94], 0.94, "accuracy", 2.0,
         "a keeps 100.00 % [97.36, 102.64] of b's test accuracy at 200 % of its parameters"),
        ([1.5, 1.6, 1.55], 1.25, "nll", 0.25,
         "a has +0.300 nats [+0.176, +0.424] beside b's test NLL at 25 % of its parameters"),
        ([0.9], None, "accuracy", 0.6, ""),
        ([math.nan], 0.9, "accuracy", 0.6, ""),
        ([], 0.9, "accuracy", 0.6, ""),
    ],
)  # fmt: skip
def test_what_is_kept_in_words(
    values: list[float], reference: float | None, metric: str, size: float | None, text: str
) -> None:
    assert describe_kept("a", "b", values, reference, metric=metric, size=size) == text
