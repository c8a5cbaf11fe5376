"""The fitted response over T and alpha: surfaces that are known, noise, and how often it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import qmc

from selfkd.analysis.response import EVIDENCE, Response, drift, fit_response, unfit
from selfkd.results import Interval

NOISE = 0.003
Surface = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def hill(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy at log T and alpha, both in [0, 1]; the best is at (0.4, 0.6)."""
    return 0.96 - 0.08 * (u - 0.4) ** 2 - 0.12 * (v - 0.6) ** 2


def by_alpha(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.96 - 0.16 * (v - 0.6) ** 2 + 0 * u


def flat(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.96 + 0 * u * v


def trials(surface: Surface, *, count: int, seed: int) -> list[tuple[float, float, float]]:
    u, v = qmc.Sobol(2, rng=seed).random_base2(math.ceil(math.log2(count)))[:count].T
    values = surface(u, v) + np.random.default_rng(seed).normal(0, NOISE, count)
    return [(float(20**a), float(b), float(y)) for a, b, y in zip(u, v, values, strict=True)]


def fit(surface: Surface, *, count: int, seed: int = 0) -> Response:
    found = fit_response(
        trials(surface, count=count, seed=seed), temperatures=(1, 20), alphas=(0, 1)
    )
    assert found is not None
    return found


def truth(surface: Surface, response: Response) -> NDArray[np.float64]:
    u, v = np.log(response.temperatures) / math.log(20), np.array(response.alphas)
    return surface(u[:, None], v[None, :])


def held(surface: Surface, response: Response) -> float:
    """Share of the grid where the truth is within the 95 % interval."""
    mean, sd = np.array(response.mean), np.array(response.sd)
    return float((abs(truth(surface, response) - mean) <= 1.96 * sd).mean())


@pytest.fixture(scope="module")
def hill_of_32() -> Response:
    return fit(hill, count=32)


@pytest.fixture(scope="module")
def noise() -> list[Response]:
    return [fit(flat, count=12, seed=seed) for seed in range(10)]


def test_a_known_surface_is_found_within_its_uncertainty(hill_of_32: Response) -> None:
    response = hill_of_32
    assert held(hill, response) > 0.8
    assert np.abs(truth(hill, response) - np.array(response.mean)).mean() < NOISE
    t, alpha = response.best_temperature, response.best_alpha
    assert t.low is not None
    assert t.high is not None
    assert t.low <= 20**0.4 <= t.high
    assert alpha.low is not None
    assert alpha.high is not None
    assert alpha.low <= 0.6 <= alpha.high
    assert t.high / t.low < 5
    best = response.best_accuracy
    assert best.low is not None
    assert best.high is not None
    assert best.low <= 0.96 <= best.high
    assert response.noise == pytest.approx(NOISE, rel=0.5)


def test_effects_are_sobol_indices(hill_of_32: Response) -> None:
    """Of an additive surface: each part's variance over the sum of both."""
    grid = np.linspace(0, 1, 15)
    of_t, of_alpha = np.var(0.08 * (grid - 0.4) ** 2), np.var(0.12 * (grid - 0.6) ** 2)
    effects = (hill_of_32.temperature, hill_of_32.alpha)
    for effect, own in zip(effects, (of_t, of_alpha), strict=True):
        assert effect is not None
        assert effect.probability >= EVIDENCE
        assert effect.share == pytest.approx(own / (of_t + of_alpha), abs=0.15)
        assert effect.change.low is not None
        assert effect.change.high is not None
        assert effect.change.low <= math.sqrt(own) <= effect.change.high


def test_the_region_holds_the_best_and_leaves_out_what_is_evidently_worse(
    hill_of_32: Response,
) -> None:
    region = np.array(hill_of_32.region)
    exact = truth(hill, hill_of_32)
    assert region[np.unravel_index(exact.argmax(), exact.shape)]
    assert not region[exact < 0.96 - 0.02].any()
    (low, high), (low_alpha, high_alpha), share = hill_of_32.region_bounds()
    assert low <= 20**0.4 <= high
    assert low_alpha <= 0.6 <= high_alpha
    assert share == region.mean() < 0.4
    assert np.sum(hill_of_32.probability) == pytest.approx(1)


def test_what_has_no_effect_is_told_from_what_has() -> None:
    response = fit(by_alpha, count=16)
    assert response.temperature is not None
    assert response.alpha is not None
    assert response.alpha.probability >= EVIDENCE
    assert response.temperature.probability < 0.5
    assert response.temperature.change.high is not None
    assert response.alpha.change.low is not None
    assert response.temperature.change.high < response.alpha.change.low


def test_pure_noise_shows_no_dependence(noise: list[Response]) -> None:
    effects = [effect for r in noise for effect in (r.temperature, r.alpha) if effect]
    assert len(effects) == 20
    assert sum(effect.probability >= EVIDENCE for effect in effects) <= 1
    assert np.median([effect.probability for effect in effects]) < 0.5
    assert np.mean([r.region_bounds()[2] for r in noise]) > 0.8


def test_intervals_hold_a_flat_surface(noise: list[Response]) -> None:
    assert np.mean([held(flat, response) for response in noise]) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("surface", [flat, by_alpha, hill])
@pytest.mark.parametrize(("count", "least"), [(8, 0.8), (16, 0.85), (32, 0.9)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(
    surface: Surface, count: int, least: float
) -> None:
    found = [held(surface, fit(surface, count=count, seed=seed)) for seed in range(40)]
    assert np.mean(found) >= least


def test_it_is_plain_data_and_the_same_every_time() -> None:
    first, second = (fit(hill, count=8) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(asdict(first)))["alphas"] == first.alphas
    shape = np.array(first.mean).shape
    assert shape == (len(first.temperatures), len(first.alphas)) == np.array(first.sd).shape
    assert (first.temperatures[0], first.temperatures[-1]) == (1, 20)


@pytest.mark.parametrize("column", [0, 1])
def test_one_of_both_may_be_fixed(column: int) -> None:
    points = [list(trial) for trial in trials(hill, count=8, seed=0)]
    for point in points:
        point[column] = 1.0
    response = fit_response([(t, alpha, y) for t, alpha, y in points])
    assert response is not None
    fixed, free = (response.temperature, response.alpha)[:: 1 if column == 0 else -1]
    assert fixed is None
    assert free is not None
    assert np.array(response.mean).shape[column] == 1


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([], "at least 5 trials are needed, got 0"),
        ([(1.0, 0.5, 0.9), (2.0, 0.1, 0.8)], "at least 5 trials are needed, got 2"),
        ([(2.0, 0.5, y / 10) for y in range(6)], "all trials have the same temperature and alpha"),
        ([(1.0 + n, 0.5, 0.9) for n in range(6)], "all trials have the same accuracy"),
    ],
)
def test_too_little_to_fit_is_said(points: list[tuple[float, float, float]], reason: str) -> None:
    assert unfit(points) == reason
    assert fit_response(points) is None


@pytest.mark.parametrize("bad", [(0.0, 0.5, 0.9), (-1.0, 0.5, 0.9), (1.0, math.nan, 0.9)])
def test_figures_that_cannot_be_are_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="a temperature above 0 and finite figures"):
        fit_response([*trials(hill, count=8, seed=0), bad])


def test_a_range_must_hold_the_trials() -> None:
    with pytest.raises(ValueError, match=r"temperatures must be a range .* got \(1, 4\)"):
        fit_response(trials(hill, count=8, seed=0), temperatures=(1, 4))


# --- drift ---


def placed(response: Response, t: float, alpha: float, spread: float) -> Response:
    """A response whose best point is known up to a spread."""
    draws = np.random.default_rng(round(100 * t)).normal(0, spread, (400, 2))
    return replace(
        response,
        best_temperature=Interval(t),
        best_alpha=Interval(alpha),
        candidates=[(float(t * math.exp(a)), float(alpha + b)) for a, b in draws],
    )


def test_a_drift_is_the_slope_of_the_best_points(hill_of_32: Response) -> None:
    moving = [placed(hill_of_32, 2.0 * 1.5**k, 0.3 + 0.1 * k, 0.01) for k in range(4)]
    moved = drift([1, 2, 3, 4], moving)
    assert moved is not None
    assert moved.temperature is not None
    assert moved.alpha is not None
    assert moved.temperature.value == pytest.approx(1.5)
    assert moved.alpha.value == pytest.approx(0.1)
    assert moved.temperature.low is not None
    assert moved.temperature.high is not None
    assert 1.4 < moved.temperature.low < 1.5 < moved.temperature.high < 1.6


def test_uncertain_best_points_make_an_uncertain_drift(hill_of_32: Response) -> None:
    same = [placed(hill_of_32, 2.0 + k / 10, 0.5, 1.0) for k in range(3)]
    moved = drift([1, 2, 3], same)
    assert moved is not None
    assert moved.temperature is not None
    assert moved.temperature.low is not None
    assert moved.temperature.high is not None
    assert moved.temperature.low < 1 < moved.temperature.high


def test_a_drift_needs_two_places(hill_of_32: Response) -> None:
    assert drift([1, 1], [hill_of_32] * 2) is None
    with pytest.raises(ValueError, match="places must be as many as responses, got 1 and 2"):
        drift([1], [hill_of_32] * 2)


def test_less_is_better_is_the_mirror_image() -> None:
    points = trials(hill, count=8, seed=1)
    more = fit_response(points)
    less = fit_response([(t, alpha, -y) for t, alpha, y in points], mode="min")
    assert more is not None
    assert less is not None
    assert np.array(less.mean) == pytest.approx(-np.array(more.mean))
    assert less.best_accuracy.value == pytest.approx(-more.best_accuracy.value)
    assert less.best_accuracy.low is not None
    assert less.best_accuracy.low <= less.best_accuracy.value
    assert (less.best_temperature, less.region) == (more.best_temperature, more.region)
    assert less.trials[0][2] == -points[0][2]
