"""The figures of a run of generations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from selfkd.reporting import tables, words
from selfkd.reporting.figures import generations as figures
from selfkd.reporting.figures.style import Bar, Level, Line, Measure, Step, ends_of
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.sections.diagnostics import diagnosis_sections
from selfkd.reporting.sections.panels import (
    Panel,
    Section,
    TrialPoint,
    bar,
    completed,
    measure,
    response,
    trial_points,
    values,
)
from selfkd.results import TrialResult


def generation_sections(run: Run) -> Iterator[Section]:
    """Yield accuracy, T and alpha, learning curves, calibration and classes."""
    yield Section("Accuracy", tuple(_accuracy(run)))
    yield Section(
        "Temperature and alpha",
        tuple(_maps(run)),
        "Each dot is a trial, the ring the chosen one; the background is a Gaussian process that "
        "is fitted to the trials where they are enough. All maps share one scale of colours.",
    )
    yield Section("Learning", tuple(_learning(run)))
    yield from diagnosis_sections(run)


def _accuracy(run: Run) -> Iterator[Panel]:
    own = "accuracy" not in run.metric  # the test accuracy has another scale then
    steps = [
        Step(
            number=generation.number,
            trials=values(run, generation.trials),
            chosen=_chosen_value(run, generation),
            test=None
            if own or not generation.result
            else generation.result.metric("test_accuracy"),
            confirmed=_confirmed(run, generation, own=own),
        )
        for generation in run.generations
    ]
    ensemble = run.ensemble.metric("test_accuracy") if run.ensemble and not own else None
    controls = () if own else tuple(Level(c.title, bar(c.mean)) for c in run.controls)
    figure = figures.accuracy_per_generation(
        steps, measure=measure(run), ensemble=ensemble, controls=controls
    )
    yield Panel(
        "Accuracy per generation" if not own else f"{run.metric} per generation",
        _accuracy_text(run),
        figure,
        tables.all_trials_table(run),
    )


def _confirmed(run: Run, generation: Generation, *, own: bool) -> Bar | None:
    found = generation.confirmation
    if found is None or (own and found.metric != run.metric):
        return None
    return bar(found.mean)


def _chosen_value(run: Run, generation: Generation) -> tuple[int, float] | None:
    result = generation.result
    value = None if result is None else result.metric(run.metric)
    return None if result is None or value is None else (result.trial, value)


def _accuracy_text(run: Run) -> str:
    results = run.results
    if not results:
        return "Trials of generation 0 on validation; none is chosen yet."
    first, last = results[0], results[-1]
    text = (
        f"From generation {first.generation} to {last.generation}, the chosen model's "
        f"{words.named(run.metric)} goes from {words.measured(run, first.metric(run.metric))} "
        f"to {words.measured(run, last.metric(run.metric))}"
    )
    tested = first.metric("test_accuracy"), last.metric("test_accuracy")
    if None not in tested:
        text += (
            f" and its accuracy on test from {words.percent(tested[0])} to "
            f"{words.percent(tested[1])}"
        )
    return text + ". The choice was made on validation, so that figure is optimistic."


def _maps(run: Run) -> Iterator[Panel]:
    distilled = [generation for generation in run.generations if generation.number > 0]
    found = {generation.number: trial_points(run, generation.trials) for generation in distilled}
    everywhere = [point for points in found.values() for point in points]
    if not everywhere:
        return
    whole = [trial for generation in distilled for trial in completed(generation.trials)]
    bounds = ends_of([value for _, _, value in trial_points(run, whole) or everywhere])
    temperatures = ends_of([t for t, _, _ in everywhere])
    for generation in distilled:
        points, chosen = found[generation.number], _chosen_trial(generation)
        if not points:
            continue
        setting = run.setting(chosen) if chosen else None
        surface, best = response(run, generation.trials)
        figure = figures.setting_map(
            points,
            measure=measure(run),
            chosen=setting,
            bounds=bounds,
            temperatures=temperatures,
            surface=surface,
        )
        yield Panel(
            f"Generation {generation.number}",
            f"{_map_text(run, points, setting)} {best}".strip(),
            figure,
            tables.trials_table(run, generation.trials, chosen.trial if chosen else None),
            small=True,
        )


def _chosen_trial(generation: Generation) -> TrialResult | None:
    if generation.result is None:
        return None
    wanted = generation.result.trial
    return next((trial for trial in generation.trials if trial.trial == wanted), None)


def _map_text(run: Run, points: Sequence[TrialPoint], chosen: tuple[float, float] | None) -> str:
    low, high = ends_of([value for _, _, value in points])
    text = f"{len(points)} trials, from {words.measured(run, low)} to {words.measured(run, high)}"
    if chosen is None:
        return f"{text}; none is chosen yet."
    return f"{text}; chosen: T {chosen[0]:.3g}, alpha {chosen[1]:.2f}."


def _learning(run: Run) -> Iterator[Panel]:
    names = [f"generation {result.generation}" for result in run.results]
    numbers = [result.generation for result in run.results]
    histories = [result.history for result in run.results]
    known = {key for history in histories for row in history for key in row.metrics}
    for key, title, logarithmic in (
        (run.metric, measure(run).title, False),
        ("val_nll", "NLL on validation", True),
        ("hard_loss", "cross-entropy with the labels, training", True),
    ):
        if key not in known or (key == "val_nll" and run.metric == key):
            continue
        curves = [
            {
                row.epoch: value
                for row in history
                if (value := row.metric(key)) is not None and math.isfinite(value)
            }
            for history in histories
        ]
        yield Panel(
            f"{title[:1].upper()}{title[1:]} by epoch",
            words.sentence(
                f"{title} of the chosen models by epoch{_last(names, curves, words.form(key))}"
            ),
            figures.curves(
                [
                    Line(name, list(curve), list(curve.values()), number)
                    for name, curve, number in zip(names, curves, numbers, strict=True)
                ],
                x="epoch",
                measure=Measure(title, percent="accuracy" in key),
                logarithmic=logarithmic and all(v > 0 for c in curves for v in c.values()),
            ),
            tables.epoch_table(names, curves, words.form(key)),
        )


def _last(names: Sequence[str], curves: Sequence[dict[int, float]], form: str) -> str:
    ends = [
        f"{list(curve.values())[-1]:{form}} of {name}"
        for name, curve in zip(names, curves, strict=True)
        if curve
    ]
    return f"; at the end {', '.join(ends)}" if ends else ""
