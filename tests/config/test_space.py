"""Distributions against SciPy, and the points of each kind of search."""

import math
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.stats import qmc

from selfkd.config.space import Distribution, Optuna, Points, make_points

LR = Distribution("loguniform", (1e-4, 1.0))
ALPHA = Distribution("uniform", (0, 1))
DEPTH = Distribution("randint", (1, 4))
NAME = Distribution("choice", ("sgd", "adamw", "lion"))
SPACE = {"train.lr": LR, "distill.alpha": ALPHA, "model.args.depth": DEPTH, "train.optimizer": NAME}
MIDDLES = (np.arange(1000) + 0.5) / 1000


# --- distributions ---


@pytest.mark.parametrize(
    ("distribution", "reference"),
    [
        (Distribution("uniform", (-2, 5)), stats.uniform(-2, 7)),
        (Distribution("uniform", (0.1, 0.3)), stats.uniform(0.1, 0.2)),
        (Distribution("loguniform", (1, 20)), stats.loguniform(1, 20)),
        (Distribution("loguniform", (1e-9, 1e-2)), stats.loguniform(1e-9, 1e-2)),
    ],
)
def test_at_is_the_inverse_of_the_distribution_function(distribution, reference):
    values = [distribution.at(q) for q in MIDDLES]
    np.testing.assert_allclose(values, reference.ppf(MIDDLES), rtol=1e-11, atol=1e-15)
    assert np.all(np.diff(values) > 0)
    assert (distribution.at(0.0), distribution.at(1.0)) == distribution.values
    draws = [distribution.at(q) for q in np.random.default_rng(0).random(2000)]
    assert stats.kstest(draws, reference.cdf).pvalue > 0.01


def test_no_rounding_leaves_the_range():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        low = 10 ** rng.uniform(-15, 6)
        high = low * (1 + 10 ** rng.uniform(-10, 6))
        for kind in ("uniform", "loguniform"):
            distribution = Distribution(kind, (low, high))
            for q in (0.0, 1e-16, 0.5, 1 - 1e-16, 1.0):
                assert distribution.contains(distribution.at(q)), (kind, low, high, q)


def test_values_are_short_and_plain_floats():
    assert Distribution("loguniform", (1, 100)).at(0.5) == 10.0
    assert Distribution("loguniform", (1e-6, 1e-2)).at(0.5) == 1e-4
    for distribution in (LR, ALPHA, Distribution("uniform", (1, 3))):
        assert {type(distribution.at(q)) for q in (0.0, 0.3, 1.0)} == {float}


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (Distribution("randint", (3, 6)), [3, 4, 5, 6]),
        (Distribution("randint", (-1, 0)), [-1, 0]),
        (NAME, ["sgd", "adamw", "lion"]),
        (Distribution("choice", (True, None, 0.5)), [True, None, 0.5]),
        (Distribution("choice", ("only",)), ["only"]),
    ],
)
def test_each_discrete_value_gets_an_equal_share(distribution, expected):
    quantiles = (np.arange(1200) + 0.5) / 1200
    values = [distribution.at(float(q)) for q in quantiles]
    assert list(dict.fromkeys(values)) == expected  # in order
    assert [values.count(value) for value in expected] == [1200 // len(expected)] * len(expected)
    assert (distribution.at(0.0), distribution.at(1.0)) == (expected[0], expected[-1])
    assert [type(value) for value in dict.fromkeys(values)] == [type(v) for v in expected]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (Distribution("uniform", (0, 1)), [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        (Distribution("loguniform", (1, 20)), [1, 4, 20.0], [0.9, 21]),
        (Distribution("randint", (1, 3)), [1, 2, 3], [0, 4, 1.5]),
        (NAME, ["sgd"], ["SGD", None]),
    ],
)
def test_contains_what_it_can_give(distribution, inside, outside):
    assert [distribution.contains(value) for value in inside] == [True] * len(inside)
    assert [distribution.contains(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("normal", (0, 1), "distribution must be one of uniform, .*, got 'normal'"),
        ("uniform", (0,), r"uniform must be \[low, high\], got \[0\]"),
        ("uniform", (0, 1, 2), r"uniform must be \[low, high\], got \[0, 1, 2\]"),
        ("uniform", ("0", 1), r"uniform must be \[low, high\], got \['0', 1\]"),
        ("uniform", (False, True), r"uniform must be \[low, high\], got \[False, True\]"),
        ("uniform", (0, math.nan), r"uniform must be \[low, high\], got \[0, nan\]"),
        ("uniform", (0, math.inf), r"uniform must be \[low, high\], got \[0, inf\]"),
        ("uniform", (1, 1), r"uniform must have low < high, got \[1, 1\]"),
        ("randint", (2, 1), r"randint must have low < high, got \[2, 1\]"),
        ("randint", (0, 1.5), r"randint must have whole numbers, got \[0, 1.5\]"),
        ("loguniform", (0, 1), r"loguniform must have low > 0, got \[0, 1\]"),
        ("loguniform", (-1, 1), r"loguniform must have low > 0, got \[-1, 1\]"),
        ("choice", (), r"choice must have at least one value, got \[\]"),
    ],
)
def test_an_impossible_distribution_is_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        Distribution(kind, values)


@pytest.mark.parametrize("spec", [3, None, "uniform", [0, 1], {}, {"uniform": 3}, {"choice": "ab"}])
def test_an_unreadable_entry_is_refused(spec):
    with pytest.raises(ValueError, match=r"must (be like \{uniform|have a list of values)"):
        Distribution.parse(spec)


# --- points ---


@pytest.mark.parametrize("algorithm", ["random", "sobol"])
class TestMakePoints:
    def points(self, algorithm, **changes):
        arguments = {"count": 13, "seed": 3} | changes
        return make_points(SPACE, algorithm=algorithm, **arguments)

    def test_points_are_determined_by_the_seed(self, algorithm):
        points = self.points(algorithm)
        np.random.default_rng().random()
        assert self.points(algorithm) == points
        assert self.points(algorithm, seed=4) != points
        assert len(points) == 13

    def test_every_point_lies_in_the_space(self, algorithm):
        for point in self.points(algorithm, count=50):
            assert point.keys() == SPACE.keys()
            assert all(SPACE[key].contains(value) for key, value in point.items())

    def test_no_point_comes_twice(self, algorithm):
        assert len({point["train.lr"] for point in self.points(algorithm, count=64)}) == 64

    def test_a_longer_search_starts_like_a_shorter_one(self, algorithm):
        assert self.points(algorithm, count=6) == self.points(algorithm, count=30)[:6]

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_given_points_come_first_and_count(self, algorithm, count):
        first = [{"distill.alpha": 1.0}, {"distill.alpha": 0.0}]
        points = self.points(algorithm, count=count, first=first)
        assert len(points) == count
        assert points[:2] == first[:count]
        assert points[2:] == self.points(algorithm, count=count)[: max(0, count - 2)]
        points[0]["distill.alpha"] = 7
        assert first[0] == {"distill.alpha": 1.0}

    def test_without_a_space_all_points_are_empty(self, algorithm):
        points = make_points({}, count=3, algorithm=algorithm, seed=0)
        assert points == [{}, {}, {}]

    def test_each_value_follows_its_distribution(self, algorithm):
        points = self.points(algorithm, count=1024)
        assert stats.kstest([p["distill.alpha"] for p in points], "uniform").pvalue > 0.01
        logs = stats.loguniform(1e-4, 1)
        assert stats.kstest([p["train.lr"] for p in points], logs.cdf).pvalue > 0.01
        depths = np.bincount([p["model.args.depth"] for p in points])[1:]
        assert stats.chisquare(depths).pvalue > 0.01


def test_sobol_covers_the_space_better_than_chance():
    plane = {"x": ALPHA, "y": ALPHA}

    def discrepancy(algorithm, seed):
        points = make_points(plane, count=16, algorithm=algorithm, seed=seed)
        return qmc.discrepancy([[p["x"], p["y"]] for p in points])

    sobol = [discrepancy("sobol", seed) for seed in range(20)]
    assert max(sobol) < np.median([discrepancy("random", seed) for seed in range(20)]) / 2
    for seed in range(5):  # each sixteenth of a side has one of 16 points
        points = make_points(plane, count=16, algorithm="sobol", seed=seed)
        assert sorted(int(p["x"] * 16) for p in points) == list(range(16))


def test_fixed_points_belong_to_trial_numbers():
    proposer = Points([{"x": 0}, {"x": 1}, {"x": 2}])
    assert proposer.limit is None
    proposer.tell(0, {"x": 0}, None)
    assert [proposer.ask(number) for number in (2, 0, 2)] == [{"x": 2}, {"x": 0}, {"x": 2}]


# --- optuna ---


FIRST = {"x": 0.25, "y": 0.75}
PLANE = {"x": ALPHA, "y": ALPHA}


def quality(point):
    return -((point["x"] - 0.7) ** 2) - (point["y"] - 0.2) ** 2


def search(proposer, numbers, value=quality):
    points = []
    for number in numbers:
        points.append(proposer.ask(number))
        proposer.tell(number, points[-1], value(points[-1]))
    return points


def test_optuna_is_determined_by_its_seed():
    points = search(Optuna(PLANE, seed=1), range(15))
    assert search(Optuna(PLANE, seed=1), range(15)) == points
    assert search(Optuna(PLANE, seed=2), range(15)) != points
    assert len({point["x"] for point in points}) == 15


def test_optuna_takes_the_largest_seed():
    assert len(search(Optuna(PLANE, seed=2**32 - 1), range(3))) == 3


def test_optuna_draws_from_each_kind_of_distribution():
    points = search(Optuna(SPACE, seed=0), range(12), value=lambda point: 0.0)
    for point in points:
        assert point.keys() == SPACE.keys()
        assert all(SPACE[key].contains(value) for key, value in point.items())
    assert sum(point["train.lr"] < 0.01 for point in points) > 3  # half of them, in logarithms


def test_optuna_tries_given_points_first():
    points = search(Optuna(PLANE, seed=0, first=[FIRST]), range(3))
    assert points[0] == FIRST
    assert points.count(FIRST) == 1


@pytest.mark.parametrize("value", [None, math.nan])
def test_optuna_hears_of_failed_trials(value):
    proposer = Optuna(PLANE, seed=0, first=[FIRST])
    assert search(proposer, range(1), value=lambda point: value) == [FIRST]
    (trial,) = proposer._study.trials
    assert trial.state.name == "FAIL"
    resumed = Optuna(PLANE, seed=0, first=[FIRST])
    resumed.tell(0, FIRST, value)  # of before the resume
    assert resumed.ask(1) != FIRST


def test_optuna_goes_on_after_a_resume():
    straight = Optuna(PLANE, seed=0, first=[FIRST])
    points = search(straight, range(20))
    resumed = Optuna(PLANE, seed=0, first=[FIRST])
    for number in range(12):
        resumed.tell(number, points[number], quality(points[number]))
    assert resumed._study.best_value == max(map(quality, points[:12]))
    rest = search(resumed, range(12, 20))
    assert rest == points[12:]
    assert not any(point in points[:12] for point in rest)


OUTSIDE = [{"x": 1.5, "y": 0.5}, {"x": 0.5}, {"lr": 0.1}]


def test_optuna_knows_nothing_of_points_outside_the_space():
    straight = Optuna(PLANE, seed=0, first=[FIRST, *OUTSIDE])
    points = search(straight, range(8), value=lambda point: 0.0)
    assert points[:4] == [FIRST, *OUTSIDE]
    assert len(straight._study.trials) == 5
    resumed = Optuna(PLANE, seed=0, first=[FIRST, *OUTSIDE])
    for number, point in enumerate(points[:6]):
        resumed.tell(number, point, 0.0)
    assert [trial.params for trial in resumed._study.trials] == [FIRST, *points[4:6]]
    assert search(resumed, range(6, 8), value=lambda point: 0.0) == points[6:]


def test_optuna_asked_for_several_at_a_time_gives_different_points():
    proposer = Optuna(PLANE, seed=0)
    search(proposer, range(10))
    points = [proposer.ask(number) for number in range(10, 10 + proposer.limit)]
    assert len({point["x"] for point in points}) == proposer.limit


def test_optuna_is_better_than_chance():
    def best_by_chance(seed):
        return max(map(quality, make_points(PLANE, count=40, algorithm="random", seed=seed)))

    best = [max(map(quality, search(Optuna(PLANE, seed=seed), range(40)))) for seed in range(5)]
    assert np.median(best) > np.median([best_by_chance(seed) for seed in range(100)])


def test_optuna_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"search\.algorithm optuna needs optuna: pip install"):
        Optuna(PLANE, seed=0)
