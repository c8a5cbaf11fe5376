"""Intervals over seeds: what a difference between two ways of training is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; no ends where the sample does not bound it."""

    value: float
    low: float | None = None
    high: float | None = None


def paired_p(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Return the two-sided p-value of the paired t test (`scipy.stats.ttest_rel`).

    Args:
        values: one a seed.
        others: on the same seeds in the same order.

    Returns:
        None for a single pair, or where all differences are the same: no spread, no test.

    Raises:
        ValueError: samples of different lengths, or none.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> round(paired_p([0.93, 0.95, 0.94], [0.90, 0.93, 0.92]), 4)
    0.0198
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"values must be pairs, got {len(values)} and {len(others)}")
    differences = np.subtract(values, others)
    if np.ptp(differences) <= 1e-6 * np.abs([values, others]).max():  # equal but for rounding
        return None
    from scipy.stats import ttest_rel  # a second to import: only when it is used

    return float(ttest_rel(values, others).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many were looked at.

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= … <= p_(m)

    Calling significant what is at most 0.05 finds anything false in at most 5 % of such families
    of tests, however these depend on each other.

    Args:
        p_values: of one family, in any order.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
        Statistics, 1979, https://www.jstor.org/stable/4615733

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of independent runs with Student's t interval.

        mean ± t(n - 1) s / sqrt(n)

    Args:
        values: one a run, or paired differences, one a seed.
        confidence: of the interval.

    Returns:
        Without ends for a single value: one run says nothing of the spread.

    Raises:
        ValueError: no values.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> interval = mean_interval([0.1, 0.2, 0.3])
    >>> round(interval.value, 3), round(interval.low, 3), round(interval.high, 3)
    (0.2, -0.048, 0.448)
    """
    if not values:
        raise ValueError("values must be at least one, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean)
    half = _t(len(values), confidence) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return the ratio of two paired means with Fieller's interval.

    The ends are the r at which mean(a - r b) is just no longer different from 0 by a paired t test:

        (mean_b² - t² v_bb) r² - 2 (mean_a mean_b - t² v_ab) r + mean_a² - t² v_aa = 0

    where v are the variances and covariance of the means.

    Args:
        numerators: a, one a pair.
        denominators: b, one a pair.
        confidence: of the interval.

    Returns:
        Without ends where the denominator is not different from 0 (then any ratio may be), or for
        a single pair; None where the mean denominator is not above 0.

    Raises:
        ValueError: samples of different lengths, or none.

    Reference:
        Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B, 1954,
        https://doi.org/10.1111/j.2517-6161.1954.tb00159.x

    >>> interval = ratio_interval([1.0, 1.2, 0.9], [2.0, 2.1, 1.9])
    >>> round(interval.value, 3), round(interval.low, 3), round(interval.high, 3)
    (0.517, 0.372, 0.63)
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(
            "numerators and denominators must be pairs, got "
            f"{len(numerators)} and {len(denominators)}"
        )
    a, b = float(np.mean(numerators)), float(np.mean(denominators))
    if not b > 0:
        return None
    n = len(numerators)
    if n == 1:
        return Interval(a / b)
    (v_aa, v_ab), (_, v_bb) = np.cov(numerators, denominators) / n
    t2 = _t(n, confidence) ** 2
    leading = b * b - t2 * v_bb
    middle = a * b - t2 * v_ab
    inside = middle**2 - leading * (a * a - t2 * v_aa)
    if leading <= 0 or inside < 0:
        return Interval(a / b)
    root = math.sqrt(inside)
    return Interval(a / b, float((middle - root) / leading), float((middle + root) / leading))


def _t(n: int, confidence: float) -> float:
    from scipy.stats import t  # a second to import: only when it is used

    return float(t.ppf((1 + confidence) / 2, n - 1))
