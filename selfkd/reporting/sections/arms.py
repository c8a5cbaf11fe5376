"""The figures of a capacity curve and of a study."""

from __future__ import annotations

from collections.abc import Iterator

from selfkd.reporting import words
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import Bar, Level, Measure
from selfkd.reporting.read import Run
from selfkd.reporting.sections.panels import Panel, Section, bar
from selfkd.reporting.tables import capacity_table, study_table

ACCURACY = Measure("accuracy on test")


def capacity_sections(run: Run) -> Iterator[Section]:
    """Yield accuracy over parameters, from labels only and distilled."""
    if run.capacity_summary is None:
        return
    summary = run.capacity_summary
    arms = [
        (name, number, [(size.parameters, bar(pick.interval), pick.runs) for size, pick in picked])
        for name, number, picked in (
            ("labels only", 0, [(size, size.labels) for size in summary.sizes]),
            ("distilled", 1, [(size, size.distilled) for size in summary.sizes]),
        )
    ]
    teacher = summary.teacher.metric("test_accuracy")
    accuracies = "; ".join(
        f"{words.size(size.parameters)}: {words.percent(size.labels.value)} and "
        f"{words.percent(size.distilled.value)}"
        for size in summary.sizes
    )
    yield Section(
        "",
        (
            Panel(
                "Accuracy over parameters",
                f"Labels only and distilled on test, with 95 % intervals over seeds: {accuracies}. "
                f"The dotted line is the teacher, {words.percent(teacher)}.",
                charts.over_parameters(arms, measure=ACCURACY, reference=teacher),
                capacity_table(summary),
            ),
        ),
    )


def study_sections(run: Run) -> Iterator[Section]:
    """Yield the accuracy of each arm."""
    if run.study_summary is None:
        return
    study = run.study_summary
    levels = [
        Level(
            arm.name,
            bar(arm.mean),
            [value for run in arm.runs if (value := run.metric("test_accuracy")) is not None],
        )
        for arm in study.arms
    ]
    members = study.members
    if members is not None and (accuracy := members.metric("test_accuracy")) is not None:
        levels.append(Level(f"members ({members.count})", Bar(accuracy), (), 0))
    means = "; ".join(f"{arm.name} {words.percent(arm.mean.value)}" for arm in study.arms)
    yield Section(
        "",
        (
            Panel(
                "Arms side by side",
                f"Accuracy on test with 95 % intervals over the seeds that all share: {means}.",
                charts.levels(levels, measure=ACCURACY),
                study_table(study),
            ),
        ),
    )
