"""Differences in words: the same for a gain, a loss, and no evidence of either."""

from __future__ import annotations

import math

import pytest

from selfkd.analysis.verdicts import (
    describe_difference,
    is_better,
    number,
    points,
    sparkline,
)
from selfkd.results import Interval, find_metric

PLAIN = find_metric("f1").difference


@pytest.mark.parametrize(
    ("found", "pairs", "words"),
    [
        (
            Interval(0.004, 0.001, 0.007),
            "5 paired seeds",
            "B is better than A: +0.40 points [+0.10, +0.70], 5 paired seeds",
        ),
        (
            Interval(-0.004, -0.007, -0.001),
            "5 paired seeds",
            "B is worse than A: -0.40 points [-0.70, -0.10], 5 paired seeds",
        ),
        (
            Interval(-0.001, -0.006, 0.004),
            "5 paired seeds",
            "no evidence that B is better than A (difference -0.10 points [-0.60, +0.40], "
            "5 paired seeds)",
        ),
        (
            Interval(0.004, 0.0, 0.008),  # 0 is in it
            "5 paired seeds",
            "no evidence that B is better than A (difference +0.40 points [+0.00, +0.80], "
            "5 paired seeds)",
        ),
        (
            Interval(0.05),
            "1 paired seed",
            "no evidence that B is better than A (difference +5.00 points, 1 paired seed, "
            "so no interval)",
        ),
        (
            Interval(0.001),
            "3 paired seeds",
            "no evidence that B is better than A (difference +0.10 points, 3 paired seeds, "
            "the same in all: no interval)",
        ),
    ],
)
def test_a_difference_in_words(found: Interval, pairs: str, words: str) -> None:
    assert describe_difference("B", "A", found, pairs) == words


def test_less_may_be_better() -> None:
    loss = Interval(-0.2, -0.3, -0.1)
    assert is_better(loss, mode="min")
    assert not is_better(loss)
    assert (
        describe_difference("B", "A", loss, "3 paired seeds", mode="min", form=PLAIN)
        == "B is better than A: -0.2 [-0.3, -0.1], 3 paired seeds"
    )
    gain = Interval(0.2, 0.1, 0.3)
    assert describe_difference("B", "A", gain, "x", mode="min", form=PLAIN).startswith(
        "B is worse than A"
    )


def test_without_a_difference_there_is_no_evidence() -> None:
    assert not is_better(None)
    assert not is_better(Interval(1.0))


@pytest.mark.parametrize(
    ("metric", "text"),
    [("test_accuracy", "+1.00 points"), ("val_nll", "+0.010 nats"), ("loss", "+0.01")],
)
def test_a_difference_has_the_unit_of_its_metric(metric: str, text: str) -> None:
    assert find_metric(metric).difference(0.01) == text


def test_sparkline_is_as_long_as_its_values_and_in_their_order() -> None:
    assert sparkline([3, 1, 2]) == "█▁▅"
    assert sparkline([0.5, 0.5]) == "▄▄"
    assert sparkline([1]) == "▄"
    assert sparkline([0, 0]) == "▄▄"
    assert sparkline([-1.7e308, 0, 1.7e308]) == "▁▅█"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_a_dash(value: float) -> None:
    shown = [number(value, ".2f"), points(value), PLAIN(value)]
    assert shown == ["–", "– points", "–"]
