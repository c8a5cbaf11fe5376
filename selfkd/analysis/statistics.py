"""Confidence intervals and tests of means, paired differences and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfkd.results import Interval

CONFIDENCE = 0.95
RESAMPLES = 1999
LEAST = 3
"""Fewest values that give an interval: of two it is some 180 % wide, as t(1) is 12.7."""
HUGE = 1e70  # beyond which fourth powers may overflow
SAME = 1e-6  # relative: values this close are equal in single precision


def paired_p(
    values: Sequence[float], others: Sequence[float], *, floor: float = 0.0
) -> float | None:
    """Return the two-sided p-value of the paired t test.

        p = 2 P(t(n - 1) >= |mean(d)| sqrt(n) / max(s(d), floor)),    d = a - b

    Args:
        values: Values a, one a seed.
        others: Values b of the same seeds in the same order.
        floor: Least spread of the differences, as in `mean_interval`.

    Returns:
        p-value; None for fewer than three pairs, or where there is no spread.

    Raises:
        ValueError: Samples of different lengths, or empty ones.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> round(paired_p([0.93, 0.95, 0.94], [0.90, 0.93, 0.92]), 4)
    0.0198
    """
    size, differences, largest = _differences(values, others)
    spread = _spread(differences, largest, floor / size)
    if spread is None:
        return None
    from scipy.stats import t  # slow to import

    n = len(differences)
    return 2 * float(t.sf(abs(np.mean(differences)) * math.sqrt(n) / spread, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple tests (Holm).

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= … <= p_(m)

    The probability of any false rejection in the family is at most the level, whatever the
    dependence between the tests.

    Args:
        p_values: p-values of one family of tests, in any order.

    Returns:
        Corrected p-values in the same order.

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


def mean_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, floor: float = 0.0
) -> Interval:
    """Return the mean of independent runs with Student's t interval.

        mean ± t(n - 1) max(s, floor) / sqrt(n)

    Args:
        values: Values, one a run, or paired differences, one a seed.
        confidence: Confidence level of the interval, in (0, 1).
        floor: Least spread s. Accuracies are multiples of 1 / images, so that differences are
            often equal by chance, and a spread below one image is of the rounding alone.

    Returns:
        Mean and interval; without ends for fewer than three values, and where there is no spread.

    Raises:
        ValueError: No values.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> interval = mean_interval([0.1, 0.2, 0.3])
    >>> round(interval.value, 3), round(interval.low, 3), round(interval.high, 3)
    (0.2, -0.048, 0.448)
    """
    if not values:
        raise ValueError("values must be at least one, got none")
    size, scaled = _scaled(values)
    return _t_interval(size, scaled, float(np.abs(scaled).max()), confidence, floor)


def paired_interval(
    values: Sequence[float],
    others: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    floor: float = 0.0,
) -> Interval:
    """Return the mean difference of paired runs with its t interval.

        d = mean(a - b) ± t(n - 1) max(s(a - b), floor) / sqrt(n)

    What the runs of a pair share, such as the seed, cancels in the difference.

    Args:
        values: Values a, one a seed.
        others: Values b of the same seeds in the same order.
        confidence: Confidence level of the interval, in (0, 1).
        floor: Least spread of the differences, as in `mean_interval`.

    Returns:
        Mean difference and interval; without ends as in `mean_interval`. The interval excludes 0
        exactly where `paired_p` is below 1 - confidence.

    Raises:
        ValueError: Samples of different lengths, or empty ones.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> interval = paired_interval([0.93, 0.95, 0.94], [0.90, 0.93, 0.92])
    >>> round(interval.value, 4), round(interval.low, 4), round(interval.high, 4)
    (0.0233, 0.009, 0.0377)
    """
    return _t_interval(*_differences(values, others), confidence, floor)


def _differences(
    values: Sequence[float], others: Sequence[float]
) -> tuple[float, NDArray[np.float64], float]:
    """Return a size, differences divided by it, and the largest value that they are of."""
    if len(values) != len(others) or not values:
        raise ValueError(f"values must be pairs, got {len(values)} and {len(others)}")
    size, first, second = _scaled(values, others)
    return size, first - second, float(np.abs([first, second]).max())


def _t_interval(
    size: float, scaled: NDArray[np.float64], largest: float, confidence: float, floor: float
) -> Interval:
    mean = float(np.mean(scaled)) * size
    spread = _spread(scaled, largest, floor / size)
    if spread is None:
        return Interval(mean)
    from scipy.stats import t  # slow to import

    n = len(scaled)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n) * size
    return _interval(mean, mean - half, mean + half)


def _spread(values: NDArray[np.float64], largest: float, floor: float) -> float | None:
    """Return the standard deviation; None of too few values, or where it is 0."""
    if len(values) < LEAST:
        return None
    found = 0.0 if _are_equal(values, largest) else float(np.std(values, ddof=1))
    return max(found, floor) or None


def _scaled(*samples: Sequence[float]) -> tuple[Any, ...]:
    """Return a size and samples divided by it, whose powers do not overflow."""
    largest = max(float(np.abs(sample).max()) for sample in samples)
    size = largest if largest > HUGE else 1.0
    return size, *(np.divide(sample, size) for sample in samples)


def _interval(value: float, low: float, high: float) -> Interval:
    """Return an interval; without ends where one of them overflows."""
    return Interval(value, low, high) if math.isfinite(high - low) else Interval(value)


def _are_equal(values: Sequence[float] | NDArray[np.float64], size: float) -> bool:
    """Return whether values are equal but for rounding of numbers of this size."""
    return bool(np.ptp(values) <= SAME * size)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return the ratio of two paired means with Fieller's interval.

    The ends are the ratios r between which a paired t test does not reject mean(a - r b) = 0:

        (mean_b² - t² v_bb) r² - 2 (mean_a mean_b - t² v_ab) r + mean_a² - t² v_aa = 0

    where v are the variances and the covariance of the means.

    Args:
        numerators: Values a, one a pair.
        denominators: Values b, one a pair.
        confidence: Confidence level of the interval, in (0, 1).

    Returns:
        Ratio and interval; without ends for fewer than three pairs, or where the mean denominator
        does not differ significantly from 0; None where it is not above 0.

    Raises:
        ValueError: Samples of different lengths, or empty ones.

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
    _, above, below = _scaled(numerators, denominators)
    a, b = float(np.mean(above)), float(np.mean(below))
    if not b > 0:
        return None
    n = len(numerators)
    if n < LEAST:
        return Interval(a / b)
    (v_aa, v_ab), (_, v_bb) = np.cov(above, below) / n
    from scipy.stats import t  # slow to import

    t2 = float(t.ppf((1 + confidence) / 2, n - 1)) ** 2
    leading = b * b - t2 * v_bb
    middle = a * b - t2 * v_ab
    inside = middle**2 - leading * (a * a - t2 * v_aa)
    if leading <= 0 or inside < 0:
        return Interval(a / b)
    root = math.sqrt(inside)
    return Interval(a / b, float((middle - root) / leading), float((middle + root) / leading))


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Return a mean over items with its percentile bootstrap interval (`scipy.stats.bootstrap`).

        mean of n values drawn with replacement, 1999 times; the middle `confidence` of those means

    Of a model's hits (1 for a correct prediction, else 0) it is the accuracy; of the differences
    between two models' hits, item by item, it is the paired difference. The interval is about
    these models on other items, not about other seeds.

    Args:
        values: Values, one an item.
        confidence: Confidence level of the interval, in (0, 1).
        seed: Random seed of the resampling.

    Returns:
        Mean and interval; without ends where all values are equal.

    Raises:
        ValueError: No values.

    Reference:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics, 1979,
        https://doi.org/10.1214/aos/1176344552

    >>> interval = bootstrap_interval([1.0] * 90 + [0.0] * 10)
    >>> interval.value, 0.8 < interval.low < 0.9 < interval.high < 1
    (0.9, True)
    """
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample):
        raise ValueError("values must be at least one, got none")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean)
    from scipy.stats import bootstrap  # slow to import

    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(sample)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact p-value of McNemar's test that two models err equally often.

        p = P(|X - n / 2| >= |b - n / 2|),    X ~ Binomial(n, 1/2),    n = b + c

    Args:
        only_first: Number b of images that only the first model classifies correctly.
        only_second: Number c of images that only the second model classifies correctly.

    Returns:
        p-value in (0, 1]; 1 where both counts are 0.

    Raises:
        ValueError: A count is below 0.

    Reference:
        McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", Psychometrika, 1947, https://doi.org/10.1007/BF02295996

    >>> round(mcnemar(10, 2), 4)
    0.0386
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must be at least 0, got {only_first} and {only_second}")
    less, more = sorted((only_first, only_second))
    if less == more:
        return 1.0
    from scipy.special import betainc  # slow to import, but `binomtest` five times as slow

    return min(1.0, 2 * float(betainc(more, less + 1, 0.5)))  # P(X <= less), twice
