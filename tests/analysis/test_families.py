"""The verdict of a family: its error rate and power, simulated; its words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from benchmarks.evidence import IMAGES, by_holm, closed, draw, error, intervals, stopped_after
from scipy import stats

from selfkd.analysis.families import LEVEL, Pairs, Terms, closed_test, judge
from selfkd.analysis.verdicts import ranges
from selfkd.results import Interval, Verdict, find_metric

RUNS = 2000
MOST = LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / RUNS)


def family(accuracy: Any, *, to: str = "generation 0") -> list[Pairs]:
    """Generations as columns, generation 0 first; seeds as rows."""
    first, *others = np.asarray(accuracy, float).T.tolist()
    return [
        Pairs.of(f"generation {k}", to, dict(enumerate(row)), dict(enumerate(first)))
        for k, row in enumerate(others, start=1)
    ]


def generations(accuracy: Any, **options: Any) -> Verdict:
    pairs = family(accuracy)
    return judge(
        pairs,
        terms=Terms(**{"floor": 1 / IMAGES, **options}),
        together=f"born-again generations {ranges(range(1, len(pairs) + 1))}, taken together,",
        noun="generation",
        method="closed",
    )


# --- error rates ---


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("first", [0.003, 0.007])
def test_equal_generations_give_a_false_verdict_in_at_most_five_runs_of_a_hundred(
    seeds: int, first: float
) -> None:
    """Those of equal spread, and where generation 0 is spread more."""
    spread = 0.003 if first == 0.003 else 0.002
    accuracy = draw(RUNS, seeds, [0.0] * 5, spread=spread, first=first, seed=seeds)
    assert error(closed(accuracy)) <= MOST
    assert error([intervals(accuracy)]) > 0.15


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("gain", [0.01, -0.01])
def test_those_that_are_equal_are_called_no_more_often_beside_others_that_are_not(
    seeds: int, gain: float
) -> None:
    accuracy = draw(RUNS, seeds, [0.0, 0.0, gain, gain, gain], seed=seeds)
    _, p = closed(accuracy)
    assert error([p[:, :2]]) <= MOST
    assert error([p[:, 2:]]) > error([p[:, :2]])


def test_the_headline_finds_a_common_gain_more_often_than_holm_finds_any() -> None:
    accuracy = draw(RUNS, 5, [0.005] * 5, seed=1)
    together, each = closed(accuracy)
    assert (together <= LEVEL).mean() > error([by_holm(accuracy)]) + 0.1
    assert (each <= LEVEL).mean() > (by_holm(accuracy) <= LEVEL).mean()


def test_a_gain_of_the_last_generation_alone_is_seen_later_than_by_holm() -> None:
    accuracy = draw(RUNS, 5, [0.0] * 4 + [0.01], seed=1)
    _, p = closed(accuracy)
    assert (p[:, -1] <= LEVEL).mean() < (by_holm(accuracy)[:, -1] <= LEVEL).mean()


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_auto_goes_on_by_chance_in_at_most_five_runs_of_a_hundred(seeds: int) -> None:
    equal = draw(RUNS, seeds, [0.0] * 5, seed=seeds)
    assert (stopped_after(equal, taken_together=True) > 2).mean() <= MOST
    climbing = draw(RUNS, seeds, [0.004 * k for k in range(1, 6)], seed=seeds)
    goes = [(stopped_after(climbing, taken_together=each) > 2).mean() for each in (True, False)]
    assert goes[0] > goes[1]


# --- the test ---


def test_the_closed_test_is_that_of_every_set_by_scipy() -> None:
    differences = np.random.default_rng(0).normal(0.5, 1, (6, 4))
    expected = np.zeros(4)
    for size in range(1, 5):
        for of in itertools.combinations(range(4), size):
            mean = differences[:, of].mean(axis=1)
            p = stats.ttest_1samp(mean, 0).pvalue
            for k in of:
                same = np.sign(mean.mean()) == np.sign(differences[:, k].mean())
                expected[k] = max(expected[k], p if same else 1.0)
    assert closed_test(differences) == pytest.approx(expected)


def test_twelve_members_are_closed_and_thirteen_holm() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(0.02, 0.001, (5, 14))
    gains[:, 0] = 0
    twelve, thirteen = generations(0.9 + gains[:, :13]), generations(0.9 + gains)
    assert (twelve.method, thirteen.method) == ("closed", "holm")
    assert twelve.sentences[1] == (
        "each of generations 1 to 12 is by itself better than generation 0, corrected for all "
        "4,095 sets of generations (closed test)"
    )
    assert thirteen.sentences[1].endswith("corrected for all 13 comparisons (Holm)")


def test_above_twelve_no_generation_counts_without_the_headline() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(0, 0.001, (5, 14))
    gains[:, 1], gains[:, 2] = gains[:, 1] + 0.05, gains[:, 2] - 0.05
    found = generations(0.9 + gains)
    assert found.outcome == "none"
    assert {each.outcome for each in found.comparisons} == {"none"}


# --- in words ---


def rows(gains: Sequence[float], *, seeds: int = 6) -> Any:
    noise = np.random.default_rng(1).normal(0, 0.002, (seeds, len(gains) + 1))
    return 0.9 + noise + np.array([0, *gains])


def test_a_gain_in_words() -> None:
    found = generations(rows([0.0, 0.03, 0.002, 0.03, 0.03]))
    assert found.outcome == "better"
    assert found.sentences == (
        "born-again generations 1 to 5, taken together, are better than generation 0: "
        "+1.95 points [+1.66, +2.23] over 6 fresh seeds",
        "generations 2, 4 and 5 are each by themselves better than generation 0, corrected for "
        "all 31 sets of generations (closed test)",
    )
    called = [each.name[-1] for each in found.comparisons if each.outcome == "better"]
    assert called == ["2", "4", "5"]
    assert found.p is not None
    assert found.p <= min(each.p or 1 for each in found.comparisons)


def test_no_evidence_in_words() -> None:
    found = generations(rows([0.0, 0.0]))
    (only,) = found.sentences
    assert only.startswith(
        "no evidence that born-again generations 1 and 2, taken together, are better than "
        "generation 0 (difference "
    )
    assert only.endswith("] over 6 fresh seeds)")


def test_a_loss_and_less_is_better_in_words() -> None:
    worse = generations(rows([-0.03, -0.03]), mode="max")
    assert " are worse than generation 0: -" in worse.sentences[0]
    better = generations(
        rows([-0.03, -0.03]),
        mode="min",
        form=find_metric("f1").difference,
        unit="val nll",
        floor=0,
    )
    assert " are better than generation 0: -" in better.sentences[0]
    assert "] in val nll over 6 fresh seeds" in better.sentences[0]


def test_one_generation_is_its_own_headline() -> None:
    found = generations(rows([0.03]))
    assert found.sentences[0].startswith("generation 1 is better than generation 0: +")
    assert len(found.sentences) == 1


def test_lineages_are_named() -> None:
    found = generations(rows([0.03, 0.03]), covers="lineages", replica="whole lineage")
    assert found.covers == "lineages"
    assert found.sentences[0].endswith("over 6 whole lineages")


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_seeds_are_too_few_for_an_interval(seeds: int) -> None:
    found = generations(rows([0.03, 0.03], seeds=seeds))
    (only,) = found.sentences
    assert "taken together, and generation 0 differ by +" in only
    words = {1: "1 fresh seed", 2: "2 fresh seeds"}
    assert only.endswith(f" points over {words[seeds]}, too few for an interval")
    assert (found.p, found.outcome, found.seeds) == (None, "none", seeds)
    assert found.difference is not None
    assert found.difference.low is None


def test_a_seed_that_failed_is_left_out() -> None:
    accuracy = rows([0.03, 0.03])
    accuracy[2, 1] = np.nan
    found = generations(accuracy)
    assert found.seeds == 5
    assert "over 5 fresh seeds" in found.sentences[0]
    whole = generations(rows([0.03, 0.03]))
    assert found.comparisons[1].difference == whole.comparisons[1].difference


def test_generations_without_a_common_seed() -> None:
    pairs = [Pairs.of("generation 1", "generation 0", {1: 0.9}, {2: 0.9})]
    (only,) = judge(pairs, terms=Terms()).sentences
    assert only == "generation 1 and generation 0 share no fresh seed: nothing to compare"


def test_huge_values_are_judged_without_overflow() -> None:
    found = generations(rows([0.03, 0.03]) * 1e300, floor=0, form=find_metric("f1").difference)
    assert found.outcome == "better"
    assert [each.outcome for each in found.comparisons] == ["better", "better"]
    same = generations(np.zeros((3, 3)), floor=0)
    assert (same.p, same.outcome) == (None, "none")


# --- rounding ---


def hits(name: str, gains: Sequence[int]) -> Pairs:
    """Students that are right on so many images more, on each seed."""
    labels = {seed: (1100 + 3 * seed) / IMAGES for seed in range(len(gains))}
    values = {seed: labels[seed] + gain / IMAGES for seed, gain in enumerate(gains)}
    return Pairs.of(name, "labels only", values, labels)


@pytest.mark.parametrize(
    ("gains", "outcome"),
    [
        ([2, 2, 2], "none"),  # neither certain, as without spread, nor without an interval
        ([2, 2, 3], "none"),
        ([2, 2, 2, 2, 2], "better"),
        ([2, 2, 2, 2, 3], "better"),
        ([1, 1, 1, 1, 1], "none"),
        ([9, 9, 9], "better"),
        ([0, 0, 0], "none"),
    ],
)
def test_a_verdict_does_not_hang_on_rounding(gains: Sequence[int], outcome: str) -> None:
    found = judge([hits("student", gains)], terms=Terms(floor=1 / IMAGES))
    assert found.outcome == outcome
    assert found.difference is not None
    assert found.difference.low is not None


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.5])
def test_students_that_differ_by_an_image_now_and_then_are_not_told_apart(
    seeds: int, chance: float
) -> None:
    rng = np.random.default_rng(seeds)
    gains = rng.choice([-1, 0, 1], p=[chance, 1 - 2 * chance, chance], size=(RUNS, seeds))
    p = closed_test(gains[..., None] / IMAGES, floor=1 / IMAGES)
    assert (p <= LEVEL).mean() <= MOST


def test_without_a_floor_equal_differences_have_no_interval() -> None:
    pairs = [Pairs.of("B", "A", {n: 0.5 + n / 8 for n in range(3)}, {n: n / 8 for n in range(3)})]
    (only,) = judge(pairs, terms=Terms(form=find_metric("f1").difference)).sentences
    assert only == "B and A differ by +0.5, the same on all 3 fresh seeds, so there is no interval"


# --- several comparisons ---


def test_several_comparisons_are_corrected_by_holm() -> None:
    accuracy = rows([0.0, 0.0, 0.03])
    pairs = family(accuracy)
    found = judge(pairs, terms=Terms())
    p = [stats.ttest_rel(accuracy[:, k], accuracy[:, 0]).pvalue for k in (1, 2, 3)]
    assert found.comparisons[2].p == pytest.approx(3 * p[2])
    assert [each.outcome for each in found.comparisons] == ["none", "none", "better"]
    assert (found.name, found.method) == ("generation 1", "holm")
    *each, last = found.sentences
    assert last == "corrected for all 3 comparisons (Holm)"
    assert each[2].startswith("generation 3 is better than generation 0: +")


def test_what_is_clear_alone_may_be_chance_among_several() -> None:
    clear = {seed: 0.9 + value for seed, value in enumerate([0.0015, 0.0022, 0.0029])}
    labels = dict.fromkeys(range(3), 0.9)
    pairs = [Pairs.of(name, "A", clear, labels) for name in "BC"]
    found = judge(pairs, terms=Terms())
    assert found.sentences[0].startswith("no evidence that B is better than A (difference +0.22")
    assert found.sentences[0].endswith("which among 2 comparisons may be chance)")
    assert judge(pairs[:1], terms=Terms()).outcome == "better"


def test_with_holm_the_mean_is_one_comparison_more() -> None:
    pairs = family(rows([0.03, 0.0]))
    found = judge(pairs, terms=Terms(), together="students, taken together,")
    alone = judge(pairs[:1], terms=Terms())
    assert found.comparisons[0].p is not None
    assert alone.p is not None
    assert found.comparisons[0].p >= 2 * alone.p


def test_an_estimate_over_items_has_the_p_of_its_interval() -> None:
    half = stats.norm.ppf(0.975) * 0.01
    pairs = Pairs(
        name="B", to="A", over_items=Interval(0.02, 0.02 - half, 0.02 + half), items="9 x"
    )
    found = judge([pairs], terms=Terms())
    assert found.p == pytest.approx(2 * stats.norm.sf(2))
    assert found.sentences[0] == "B is better than A: +2.00 points [+0.04, +3.96] over 9 x"
    same = Pairs(name="B", to="A", over_items=Interval(0.0), items="90 test images")
    (only,) = judge([same], terms=Terms()).sentences
    assert only.endswith("+0.00 points, the same on all 90 test images, so there is no interval")
