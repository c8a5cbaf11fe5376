"""Intervals and tests: what a difference between two ways of training, or two models, is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfkd.results import Interval

CONFIDENCE = 0.95
RESAMPLES = 1999
SAME = 1e-6  # of their size: values this close are equal, as far as single precision tells


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
        Without ends for a single value, and where all are the same: that says nothing of the
        spread. (Accuracies are steps of one image; two differences are often equal by chance.)

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
    return _t_interval(values, float(np.abs(values).max()), confidence)


def paired_interval(
    values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the mean difference of paired runs with the interval of the paired t test.

        d = mean(a - b) ± t(n - 1) s(a - b) / sqrt(n)

    What a pair shares, such as its seed, drops out of the difference.

    Args:
        values: a, one a seed.
        others: b, on the same seeds in the same order.
        confidence: of the interval.

    Returns:
        Without ends as `mean_interval`. It leaves out 0 exactly where `scipy.stats.ttest_rel` has
        p < 1 - confidence.

    Raises:
        ValueError: samples of different lengths, or none.

    Reference:
        Student, "The probable error of a mean", Biometrika, 1908,
        https://doi.org/10.1093/biomet/6.1.1

    >>> interval = paired_interval([0.93, 0.95, 0.94], [0.90, 0.93, 0.92])
    >>> round(interval.value, 4), round(interval.low, 4), round(interval.high, 4)
    (0.0233, 0.009, 0.0377)
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"values must be pairs, got {len(values)} and {len(others)}")
    differences: list[float] = np.subtract(values, others).tolist()
    return _t_interval(differences, float(np.abs([values, others]).max()), confidence)


def _t_interval(values: Sequence[float], size: float, confidence: float) -> Interval:
    mean = float(np.mean(values))
    if np.ptp(values) <= SAME * size:
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


def mean_over_images(
    values: Sequence[float] | NDArray[np.float64], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Return a mean over images with its bootstrap interval (percentile method).

        mean of n values drawn with replacement, 1999 times; the middle `confidence` of those means

    Of one model's hits (1 for a right answer, else 0) that is its accuracy; of the differences
    between two models' hits, image by image, it is the paired difference. It speaks of these
    models on other images, not of other seeds.

    Args:
        values: one an image.
        confidence: of the interval.
        seed: of the draws.

    Returns:
        Without ends where all values are the same.

    Raises:
        ValueError: no values.

    Reference:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics, 1979,
        https://doi.org/10.1214/aos/1176344552

    >>> interval = mean_over_images([1.0] * 90 + [0.0] * 10)
    >>> interval.value, 0.8 < interval.low < 0.9 < interval.high < 1
    (0.9, True)
    """
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample):
        raise ValueError("values must be at least one, got none")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean)
    from scipy.stats import bootstrap  # a second to import: only when it is used

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
    """Return the exact p-value of McNemar's test: do two models err equally often?

        p = P(|X - n / 2| >= |b - n / 2|),    X ~ Binomial(n, 1/2),    n = b + c

    Args:
        only_first: b, images that only the first model has right.
        only_second: c, images that only the second has right.

    Returns:
        In (0, 1]; 1 where no image tells them apart.

    Raises:
        ValueError: a count below 0.

    Reference:
        McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", Psychometrika, 1947, https://doi.org/10.1007/BF02295996

    >>> round(mcnemar(10, 2), 4)
    0.0386
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must be at least 0, got {only_first} and {only_second}")
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest  # a second to import: only when it is used

    return float(binomtest(only_first, only_first + only_second).pvalue)


def _t(n: int, confidence: float) -> float:
    from scipy.stats import t  # a second to import: only when it is used

    return float(t.ppf((1 + confidence) / 2, n - 1))
