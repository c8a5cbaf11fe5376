"""A figure with its words and its table, and what the figures of all runs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from selfkd.analysis.response import EVIDENCE, Response, fit_response, search_range
from selfkd.reporting.figures.style import Bar, Figure, Measure, Setting, Surface
from selfkd.reporting.read import DISTILL, Run
from selfkd.reporting.sections.gallery import Gallery
from selfkd.reporting.tables import Table
from selfkd.results import Interval, TrialResult, find_metric

TrialPoint = tuple[float, float, float]
"""Temperature, alpha, and the metric of a trial there."""
Ends = tuple[float, float] | None
SPLITS = {"val_": " on validation", "test_": " on test"}


@dataclass(frozen=True)
class Panel:
    """A figure with its words and its table."""

    title: str
    text: str
    figure: Figure | None
    """None where the table says it better; it is not folded then."""
    table: Table


@dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    title: str
    """Title; empty of the panel that stands on the first screen."""
    panels: tuple[Panel, ...]
    text: str = ""
    findings: Sequence[str] = ()
    """Sentences below the title."""
    links: Sequence[tuple[str, str]] = ()
    """Files by name, with their addresses beside the report."""
    gallery: Gallery | None = None
    """Pictures below the panels."""


def measure(run: Run) -> Measure:
    """Return the measure of the metric that trials are chosen by."""
    found = replace(measure_of(run.metric), larger_is_better=run.mode == "max")
    return replace(found, title="accuracy") if run.metric == "val_accuracy" else found


def measure_of(name: str) -> Measure:
    """Return the measure of a metric by its name in rows.

    >>> measure_of("test_accuracy").title, measure_of("val_nll").title, measure_of("f1").title
    ('accuracy on test', 'NLL on validation', 'f1')
    """
    metric = find_metric(name)
    split = SPLITS.get(name.removesuffix(metric.name), "")
    return Measure(
        f"{metric.label}{split}",
        percent=metric.is_fraction,
        larger_is_better=metric.mode == "max",
        unit="" if metric.is_fraction else metric.unit,
    )


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


def settings(
    run: Run, number: int, trials: Sequence[TrialResult], chosen: TrialResult | None
) -> list[Setting]:
    """Return the trials of a generation over T and alpha, against the mean of those completed."""
    whole = [value for *_, value in trial_points(run, completed(trials))]
    points = trial_points(run, trials)
    mean = sum(whole) / len(whole) if whole else (points[0][2] if points else 0.0)
    name = f"generation {number}, " if number else ""
    known = {trial.trial: trial for trial in trials}
    found = []
    for place, value in values(run, trials):
        at = run.setting(known[place])
        if at is None:
            continue
        best = chosen is not None and place == chosen.trial
        tip = (
            f"{name}trial {place}: T {at[0]:.3g}, alpha {at[1]:.2f}, {measure(run).text(value)}"
            + (", chosen" if best else "")
        )
        found.append(Setting(*at, value - mean, str(number or place), tip, best))
    return found


def response(
    run: Run, searches: Sequence[tuple[int, Sequence[TrialResult]]]
) -> tuple[Surface | None, str]:
    """Return the response that is fitted to the completed trials of searches, and its best point.

    Each trial counts by its metric less the mean of its search. The surface is None where the
    trials do not suffice, or do not show that T or alpha matters; the text says so.
    """
    sign = 1 if measure(run).larger_is_better else -1
    found = [
        (each.temperature, each.alpha, sign * each.value)
        for number, trials in searches
        for each in settings(run, number, completed(trials), None)
    ]
    ranges = [
        search_range([point[column] for point in found], run.searched(key))
        for column, key in enumerate(DISTILL)
    ]
    fitted = _response(tuple(found), (ranges[0], ranges[1]))
    if fitted is None:
        return None, ""
    matters = [e.probability for e in (fitted.temperature, fitted.alpha) if e is not None]
    if max(matters, default=0.0) < EVIDENCE:
        return None, "The trials do not show that T or alpha matters here, so no surface is drawn."
    t, alpha = fitted.best_temperature, fitted.best_alpha
    text = (
        f"The fitted surface is best at T {t.value:.3g} [{t.low:.3g}, {t.high:.3g}], "
        f"alpha {alpha.value:.2f} [{alpha.low:.2f}, {alpha.high:.2f}]."
    )
    if min(len(fitted.temperatures), len(fitted.alphas)) < 2:
        return None, text
    surface = [[sign * value for value in row] for row in zip(*fitted.mean, strict=True)]
    return Surface(fitted.temperatures, fitted.alphas, surface), text
