"""Statistics across runs, against SciPy, and what is said of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import DATA, ensemble_run, generations_run
from scipy import stats

from selfkd.reporting.across_runs import (
    across,
    are_repeats,
    compare,
    last_arm,
    welch_interval,
    why_unpaired,
)
from selfkd.reporting.read import Run, read_run
from selfkd.results import EnsembleSummary, Facts
from selfkd.storage.rows import load_row, save_row


def make(path: Path, **options: Any) -> Run:
    return read_run(generations_run(path, **options))


def values(run: Run) -> tuple[float, ...]:
    arm = last_arm(run)
    assert arm is not None
    return arm.values


def test_same_data_and_seeds_are_paired(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    other = make(tmp_path / "other", lift=0.01, settings=("train.lr=0.1",))
    found = compare(other, base)
    assert found is not None
    assert found.paired
    gains = np.array(values(other)) - np.array(values(base))
    assert found.difference.value == pytest.approx(gains.mean())
    assert found.why == "3 paired seeds"
    assert found.verdict.startswith("other is better than base: +")


def test_paired_interval_is_students(tmp_path: Path) -> None:
    base, other = make(tmp_path / "base"), make(tmp_path / "other", trials=5)
    found = compare(other, base)
    assert found is not None
    gains = np.array(values(other)) - np.array(values(base))
    ends = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found.difference.low == pytest.approx(ends.low)
    assert found.difference.high == pytest.approx(ends.high)


def test_welch_is_scipys_formula() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.9, 0.01, 3), generator.normal(0.89, 0.03, 7)
    interval = welch_interval(a.tolist(), b.tolist())
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 7
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 6)
    half = stats.t.ppf(0.975, df) * np.sqrt(va + vb)
    assert interval.value == pytest.approx(a.mean() - b.mean())
    assert interval.low == pytest.approx(a.mean() - b.mean() - half)
    assert interval.high == pytest.approx(a.mean() - b.mean() + half)


def test_without_any_spread_there_is_no_interval(tmp_path: Path) -> None:
    assert welch_interval([0.9, 0.9], [0.8, 0.8]).low is None
    found = compare(make(tmp_path / "again"), make(tmp_path / "base"))
    assert found is not None
    assert "the same in all: no interval" in found.verdict


def test_welch_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        a, b = generator.normal(0.9, 0.01, 4), generator.normal(0.88, 0.02, 6)
        interval = welch_interval(a.tolist(), b.tolist())
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 0.02 <= interval.high
    assert 365 <= hits <= 394


OTHER_DATA = replace(DATA, fingerprints={"train": "aaaa", "val": "", "test": "bbbb"})
UNPAIRED = [
    ({"data": OTHER_DATA}, r"their data differ \(train/test digits aaaa/bbbb and digits ed6c"),
    ({"seed": 7}, r"their seeds differ \(7 and 0\)"),
    ({"data": Facts(outputs=10)}, r"what data they had is not known of both"),
]


@pytest.mark.parametrize(("options", "why"), UNPAIRED)
def test_unpaired_says_why(tmp_path: Path, options: dict[str, object], why: str) -> None:
    found = compare(make(tmp_path / "other", **options), make(tmp_path / "base"))
    assert found is not None
    assert not found.paired
    assert found.difference.low is not None
    assert re.search(why, found.why)
    assert "unpaired (Welch" in found.why


def test_runs_with_more_seeds_are_paired_on_those_they_share(tmp_path: Path) -> None:
    found = compare(make(tmp_path / "more", seeds=5), make(tmp_path / "base"))
    assert found is not None
    assert found.paired
    assert found.why == "3 paired seeds"


def test_seeds_that_are_not_written_down_are_paired_by_their_order(tmp_path: Path) -> None:
    """The summary of an ensemble has the accuracy of each seed, and not the seeds."""
    runs = []
    for name, count in (("a", 3), ("b", 3), ("c", 4)):
        path = ensemble_run(tmp_path / name)
        summary = load_row(EnsembleSummary, path / "summary.json")
        student = replace(summary.rows[-1], runs=(0.95, 0.97, 0.96, 0.94)[:count])
        save_row(path / "summary.json", replace(summary, rows=(*summary.rows[:-1], student)))
        runs.append(read_run(path))
    found = compare(runs[0], runs[1])
    assert found is not None
    assert found.paired
    assert found.why.startswith("3 paired seeds")
    assert why_unpaired(runs[0], runs[1]) is None
    assert why_unpaired(runs[0], runs[2]) == "they have 3 and 4 fresh seeds"


def test_runs_of_two_commands_are_unpaired(tmp_path: Path) -> None:
    base, other = make(tmp_path / "base"), read_run(ensemble_run(tmp_path / "ensemble"))
    assert why_unpaired(other, base) == "selfkd.ensemble and selfkd.generations draw other seeds"
    found = compare(other, base)
    assert found is not None
    assert found.why.endswith("student against generation 2")


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_seeds_there_is_no_interval(tmp_path: Path, count: int) -> None:
    found = compare(make(tmp_path / "a", seeds=count), make(tmp_path / "b", seeds=count))
    assert found is not None
    assert found.difference.low is None
    assert f"no interval: {count} and {count} fresh seeds" in found.verdict
    assert found.verdict.startswith("no evidence that a is better than b (difference +0.00 points")


def test_repeats_are_averaged_and_paired_by_run(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"run-{seed}", seed=seed) for seed in range(4)]
    assert are_repeats(runs)
    rows = across(runs)
    assert [row.name for row in rows] == [
        *("generation 0", "generation 1", "generation 2", "ensemble of all")
    ]
    table = np.array([[result.metrics["test_accuracy"] for result in run.results] for run in runs])
    assert rows[2].values == pytest.approx(table[:, 2])
    ends = stats.ttest_rel(table[:, 2], table[:, 0]).confidence_interval(0.95)
    assert rows[2].first is not None
    assert rows[2].first.low == pytest.approx(ends.low)
    assert rows[2].first.high == pytest.approx(ends.high)


def test_another_setting_or_the_same_seed_is_no_repeat(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    assert not are_repeats([base])
    assert not are_repeats([base, make(tmp_path / "again")])
    assert not are_repeats([base, make(tmp_path / "lr", seed=1, settings=("train.lr=0.1",))])


def test_runs_of_different_length_share_their_first_generations(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a", rounds=3), make(tmp_path / "b", rounds=1, seed=1)]
    assert [row.name for row in across(runs)] == ["generation 0", "generation 1"]
