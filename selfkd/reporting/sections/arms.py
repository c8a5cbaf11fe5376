"""The figures of a capacity curve and of a study."""

from __future__ import annotations

from collections.abc import Iterator

from selfkd.reporting import words
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import Bar, Level
from selfkd.reporting.read import Run
from selfkd.reporting.sections.panels import Panel, Section, bar, measure_of
from selfkd.reporting.tables import capacity_table, study_table
from selfkd.results import find_metric


def capacity_sections(run: Run) -> Iterator[Section]:
    """Yield the test metric over parameters, from labels only and distilled."""
    if run.capacity_summary is None:
        return
    summary, metric = run.capacity_summary, find_metric(run.data.tested)
    arms = [
        (name, number, [(size.parameters, bar(pick.interval), pick.runs) for size, pick in picked])
        for name, number, picked in (
            ("labels only", 0, [(size, size.labels) for size in summary.sizes]),
            ("distilled", 1, [(size, size.distilled) for size in summary.sizes]),
        )
    ]
    teacher = summary.teacher.metric(run.data.tested)
    means = "; ".join(
        f"{words.size(size.parameters)}: {metric.value(size.labels.value)} and "
        f"{metric.value(size.distilled.value)}"
        for size in summary.sizes
    )
    yield Section(
        "",
        (
            Panel(
                f"{metric.label[:1].upper()}{metric.label[1:]} over parameters",
                f"Labels only and distilled on test, with 95 % intervals over seeds: {means}. "
                f"The dotted line is the teacher, {words.value(teacher, run.data.tested)}.",
                charts.over_parameters(
                    arms, measure=measure_of(run.data.tested), reference=teacher
                ),
                capacity_table(summary, run.data.metric),
            ),
        ),
    )


def study_sections(run: Run) -> Iterator[Section]:
    """Yield the test metric of each arm."""
    if run.study_summary is None:
        return
    study = run.study_summary
    tested = study.metric or run.data.tested
    metric, measure = find_metric(tested), measure_of(tested)
    levels = [
        Level(
            arm.name,
            bar(arm.mean),
            [value for row in arm.runs if (value := row.metric(tested)) is not None],
        )
        for arm in study.arms
    ]
    members = study.members
    if members is not None and (value := members.metric(tested)) is not None:
        levels.append(Level(f"members ({members.count})", Bar(value), (), 0))
    means = "; ".join(f"{arm.name} {metric.value(arm.mean.value)}" for arm in study.arms)
    yield Section(
        "",
        (
            Panel(
                "Arms side by side",
                words.sentence(
                    f"{measure.title} with 95 % intervals over the seeds that all share: {means}"
                ),
                charts.levels(levels, measure=measure),
                study_table(study, run.data.metric),
            ),
        ),
    )
