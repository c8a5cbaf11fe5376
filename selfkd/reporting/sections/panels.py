"""A figure with its words and its table; what figures of a run have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import plotly.graph_objects as go

from selfkd.analysis.response import Response, fit_response, search_range
from selfkd.reporting.figures.style import Bar, Measure, Surface
from selfkd.reporting.read import DISTILL, Run
from selfkd.reporting.tables import Table
from selfkd.results import Interval, TrialResult

Place = tuple[float, float, float]
"""Temperature, alpha, and what was reached there."""
Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Panel:
    """A figure, what it shows in words, and its table."""

    title: str
    text: str
    figure: go.Figure
    table: Table
    small: bool = False
    """Whether several stand side by side."""


@dataclass(frozen=True)
class Section:
    """Panels of one question."""

    title: str
    panels: tuple[Panel, ...]
    text: str = ""


def measure(run: Run) -> Measure:
    """Return how what the trials are chosen by is drawn."""
    percent = "accuracy" in run.metric
    title = {"val_accuracy": "accuracy", "val_nll": "NLL on validation"}.get(run.metric, run.metric)
    return Measure(title, percent=percent, larger_is_better=run.get("search.mode") != "min")


def values(run: Run, trials: Sequence[TrialResult]) -> list[tuple[int, float]]:
    """Return number and metric of the trials that have one."""
    found = [(trial.trial, trial.metric(run.metric)) for trial in trials]
    return [(n, value) for n, value in found if value is not None and math.isfinite(value)]


def bar(estimate: Interval) -> Bar:
    """Return an estimate as it is drawn."""
    return Bar(estimate.value, estimate.low, estimate.high)


def placed(run: Run, trials: Sequence[TrialResult]) -> list[Place]:
    """Return T, alpha and metric of the trials that have all three."""
    known = dict(values(run, trials))
    found = [(run.setting(trial), known.get(trial.trial)) for trial in trials]
    return [(*at, value) for at, value in found if at is not None and value is not None]


def completed(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials that ran to their end: what others reached is of fewer epochs."""
    return [trial for trial in trials if trial.status == "completed"]


@lru_cache(maxsize=64)  # a run that goes on is drawn again and again
def _response(points: tuple[Place, ...], ranges: tuple[Ends, Ends]) -> Response | None:
    return fit_response(points, temperatures=ranges[0], alphas=ranges[1])


def response(run: Run, trials: Sequence[TrialResult]) -> tuple[Surface | None, str]:
    """Return the response that is fitted to the completed trials, and in words where it is best.

    Both are of a search; none and nothing where the trials do not settle a surface.
    """
    sign = 1 if measure(run).larger_is_better else -1
    points = tuple((t, alpha, sign * value) for t, alpha, value in placed(run, completed(trials)))
    ranges = [
        search_range([point[column] for point in points], run.searched(key))
        for column, key in enumerate(DISTILL)
    ]
    found = _response(points, (ranges[0], ranges[1]))
    if found is None or min(len(found.temperatures), len(found.alphas)) < 2:
        return None, ""
    values = [[sign * value for value in row] for row in zip(*found.mean, strict=True)]
    t, alpha = found.best_temperature, found.best_alpha
    return Surface(found.temperatures, found.alphas, values), (
        f"The fitted surface is best at T {t.value:.3g} [{t.low:.3g}, {t.high:.3g}], "
        f"alpha {alpha.value:.2f} [{alpha.low:.2f}, {alpha.high:.2f}]."
    )
