"""The figures of sizes side by side (capacity) and of arms side by side (a study)."""

from __future__ import annotations

from collections.abc import Iterator

from selfkd.reporting import words
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import ACCENT, NEUTRAL, Bar, Level, Measure
from selfkd.reporting.read import Run
from selfkd.reporting.sections.panels import Panel, Section, bar
from selfkd.reporting.tables import capacity_table, study_table

ACCURACY = Measure("accuracy on test")


def curve_sections(run: Run) -> Iterator[Section]:
    """Yield accuracy over parameters, from labels only and distilled."""
    if run.capacity_summary is None:
        return
    curve = run.capacity_summary
    arms = [
        (name, colour, [(size.parameters, bar(pick.interval), pick.runs) for size, pick in picked])
        for name, colour, picked in (
            ("labels only", NEUTRAL, [(size, size.labels) for size in curve.sizes]),
            ("distilled", ACCENT, [(size, size.distilled) for size in curve.sizes]),
        )
    ]
    teacher = curve.teacher.metric("test_accuracy")
    told = "; ".join(
        f"{words.size(size.parameters)}: {words.percent(size.labels.value)} and "
        f"{words.percent(size.distilled.value)}"
        for size in curve.sizes
    )
    yield Section(
        "Accuracy",
        (
            Panel(
                "Accuracy over parameters",
                f"Labels only and distilled on test, with 95 % intervals over seeds: {told}. The "
                f"dotted line is the teacher, {words.percent(teacher)}.",
                charts.over_parameters(arms, measure=ACCURACY, reference=teacher),
                capacity_table(curve),
            ),
        ),
    )


def study_sections(run: Run) -> Iterator[Section]:
    """Yield accuracy of the arms."""
    if run.study_summary is None:
        return
    study = run.study_summary
    drawn = [
        Level(arm.name, bar(arm.mean), tuple(run.metrics["test_accuracy"] for run in arm.runs))
        for arm in study.arms
    ]
    if study.members is not None and study.members.metric("test_accuracy") is not None:
        whole = Bar(study.members.metrics["test_accuracy"])
        drawn.append(Level(f"members ({study.members.count})", whole, (), NEUTRAL))
    told = "; ".join(f"{arm.name} {words.percent(arm.mean.value)}" for arm in study.arms)
    yield Section(
        "Accuracy",
        (
            Panel(
                "Arms side by side",
                f"Accuracy on test with 95 % intervals over the seeds that all share: {told}.",
                charts.levels(drawn, measure=ACCURACY),
                study_table(study),
            ),
        ),
    )
