"""A figure with its words and its table, and what the figures of all runs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import plotly.graph_objects as go

from selfkd.analysis.response import Response, fit_response, search_range
from selfkd.analysis.verdicts import is_fraction
from selfkd.reporting.figures.style import Bar, Measure, Surface
from selfkd.reporting.read import DISTILL, Run
from selfkd.reporting.tables import Table
from selfkd.results import Interval, TrialResult

TrialPoint = tuple[float, float, float]
"""Temperature, alpha, and the metric of a trial there."""
Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Panel:
    """A figure with its words and its table."""

    title: str
    text: str
    figure: go.Figure
    table: Table
    small: bool = False
    """Whether several panels stand side by side."""


@dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]
    text: str = ""


def measure(run: Run) -> Measure:
    """Return the measure of the metric that trials are chosen by."""
    title = {"val_accuracy": "accuracy", "val_nll": "NLL on validation"}.get(run.metric, run.metric)
    larger = run.get("search.mode") != "min"
    return Measure(title, percent=is_fraction(run.metric), larger_is_better=larger)


def values(run: Run, trials: Sequence[TrialResult]) -> list[tuple[int, float]]:
    """Return number and metric of each trial that has the metric."""
    found = [(trial.trial, trial.metric(run.metric)) for trial in trials]
    return [(n, value) for n, value in found if value is not None and math.isfinite(value)]


def bar(estimate: Interval) -> Bar:
    """Return an estimate as a bar."""
    return Bar(estimate.value, estimate.low, estimate.high)


def trial_points(run: Run, trials: Sequence[TrialResult]) -> list[TrialPoint]:
    """Return T, alpha and metric of each trial that has all three."""
    known = dict(values(run, trials))
    found = [(run.setting(trial), known.get(trial.trial)) for trial in trials]
    return [(*at, value) for at, value in found if at is not None and value is not None]


def completed(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials that ran to their end: the metrics of others are of fewer epochs."""
    return [trial for trial in trials if trial.status == "completed"]


@lru_cache(maxsize=64)  # a run that goes on is drawn again and again
def _response(trials: tuple[TrialPoint, ...], ranges: tuple[Ends, Ends]) -> Response | None:
    return fit_response(trials, temperatures=ranges[0], alphas=ranges[1])


def response(run: Run, trials: Sequence[TrialResult]) -> tuple[Surface | None, str]:
    """Return the response that is fitted to the completed trials of a search, and its best point.

    The surface is None, and the text on the best point empty, where the trials do not suffice.
    """
    sign = 1 if measure(run).larger_is_better else -1
    found = trial_points(run, completed(trials))
    signed = tuple((t, alpha, sign * value) for t, alpha, value in found)
    ranges = [
        search_range([point[column] for point in signed], run.searched(key))
        for column, key in enumerate(DISTILL)
    ]
    fitted = _response(signed, (ranges[0], ranges[1]))
    if fitted is None or min(len(fitted.temperatures), len(fitted.alphas)) < 2:
        return None, ""
    surface = [[sign * value for value in row] for row in zip(*fitted.mean, strict=True)]
    t, alpha = fitted.best_temperature, fitted.best_alpha
    return Surface(fitted.temperatures, fitted.alphas, surface), (
        f"The fitted surface is best at T {t.value:.3g} [{t.low:.3g}, {t.high:.3g}], "
        f"alpha {alpha.value:.2f} [{alpha.low:.2f}, {alpha.high:.2f}]."
    )
