"""What a smaller model keeps of the score of a larger one, beside what it keeps of its size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfkd.analysis.statistics import mean_interval, ratio_interval
from selfkd.analysis.verdicts import format_difference
from selfkd.results import Interval, find_metric


def score_kept(values: Sequence[float], reference: float | None, *, metric: str) -> Interval | None:
    """Return which share of a larger model's score is kept, a plain ratio of the two.

        mean(values) / reference

    Chance is a part of both: of ten classes alike a model that guesses keeps 10.5 % of an accuracy
    of 95 %. What is kept above that of labels alone is another figure, the share of the gain.

    Args:
        values: Scores of the smaller model, one a seed.
        reference: Score of the larger one.
        metric: Name of the metric.

    Returns:
        Share and its interval over the seeds, which is about these seeds and this one reference;
        None where less of the metric is better or it is no fraction, as a ratio says nothing then.

    >>> score_kept([0.95], 0.96, metric="accuracy").value
    0.9895833333333334
    >>> score_kept([0.3], 0.2, metric="nll") is None
    True
    """
    found = find_metric(metric)
    known = reference is not None and math.isfinite(reference) and all(map(math.isfinite, values))
    if not (found.is_fraction and found.mode == "max" and known and reference and values):
        return None
    share = ratio_interval(values, [reference] * len(values))
    if share is not None and share.low == share.high:  # the same on all seeds
        return Interval(share.value)
    return share


def size_kept(parameters: float | None, of: float | None) -> float | None:
    """Return the size of a model in sizes of a larger one; None where one is not known.

    >>> size_kept(3, 4)
    0.75
    """
    return parameters / of if parameters and of else None


def describe_kept(
    name: str,
    other: str,
    values: Sequence[float],
    reference: float | None,
    *,
    metric: str,
    size: float | None,
    of: str = "parameters",
) -> str:
    """Return what a smaller model keeps of score and size in words; empty where it is not known.

    Args:
        name: Name of the smaller model.
        other: Name of the larger one.
        values: Test scores of the smaller model, one a seed.
        reference: Test score of the larger one.
        metric: Name of the metric.
        size: Size of the smaller model in sizes of the larger one.
        of: What the size is of.

    >>> describe_kept("the student", "the teacher", [0.95], 0.96, metric="accuracy", size=0.6)
    "the student keeps 98.96 % of the teacher's test accuracy at 60 % of its parameters"
    >>> describe_kept("the student", "the teacher", [1.5], 1.25, metric="nll", size=0.0123)
    "the student has +0.250 nats beside the teacher's test NLL at 1.23 % of its parameters"
    """
    found = find_metric(metric)
    if reference is None or not values or not all(map(math.isfinite, (reference, *values))):
        return ""
    share = score_kept(values, reference, metric=metric)
    if share is not None:
        score = f"keeps {format_difference(share, form=share_text)} of"
    else:
        apart = mean_interval([value - reference for value in values])
        score = f"has {format_difference(apart, form=found.difference)} beside"
    text = f"{name} {score} {other}'s test {found.label}"
    return text if size is None else f"{text} at {size_text(size)} of its {of}"


def share_text(value: float) -> str:
    """Return a share in percent, without a sign.

    >>> share_text(0.72)
    '72.00 %'
    """
    return f"{value:.2%}".replace("%", " %")


def size_text(value: float) -> str:
    """Return a share of a size in percent, in three digits.

    >>> size_text(0.6), size_text(0.01234), size_text(12.5)
    ('60 %', '1.23 %', '1,250 %')
    """
    return f"{100 * value:,.0f} %" if value >= 1 else f"{100 * value:.3g} %"
