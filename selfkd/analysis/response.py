"""The effect of T and alpha: accuracy as a fitted function of both, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfkd.results import Interval, Mode

Array = NDArray[np.float64]
Trial = tuple[float, float, float]
"""Temperature, alpha and accuracy."""

FEWEST = 5
"""Least number of trials: with fewer, a surface of two variables would be all prior."""
SIDE = 15
"""Cells of the grid by temperature, and by alpha."""
SETTINGS = 64
"""Settings of the kernel, for each of the models that are averaged."""
KEPT = 100
"""Number of settings that are drawn, by their posterior weight."""
DRAWS = 20
"""Number of surfaces that are drawn of each."""
CANDIDATES = 400
"""Number of draws of the best point in a response."""
EVIDENCE = 0.95
"""Probability that counts as evidence."""
FLAT = 1e5
"""Length scale, in searched ranges, of a variable without an effect."""
PRIOR = ((0.3, 3.0), (0.15, 3.0), (0.15, 3.0), (0.1, 1.2))
"""Ends of the log-uniform priors for standardised accuracies: deviation of the surface, length
scales of temperature and alpha in searched ranges, noise of a trial."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The dependence of accuracy on one of T and alpha."""

    probability: float
    """Probability that accuracy depends on it at all; 1/2 before the trials."""
    share: float
    """Share of the surface's variance that is due to it alone: the first-order Sobol' index."""
    change: Interval
    """Standard deviation of accuracy over its range, the other held: the root of the numerator of
    the total Sobol' index."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """Accuracy over (T, alpha). Lists of lists are `[temperature][alpha]`."""

    trials: list[Trial]
    temperatures: list[float]
    """Temperatures of the grid; a single one where it was not searched."""
    alphas: list[float]
    """Alphas of the grid; a single one where it was not searched."""
    mean: list[list[float]]
    """Mean of the surface."""
    sd: list[list[float]]
    """Standard deviation of the surface, without the noise of a trial."""
    probability: list[list[float]]
    """Probability of being the best point."""
    region: list[list[bool]]
    """Points that cannot be distinguished from the best: lower with less than 95 %."""
    best_temperature: Interval
    """Temperature of the best mean, with the 95 % interval of the best point's."""
    best_alpha: Interval
    """Alpha of the best mean, with the 95 % interval of the best point's."""
    best_accuracy: Interval
    """Accuracy, or another metric, of the surface at its best mean."""
    temperature: Effect | None
    """Effect of the temperature; None where it was not searched."""
    alpha: Effect | None
    """Effect of alpha; None where it was not searched."""
    noise: float
    """Standard deviation of a trial around the surface: the effect of seeds and all else."""
    candidates: list[tuple[float, float]]
    """Draws of the best point, as temperature and alpha."""

    def region_bounds(self) -> tuple[tuple[float, float], tuple[float, float], float]:
        """Return the region's range of temperature, of alpha, and its share of the grid."""
        inside = np.array(self.region, dtype=np.float64)
        rows, columns = np.flatnonzero(inside.max(axis=1)), np.flatnonzero(inside.max(axis=0))
        of_t = (self.temperatures[rows[0]], self.temperatures[rows[-1]])
        of_alpha = (self.alphas[columns[0]], self.alphas[columns[-1]])
        return of_t, of_alpha, float(inside.mean())


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The movement of the best point over generations, or over the student's size."""

    temperature: Interval | None
    """Factor of T for one unit more; None where it was not searched."""
    alpha: Interval | None
    """Change of alpha for one unit more; None where it was not searched."""


def unfit(trials: Sequence[Trial], *, label: str = "accuracy") -> str | None:
    """Return the reason why no surface can be fitted to these trials, or None.

    Args:
        trials: Temperature, alpha and metric of each.
        label: Name of the metric.

    >>> unfit([(1.0, 0.5, 0.9)] * 3)
    'at least 5 trials are needed, got 3'
    """
    if len(trials) < FEWEST:
        return f"at least {FEWEST} trials are needed, got {len(trials)}"
    temperatures, alphas, accuracies = (set(column) for column in zip(*trials, strict=True))
    if len(temperatures) == len(alphas) == 1:
        return "all trials have the same temperature and alpha"
    if len(accuracies) == 1:
        return f"all trials have the same {label}"
    return None


def search_range(values: Sequence[float], searched: Sequence[float]) -> tuple[float, float] | None:
    """Return the range of temperature or alpha that trials were drawn from.

    Args:
        values: Values of the trials.
        searched: Ends of a searched range, or its choices; none where they are not known.

    Returns:
        The least and the largest value; None where the trials have a single one.

    >>> search_range([2.0, 5.0], [1.0, 10.0]), search_range([4.0, 4.0], [1.0, 10.0])
    ((1.0, 10.0), None)
    """
    ends = [*values, *searched]
    return (min(ends), max(ends)) if len(set(values)) > 1 else None


def fit_response(
    trials: Sequence[Trial],
    *,
    temperatures: tuple[float, float] | None = None,
    alphas: tuple[float, float] | None = None,
    mode: Mode = "max",
    seed: int = 0,
) -> Response | None:
    """Fit accuracy, or another metric, as a function of temperature and alpha.

    A Gaussian process on u = log T and v = alpha, both scaled to [0, 1] over their ranges, on
    standardised accuracies:

        accuracy = c + f(u, v) + noise,    c ~ N(0, 1),    f ~ GP(0, s² Matern52(du / a, dv / b))

    A search has too few trials to settle (s, a, b, noise): at the likelihood's maximum the 95 %
    intervals of 8 trials hold 62 to 75 % of the truth. So settings and four models (f of both, of
    T alone, of alpha alone, of neither, equally probable before) are averaged by their marginal
    likelihood, over a Sobol sequence of the priors, which are log-uniform. Surfaces drawn from
    that average give the region, the best point's interval and the effects.

    Args:
        trials: Temperature, alpha and accuracy of each.
        temperatures: Searched range of the temperature; that of the trials when not given.
        alphas: Searched range of alpha; that of the trials when not given.
        mode: Whether more of the metric is better, or less.
        seed: Seed of the sequence and the draws.

    Returns:
        The response, or None where `unfit` gives a reason.

    Raises:
        ValueError: A figure is not finite, a temperature not above 0, or a range does not hold all
            trials.

    Reference:
        Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 and 5,
        https://gaussianprocess.org/gpml
        Hoeting et al., "Bayesian Model Averaging: A Tutorial", 1999,
        https://doi.org/10.1214/ss/1009212519
        Sobol', "Global sensitivity indices for nonlinear mathematical models and their Monte Carlo
        estimates", 2001, https://doi.org/10.1016/S0378-4754(00)00270-6; on draws of a fitted
        process: Oakley, O'Hagan, 2004, https://doi.org/10.1111/j.1467-9868.2004.05304.x
    """
    for temperature, alpha, accuracy in trials:
        if not (temperature > 0 and all(map(math.isfinite, (temperature, alpha, accuracy)))):
            raise ValueError(
                "trials must have a temperature above 0 and finite figures, got "
                f"({temperature}, {alpha}, {accuracy})"
            )
    if unfit(trials) is not None:
        return None
    sign = 1 if mode == "max" else -1
    table = np.array(trials, dtype=np.float64) * (1, 1, sign)
    t_ends = _range("temperatures", table[:, 0], temperatures)
    alpha_ends = _range("alphas", table[:, 1], alphas)
    log_ends = (math.log(t_ends[0]), math.log(t_ends[1]))
    inputs = np.stack(
        [_scaled(np.log(table[:, 0]), log_ends), _scaled(table[:, 1], alpha_ends)], axis=1
    )
    searched = [len(set(column)) > 1 for column in inputs.T]
    axes = [np.linspace(0, 1, SIDE) if there else inputs[:1, k] for k, there in enumerate(searched)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    center, scale = float(table[:, 2].mean()), float(table[:, 2].std(ddof=1))
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # threads of matrices this small cost ten times what they save
        average = _average(inputs, (table[:, 2] - center) / scale, grid, searched, seed)
    shape = (len(axes[0]), len(axes[1]))
    found = _response(
        list(trials),
        np.select([axes[0] == 0, axes[0] == 1], t_ends, np.exp(_unscaled(axes[0], log_ends))),
        _unscaled(axes[1], alpha_ends),
        average,
        mean=(center + scale * average.mean).reshape(shape),
        sd=(scale * average.sd).reshape(shape),
        surfaces=(center + scale * average.surfaces).reshape(-1, *shape),
        noise=scale * average.noise,
    )
    if sign > 0:
        return found
    mean = [[-value for value in row] for row in found.mean]
    return replace(found, mean=mean, best_accuracy=found.best_accuracy.reversed())


def drift(places: Sequence[float], responses: Sequence[Response]) -> Drift | None:
    """Return the movement of the best point from response to response.

    The slope of log T, and of alpha, by least squares over the places, for each draw of the best
    points: as uncertain as these are.

    Args:
        places: Place of each response: its generation, or the log10 of its student's size.
        responses: Responses to independent trials.

    Returns:
        The drift; None where there are not two different places.

    Raises:
        ValueError: There are not as many places as responses.
    """
    x = np.asarray(places, dtype=np.float64)
    if len(x) != len(responses):
        raise ValueError(f"places must be as many as responses, got {len(x)} and {len(responses)}")
    if len(set(places)) < 2:
        return None
    weights = (x - x.mean()) / np.square(x - x.mean()).sum()

    def slopes(column: int, best: Sequence[float]) -> Interval:
        draws = np.array([[pair[column] for pair in r.candidates] for r in responses])
        values = np.append(draws.T, [best], axis=0)
        slope = (np.log(values) if column == 0 else values) @ weights
        low, high = np.quantile(slope[:-1], _ENDS)
        ends = np.array([slope[-1], low, high])
        return Interval(*map(float, np.exp(ends) if column == 0 else ends))

    by_t = all(response.temperature for response in responses)
    by_alpha = all(response.alpha for response in responses)
    return Drift(
        temperature=slopes(0, [r.best_temperature.value for r in responses]) if by_t else None,
        alpha=slopes(1, [r.best_alpha.value for r in responses]) if by_alpha else None,
    )


_ENDS = ((1 - EVIDENCE) / 2, (1 + EVIDENCE) / 2)


@dataclass(frozen=True, kw_only=True)
class _Averaged:
    """The average of all models, of standardised accuracies on the grid."""

    mean: Array
    sd: Array
    surfaces: Array
    """Drawn surfaces `[draws, cells]`."""
    noise: float
    depends: tuple[float, float]
    """Probability that accuracy depends on temperature, on alpha."""


def _range(name: str, values: Array, given: tuple[float, float] | None) -> tuple[float, float]:
    low, high = given if given is not None else (float(values.min()), float(values.max()))
    if not low <= values.min() <= values.max() <= high:
        raise ValueError(
            f"{name} must be a range (low, high) that holds all trials', got {given} and trials "
            f"from {values.min():g} to {values.max():g}"
        )
    return low, high


def _scaled(values: Array, ends: tuple[float, float]) -> Array:
    low, high = ends
    return np.zeros_like(values) if high == low else (values - low) / (high - low)


def _unscaled(values: Array, ends: tuple[float, float]) -> Array:
    return (ends[0] + values * (ends[1] - ends[0])).clip(*ends)


def _settings(searched: Sequence[bool], seed: int) -> Iterator[tuple[tuple[bool, bool], Array]]:
    """Yield the models, by the variables they depend on, with settings of the kernel."""
    from scipy.stats import qmc

    low, high = np.log(PRIOR).T
    sequence = qmc.Sobol(len(PRIOR), rng=seed).random_base2(int(math.log2(SETTINGS)))
    for model in ((False, False), (True, False), (False, True), (True, True)):
        if all(there or not wanted for there, wanted in zip(searched, model, strict=True)):
            for setting in np.exp(low + sequence * (high - low)):
                yield model, setting


def _process(model: tuple[bool, bool], setting: Array) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    deviation, *lengths, noise = map(float, setting)
    kernel = ConstantKernel(1.0, "fixed") + WhiteKernel(noise**2, "fixed")
    if any(model):
        scales = [own if there else FLAT for own, there in zip(lengths, model, strict=True)]
        kernel += ConstantKernel(deviation**2, "fixed") * Matern(scales, "fixed", nu=2.5)
    return GaussianProcessRegressor(kernel, optimizer=None)


def _average(
    inputs: Array, outputs: Array, grid: Array, searched: Sequence[bool], seed: int
) -> _Averaged:
    """Average models and settings by their marginal likelihood."""
    settings = list(_settings(searched, seed))
    fitted = [_process(model, setting).fit(inputs, outputs) for model, setting in settings]
    evidence = np.array([process.log_marginal_likelihood_value_ for process in fitted])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    depends = np.array([model for model, _ in settings], dtype=np.float64).T @ weights
    noise = math.sqrt(float(np.array([setting[3] ** 2 for _, setting in settings]) @ weights))
    rng = np.random.default_rng(seed)
    # evenly spaced over the cumulated weights: less chance than in independent draws
    levels = (np.arange(KEPT) + rng.random()) / KEPT
    chosen, copies = np.unique(
        np.minimum(np.searchsorted(np.cumsum(weights), levels), len(weights) - 1),
        return_counts=True,
    )
    means, variances, surfaces = [], [], []
    for number, count in zip(chosen, copies, strict=True):
        mean, covariance = fitted[number].predict(grid, return_cov=True)
        # of the surface, without the noise of a trial
        covariance -= settings[number][1][3] ** 2 * np.eye(len(grid))
        root = np.linalg.cholesky(covariance + 1e-8 * np.eye(len(grid)))
        surfaces.append(mean + rng.standard_normal((DRAWS * count, len(grid))) @ root.T)
        means.append(mean)
        variances.append(covariance.diagonal().clip(min=0))
    shares = copies / KEPT
    together = shares @ np.array(means)
    spread = shares @ (np.array(variances) + np.square(np.array(means) - together))
    return _Averaged(
        mean=together,
        sd=np.sqrt(spread),
        surfaces=np.concatenate(surfaces),
        noise=noise,
        depends=(float(depends[0]), float(depends[1])),
    )


def _response(
    trials: list[Trial],
    temperatures: Array,
    alphas: Array,
    average: _Averaged,
    *,
    mean: Array,
    sd: Array,
    surfaces: Array,
    noise: float,
) -> Response:
    best = np.unravel_index(int(mean.argmax()), mean.shape)
    there = surfaces[:, best[0], best[1]]
    flat = surfaces.reshape(len(surfaces), -1)
    tops = flat.argmax(axis=1)
    rows, columns = np.unravel_index(tops, mean.shape)
    wins = np.bincount(tops, minlength=mean.size).reshape(mean.shape) / len(tops)
    lower = (surfaces < there[:, None, None]).mean(axis=0)

    def interval(value: float, draws: Array) -> Interval:
        low, high = np.quantile(draws, _ENDS)
        return Interval(float(value), float(low), float(high))

    picked = np.random.default_rng(0).permutation(len(tops))[:CANDIDATES]
    return Response(
        trials=trials,
        temperatures=temperatures.tolist(),
        alphas=alphas.tolist(),
        mean=mean.tolist(),
        sd=sd.tolist(),
        probability=wins.tolist(),
        region=(lower < EVIDENCE).tolist(),
        best_temperature=interval(temperatures[best[0]], temperatures[rows]),
        best_alpha=interval(alphas[best[1]], alphas[columns]),
        best_accuracy=interval(mean[best], there),
        temperature=_effect(surfaces, average.depends[0]),
        alpha=_effect(surfaces.transpose(0, 2, 1), average.depends[1]),
        noise=noise,
        candidates=[(float(temperatures[rows[n]]), float(alphas[columns[n]])) for n in picked],
    )


def _effect(surfaces: Array, probability: float) -> Effect | None:
    """Return the effect of the first variable of surfaces `[draws, first, second]`."""
    if surfaces.shape[1] == 1:
        return None
    whole = surfaces.var(axis=(1, 2))
    alone = surfaces.mean(axis=2).var(axis=1)
    change = np.sqrt(surfaces.var(axis=1).mean(axis=1))
    low, high = np.quantile(change, _ENDS)
    return Effect(
        probability=probability,
        share=float(alone.mean() / whole.mean()),
        change=Interval(float(change.mean()), float(low), float(high)),
    )
