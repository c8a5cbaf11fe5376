"""What a curve over sizes says: tests as SciPy's, corrected for how many; words for each case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from selfkd.experiments.curve import compare_size, describe_curve, judge, mean_gain

from selfkd.results import Row


def measured(values: list[float]) -> list[Row]:
    return [{"test_accuracy": v, "val_accuracy": v, "test_nll": 1 - v} for v in values]


def size(parameters: int, gain: float, *, room: float = 0.05, seeds: int = 5) -> Row:
    """A size that gains so much, and whose labels only are so far below the teacher."""
    rng = np.random.default_rng(parameters)
    labels = 0.9 + rng.normal(0, 0.002, seeds)
    taught = labels + gain + rng.normal(0, 0.002, seeds)
    row = compare_size(measured(labels.tolist()), measured(taught.tolist()), 0.9 + room)
    return {"value": parameters, "parameters": parameters, **row}


def curve(*sizes: Row) -> tuple[list[str], str]:
    rows = list(sizes)
    judge(rows)
    told = describe_curve(rows, mean_gain(rows))
    return [row["verdict"] for row in rows], "\n".join(told)


def test_a_size_is_compared_by_the_paired_t_test() -> None:
    labels, taught = [0.90, 0.92, 0.91, 0.93], [0.93, 0.94, 0.95, 0.94]
    row = compare_size(measured(labels), measured(taught), 0.96)
    expected = stats.ttest_rel(taught, labels)
    assert row["p"] == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx(
        (ends.low, ends.high)
    )
    assert row["difference"]["value"] == pytest.approx(0.025)
    assert row["room"]["value"] == pytest.approx(0.96 - 0.915)
    assert row["labels"]["runs"] == labels
    assert row["taught"]["val_accuracy"] == pytest.approx(0.94)


def test_helps_in_the_middle() -> None:
    sizes = [size(600, 0.0), size(3000, 0.02), size(12_000, 0.02), size(50_000, 0.0, room=0.0)]
    verdicts, told = curve(*sizes)
    assert verdicts == ["no evidence", "helps", "helps", "no evidence"]
    assert told.splitlines()[0] == (
        "distillation helps from 3 k to 12 k parameters; no evidence outside"
    )
    assert "on average over the 4 sizes: +1." in told
    assert "\n50 k parameters: labels alone are not evidently below the teacher" in told
    assert "\n600 parameters: below the teacher with labels alone and not evidently helped" in told


def test_the_mean_gain_is_over_seeds_of_means_over_sizes() -> None:
    sizes = [size(1000, 0.02, seeds=4), size(2000, 0.01, seeds=4)]
    gains = np.subtract(*([[row[arm]["runs"] for row in sizes] for arm in ("taught", "labels")]))
    expected = stats.ttest_1samp(gains.mean(axis=0), 0).confidence_interval()
    found = mean_gain(sizes)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert mean_gain([*sizes, size(3000, 0.0, seeds=3)]) is None


def test_what_only_looks_clear_alone_is_said() -> None:
    rows = [size(1000 * (n + 1), 0.0) for n in range(6)]
    rows[2]["p"] = 0.03
    verdicts, told = curve(*rows)
    assert set(verdicts) == {"no evidence"}
    assert "3 k parameters: the interval leaves out 0, but among 6 sizes looked at" in told


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([0.02, 0.02, 0.02], "distillation helps from 1 k to 3 k parameters"),
        ([0.02, 0.0, 0.02], "distillation helps at 1 k parameters and at 3 k parameters; no ev"),
        ([-0.02, 0.02, 0.02], "distillation helps from 2 k to 3 k parameters; distillation hurts"),
        ([-0.02, -0.02, 0.0], "distillation hurts from 1 k to 2 k parameters; no evidence outside"),
        (
            [0.0, 0.0, 0.0],
            "no evidence that distillation helps at any one size from 1 k to 3 k parameters",
        ),
    ],
)
def test_in_words(gains: list[float], words: str) -> None:
    _, told = curve(*(size(1000 * (n + 1), gain) for n, gain in enumerate(gains)))
    assert told.startswith(words)
    if min(gains) > 0:
        assert "no evidence" not in told


def test_one_seed_says_nothing() -> None:
    verdicts, told = curve(size(1000, 0.02, seeds=1), size(2000, 0.02, seeds=1))
    assert verdicts == ["unknown", "unknown"]
    assert told == "one seed: no interval, so nothing is said of where distillation helps"


def test_equal_differences_are_no_evidence() -> None:
    row: dict[str, Any] = compare_size(measured([0.5, 0.5]), measured([0.75, 0.75]), 0.9)
    verdicts, _ = curve({"parameters": 10, **row})
    assert verdicts == ["no evidence"]


def test_looking_at_many_sizes_finds_no_more_by_chance() -> None:
    """Of families of 8 sizes without any gain at most 5 % claim one, and half of them without."""
    claimed = single = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = []
        for number in range(8):
            a, b = rng.normal(0.9, 0.01, (2, 5))
            rows.append(
                {
                    "parameters": number + 1,
                    **compare_size(measured(a.tolist()), measured(b.tolist()), 1.0),
                }
            )
        judge(rows)
        claimed += any(row["verdict"] != "no evidence" for row in rows)
        single += any(row["p"] <= 0.05 for row in rows)
    assert claimed / 200 < 0.08
    assert single / 200 > 0.25
