"""A figure with its words and its table; what figures of a run have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import plotly.graph_objects as go

from selfkd.reporting.marks import Bar, Measure, Surface
from selfkd.reporting.read import Run
from selfkd.reporting.schema import Estimate, Trial
from selfkd.reporting.tables import Table
from selfkd.surface import Response, fit_response

Place = tuple[float, float, float]
"""Temperature, alpha, and what was reached there."""


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


def values(run: Run, trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """Return number and metric of the trials that have one."""
    found = [(trial.trial, trial.value(run.metric)) for trial in trials]
    return [(n, value) for n, value in found if value is not None and math.isfinite(value)]


def bar(estimate: Estimate) -> Bar:
    """Return an estimate as it is drawn."""
    return Bar(estimate.value_, estimate.low, estimate.high)


def placed(run: Run, trials: Sequence[Trial]) -> list[Place]:
    """Return T, alpha and metric of the trials that have all three."""
    known = dict(values(run, trials))
    found = [(run.setting(trial), known.get(trial.trial)) for trial in trials]
    return [(*at, value) for at, value in found if at is not None and value is not None]


@lru_cache(maxsize=64)  # a run that goes on is drawn again and again
def _response(points: tuple[Place, ...]) -> Response | None:
    return fit_response(points)


def surface(points: Sequence[Place]) -> Surface | None:
    """Return the response that is fitted to trials; None where they do not settle a surface."""
    found = _response(tuple(points))
    if found is None or min(len(found.temperatures), len(found.alphas)) < 2:
        return None
    return Surface(found.temperatures, found.alphas, list(zip(*found.mean, strict=True)))


def tell_surface(points: Sequence[Place]) -> str:
    """Return in words where the fitted response is best; nothing where there is none."""
    found = _response(tuple(points))
    if found is None or surface(points) is None:
        return ""
    t, alpha = found.best_temperature, found.best_alpha
    return (
        f"The fitted surface is best at T {t.value:.3g} [{t.low:.3g}, {t.high:.3g}], "
        f"alpha {alpha.value:.2f} [{alpha.low:.2f}, {alpha.high:.2f}]."
    )
