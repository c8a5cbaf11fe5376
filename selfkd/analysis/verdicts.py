"""Differences and means in words, the same for a gain, a loss and no evidence of either."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from selfkd.results import (
    EnsembleSummary,
    Facts,
    GenerationsSummary,
    Interval,
    Mode,
    find_metric,
)

NOT_COMPARED = (
    "not compared with labels only, as confirm.baseline is false: resume with "
    "--set confirm.baseline=true to train the baseline"
)
"""What is said of a run without a labels-only baseline in place of a verdict."""
SPARKS = "▁▂▃▄▅▆▇█"


def sentences_of(summary: EnsembleSummary | GenerationsSummary) -> tuple[str, ...]:
    """Return the verdict of a run in words, and that it has no labels-only baseline if so."""
    found = summary.verdict.sentences if summary.verdict is not None else ()
    return (*found, NOT_COMPARED) if summary.alone else found


def resolution(facts: Facts, metric: str, split: str) -> float:
    """Return the smallest difference of an accuracy on a split; 0 of other metrics.

    >>> resolution(Facts(items={"test": 50}), "accuracy", "test")
    0.02
    """
    items = facts.count(split)
    return 1 / items if find_metric(metric).is_fraction and items else 0.0


def number(value: float, form: str) -> str:
    """Return a number in a format; a dash for NaN and infinity.

    >>> number(0.5, ".2f"), number(math.nan, ".2f")
    ('0.50', '–')
    """
    return format(value, form) if math.isfinite(value) else "–"


def points(value: float) -> str:
    """Return a difference of fractions, in points: hundredths.

    >>> points(0.00412)
    '+0.41 points'
    """
    return find_metric("accuracy").difference(value)


def format_difference(interval: Interval, *, form: Callable[[float], str] = points) -> str:
    """Return a difference with its interval, if it has one.

    >>> format_difference(Interval(0.004, 0.001, 0.007))
    '+0.40 points [+0.10, +0.70]'
    >>> format_difference(Interval(-0.26, -0.405, -0.115), form=find_metric("nll").difference)
    '-0.260 nats [-0.405, -0.115]'
    """
    if interval.low is None or interval.high is None:
        return form(interval.value)
    low, high = (form(end).partition(" ")[0] for end in (interval.low, interval.high))
    return f"{form(interval.value)} [{low}, {high}]"


def is_better(interval: Interval | None, *, mode: Mode = "max") -> bool:
    """Say whether the interval of a difference is evidence of a gain: all of it is above 0.

    Where less is better, all of it is below 0.

    >>> is_better(Interval(0.004, 0.001, 0.007))
    True
    """
    if interval is None or interval.low is None or interval.high is None:
        return False
    return interval.low > 0 if mode == "max" else interval.high < 0


def describe_difference(
    name: str,
    other: str,
    difference: Interval,
    pairs: str,
    *,
    mode: Mode = "max",
    form: Callable[[float], str] = points,
) -> str:
    """Return a difference in words.

    Args:
        name: Name of what may be better.
        other: Name of what it is compared with.
        difference: Difference of the first less the second.
        pairs: Pairs behind the difference, such as `5 paired seeds`.
        mode: Whether more is better, or less.
        form: Format of a difference.

    >>> found = Interval(-0.001, -0.006, 0.004)
    >>> describe_difference("run b", "run a", found, "5 paired seeds")
    'no evidence that run b is better than run a (difference -0.10 points [-0.60, +0.40], \
5 paired seeds)'
    >>> found = Interval(0.004, 0.001, 0.007)
    >>> describe_difference("run b", "run a", found, "5 paired seeds")
    'run b is better than run a: +0.40 points [+0.10, +0.70], 5 paired seeds'
    """
    value = format_difference(difference, form=form)
    if is_better(difference, mode=mode):
        return f"{name} is better than {other}: {value}, {pairs}"
    if is_better(difference.reversed(), mode=mode):
        return f"{name} is worse than {other}: {value}, {pairs}"
    if difference.low is None:
        single = re.search(r"\b1 paired", pairs)
        pairs += ", so no interval" if single else ", the same in all: no interval"
    return f"no evidence that {name} is better than {other} (difference {value}, {pairs})"


def sparkline(values: Sequence[float]) -> str:
    """Return a line of bars, from the lowest value to the highest.

    >>> sparkline([0.1, 0.2, 0.3])
    '▁▅█'
    """
    low, high = min(values), max(values)
    if high == low:
        return SPARKS[3] * len(values)
    top = len(SPARKS) - 1
    size = 1.0 if math.isfinite(high - low) else max(abs(low), abs(high))
    span = high / size - low / size
    return "".join(
        SPARKS[round((value / size - low / size) / span * top + 1e-9)] for value in values
    )


def count(number: int, noun: str) -> str:
    """Return a number of things in words.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def short(number: float) -> str:
    """Return a number in three digits.

    >>> short(24_100), short(640)
    ('24.1 k', '640')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def join(parts: Sequence[str]) -> str:
    """Return an enumeration.

    >>> join(["a", "b", "c"]), join(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


def ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers in words, three and more in a row as a range.

    >>> ranges([1, 2, 3, 5]), ranges([2, 4, 5])
    ('1 to 3 and 5', '2, 4 and 5')
    """
    rows: list[list[int]] = []
    for each in numbers:
        if rows and rows[-1][-1] == each - 1:
            rows[-1].append(each)
        else:
            rows.append([each])
    return join(
        [
            text
            for row in rows
            for text in ([f"{row[0]} to {row[-1]}"] if row[2:] else [str(each) for each in row])
        ]
    )


def describe_other_data(name: str) -> str:
    """Return what is to be said of a model that may have seen what it is measured on."""
    return (
        f"{name} may have been trained on other data than this run's training split: where it was "
        "in this run's validation or test split, its metrics are optimistic"
    )
