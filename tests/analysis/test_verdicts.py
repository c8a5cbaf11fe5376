"""What is found, in words: the same for a gain, a loss, and no evidence of either."""

from __future__ import annotations

from typing import Any

import pytest

from selfkd.analysis.verdicts import compare, is_better, plain, sparkline, tell_mean


def interval(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("found", "pairs", "said"),
    [
        (
            interval(0.004, 0.001, 0.007),
            "5 paired seeds",
            "B is better than A: +0.40 % [+0.10, +0.70], 5 paired seeds",
        ),
        (
            interval(-0.004, -0.007, -0.001),
            "5 paired seeds",
            "B is worse than A: -0.40 % [-0.70, -0.10], 5 paired seeds",
        ),
        (
            interval(-0.001, -0.006, 0.004),
            "5 paired seeds",
            "no evidence that B is better than A (difference -0.10 % [-0.60, +0.40], "
            "5 paired seeds)",
        ),
        (
            interval(0.004, 0.0, 0.008),  # 0 is in it
            "5 paired seeds",
            "no evidence that B is better than A (difference +0.40 % [+0.00, +0.80], "
            "5 paired seeds)",
        ),
        (
            interval(0.05, None, None),
            "1 paired seed",
            "no evidence that B is better than A (difference +5.00 %, 1 paired seed, "
            "so no interval)",
        ),
        (
            interval(0.001, None, None),
            "3 paired seeds",
            "no evidence that B is better than A (difference +0.10 %, 3 paired seeds, "
            "the same in all: no interval)",
        ),
    ],
)
def test_a_difference_in_words(found: dict[str, Any], pairs: str, said: str) -> None:
    assert compare("B", "A", found, pairs) == said


def test_less_may_be_better() -> None:
    loss = interval(-0.2, -0.3, -0.1)
    assert is_better(loss, mode="min")
    assert not is_better(loss)
    assert (
        compare("B", "A", loss, "3 paired seeds", mode="min", form=plain)
        == "B is better than A: -0.2 [-0.3, -0.1], 3 paired seeds"
    )
    gain = interval(0.2, 0.1, 0.3)
    assert compare("B", "A", gain, "x", mode="min", form=plain).startswith("B is worse than A")


def test_without_a_difference_there_is_no_evidence() -> None:
    assert not is_better(None)
    assert not is_better(interval(1.0, None, None))


def test_a_mean_of_one_seed_says_so() -> None:
    assert tell_mean(interval(0.96, None, None), 1) == "96.00 %, one seed, so no interval"
    assert (
        tell_mean(interval(-0.5, -0.7, -0.3), 3, form=plain) == "-0.5 [-0.7, -0.3], mean of 3 seeds"
    )


def test_sparkline_is_as_long_as_its_values_and_in_their_order() -> None:
    assert sparkline([3, 1, 2]) == "█▁▅"
    assert sparkline([0.5, 0.5]) == "▄▄"
    assert sparkline([1]) == "▄"
