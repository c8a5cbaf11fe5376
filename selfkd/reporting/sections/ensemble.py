"""The figures of a run of `selfkd.ensemble`: many teachers, one student."""

from __future__ import annotations

from collections.abc import Iterator

from selfkd.reporting import tables, words
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import Bar, Level, Line
from selfkd.reporting.read import Run
from selfkd.reporting.sections.diagnostics import diagnosis_sections
from selfkd.reporting.sections.panels import (
    Panel,
    Section,
    measure,
    measure_of,
    response,
    settings,
)
from selfkd.reporting.tables import Table
from selfkd.results import TrialResult, title


def ensemble_sections(run: Run) -> Iterator[Section]:
    """Yield the test metric and share of the gain, T and alpha, learning, calibration, classes."""
    yield Section("", tuple(_models(run)))
    yield Section("Gain kept", tuple(_share(run)))
    yield Section("Search on validation", tuple(_student_map(run)))
    yield Section("Learning", tuple(_student_learning(run)))
    yield from diagnosis_sections(run)


def _models(run: Run) -> Iterator[Panel]:
    """Yield the test metric of the teachers and of the students, whose rows are the last."""
    if run.ensemble_summary is None:
        return
    tested, shown = run.data.tested, measure_of(run.data.tested)
    rows = [row for row in run.ensemble_summary.rows if tested in row.metrics]
    of_students = sum(row.name.startswith("student") for row in rows)
    numbers = [0] * (len(rows) - of_students) + [2] * (of_students - 1) + [1] * (of_students > 0)
    levels = [
        Level(row.name, Bar(row.metrics[tested], row.low, row.high), row.runs, number)
        for row, number in zip(rows, numbers, strict=True)
    ]
    yield Panel(
        "Teachers and student",
        words.sentence(
            f"{shown.title}, with 95 % intervals where several models were trained: "
            + "; ".join(f"{row.name} {words.value(row.metric(tested), tested)}" for row in rows)
        ),
        charts.levels(levels, measure=shown),
        tables.ensemble_table(run.ensemble_summary.rows, run.data.metric, run.data.further),
    )


def _share(run: Run) -> Iterator[Panel]:
    summary = run.ensemble_summary
    if summary is None or summary.share is None:
        return
    share, tested = summary.share, run.data.tested
    gains = {
        "labels only": summary.gain,
        "distilled without the transfer set": summary.transfer_gain,
    }
    table = Table(
        ("", "value and 95 % interval"),
        (
            *(
                (f"student over {name}, {title(tested)}", words.difference(gain, tested))
                for name, gain in gains.items()
                if gain is not None
            ),
            ("share of the teacher's gain kept", words.difference(share)),
            *(
                ("score and size kept", text)
                for text in words.describe_student_kept(summary, run.data.metric)
            ),
        ),
    )
    yield Panel(
        "Share of the teacher's gain that the student keeps",
        f"Labels only stands at 0 %, the teacher at 100 %: {words.difference(share)}.",
        None,
        table,
    )


def _student_map(run: Run) -> Iterator[Panel]:
    trials, chosen = run.stages.get("student", ()), _chosen_trial(run)
    points = settings(run, 0, trials, chosen)
    if not points:
        return
    setting = run.setting(chosen) if chosen else None
    text = f"{len(points)} trials, each with its number" + (
        f"; chosen, ringed: T {setting[0]:.3g}, alpha {setting[1]:.2f}" if setting else ""
    )
    surface, best = response(run, [(0, trials)])
    yield Panel(
        "The student's trials over T and alpha",
        f"{text}; colour: {title(run.metric)} against their mean. {best}".strip(),
        charts.setting_map(points, measure=measure(run), surface=surface),
        tables.trials_table(run, trials, chosen.trial if chosen else None),
    )


def _chosen_trial(run: Run) -> TrialResult | None:
    if run.ensemble_summary is None:
        return None
    digest = run.ensemble_summary.chosen.hash
    return next((t for t in run.stages.get("student", ()) if t.hash == digest), None)


def _student_learning(run: Run) -> Iterator[Panel]:
    trials = run.stages.get("student", ())
    curves = [
        {row.epoch: v for row in t.history if (v := row.metric(run.metric)) is not None}
        for t in trials
    ]
    kept = [(t, curve) for t, curve in zip(trials, curves, strict=True) if curve]
    if not kept:
        return
    names = [f"trial {trial.trial}" for trial, _ in kept]
    chosen = _chosen_trial(run)
    yield Panel(
        "The student's trials by epoch",
        words.sentence(
            f"{title(run.metric)} of each trial by epoch"
            + (f"; trial {chosen.trial} was chosen" if chosen else "")
        ),
        charts.curves(
            [
                Line(name, list(curve), list(curve.values()), place + 1)
                for place, (name, (_, curve)) in enumerate(zip(names, kept, strict=True))
            ],
            x="epoch",
            measure=measure(run),
        ),
        tables.epoch_table(names, [curve for _, curve in kept], words.form(run.metric)),
    )
