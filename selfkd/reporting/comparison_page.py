"""Several runs side by side: tables, figures, one page; flat records for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from selfkd.analysis.deploy import flat_row
from selfkd.reporting import words
from selfkd.reporting.across_runs import (
    Across,
    Arm,
    Comparison,
    across,
    are_repeats,
    compare,
    last_arm,
)
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import Bar, Level, Line
from selfkd.reporting.page import Page
from selfkd.reporting.read import Run
from selfkd.reporting.sections.panels import Panel, Section, bar, measure_of
from selfkd.reporting.tables import Table
from selfkd.results import Interval, Seeds, find_metric, key_on_test, title, to_row

Record = dict[str, Any]
FIRST = ("run", "command", "finished", "row", "temperature", "alpha")
LAST = ("agreement", "seeds", "mean", "low", "high", "parameters", "trials", "seconds")


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Return how each further run differs from the first; none of runs that only repeat it."""
    if are_repeats(runs):
        return []
    found = [compare(run, runs[0]) for run in runs[1:]]
    return [each for each in found if each is not None]


def repeats(runs: Sequence[Run]) -> list[Across]:
    """Return the generations over runs that differ in their seed alone."""
    return across(runs) if are_repeats(runs) else []


def runs_table(runs: Sequence[Run]) -> Table:
    """Return a row a run: its data and network, and its last generation, or student."""
    tested = words.short_metric(runs[0].data.tested)
    head = ("run", "data", "network", "model", "val", tested, "fresh seeds", "ensemble")
    rows = [_run_row(run, runs[0].data.tested) for run in runs]
    return Table((*head, "trained", "state"), tuple(rows)).without_empty()


def _run_row(run: Run, tested: str) -> tuple[str, ...]:
    """Return the row of a run, which names its metric where it is not that of the head."""
    last = last_arm(run) or Arm("", None, None)
    metric = run.data.tested
    ensemble = run.ensemble.metric(metric) if run.ensemble else None

    def named(text: str) -> str:
        return text if metric == tested or not text else f"{find_metric(metric).short} {text}"

    return (
        *(
            run.name,
            str(run.get("data.name", "")),
            (run.student_names or [str(run.get("model.name", ""))])[-1],
        ),
        *(last.name, words.measured(run, last.val), named(words.value(last.test, metric))),
        *(named(words.mean(last.mean, metric)), named(words.value(ensemble, metric))),
        str(run.trained),
        "finished" if run.finished else "unfinished",
    )


def repeats_table(rows: Sequence[Across], metric: str) -> Table:
    """Return the test metric by generation over runs of one config."""
    return Table(
        ("", words.short_metric(metric), f"vs gen. 0{words.difference_head(metric)}"),
        tuple(
            (row.name, words.mean(row.mean, metric), words.bare_difference(row.first, metric))
            for row in rows
        ),
        f"Mean and 95 % interval over {len(rows[0].values)} runs that differ in their seed "
        "alone; differences paired by run.",
    )


def comparisons_table(rows: Sequence[Comparison]) -> Table:
    """Return how each run differs from the first."""
    metric = rows[0].metric
    return Table(
        ("run", "against", f"{words.short_metric(metric)}{words.difference_head(metric)}", "of"),
        tuple(
            (r.run, r.reference, words.bare_difference(r.difference, r.metric), r.why) for r in rows
        ),
        texts=True,
    )


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Return the differences between runs as sentences."""
    found = [_sentence(each) for each in comparisons(runs)]
    for row in repeats(runs)[1:]:
        gain = row.first or Interval(0)
        why = f"paired in {len(runs)} runs that differ in their seed alone"
        compared = Comparison(row.name, "generation 0", gain, True, why, runs[0].data.tested)
        found.append(words.sentence(compared.verdict))
    return found or ["There is nothing to compare yet."]


def _sentence(comparison: Comparison) -> str:
    """Return a verdict as a sentence without a capital for a run's name."""
    text = comparison.verdict
    return words.sentence(text) if text.startswith("no evidence") else f"{text}."


def comparison_page(runs: Sequence[Run]) -> Page:
    """Return the page of several runs."""
    unfinished = [run.name for run in runs if not run.finished]
    status = f"unfinished: {', '.join(unfinished)}" if unfinished else "finished"
    levels = _levels(runs)
    label = find_metric(runs[0].data.tested).label
    parts = [
        Section(f"{label[:1].upper()}{label[1:]}", tuple(levels[1:])),
        Section("Differences", tuple(_differences(runs))),
    ]
    return Page(
        kind="comparison of runs",
        title=" · ".join(run.name for run in runs),
        status=status,
        finished=not unfinished,
        headlines=verdicts(runs),
        facts=[],
        problems=[problem for run in runs for problem in run.problems],
        results=runs_table(runs),
        lead=levels[0] if levels else None,
        sections=[part for part in parts if part.panels],
        appendices=[],
    )


def _levels(runs: Sequence[Run]) -> list[Panel]:
    """Return the figures of the test metric: of those runs that have that of the first."""
    panels, tested = [], runs[0].data.tested
    metric, measure = find_metric(tested), measure_of(tested)
    alike = [(place, run) for place, run in enumerate(runs) if run.data.tested == tested]
    arms = [(place, run, last_arm(run)) for place, run in alike]
    levels = [
        Level(
            run.name,
            bar(last.mean) if last.mean else Bar(last.test),
            last.values,
            place,
        )
        for place, run, last in arms
        if last is not None and last.test is not None
    ]
    if levels:
        of_each = "; ".join(f"{level.name} {metric.value(level.bar.value)}" for level in levels)
        text = words.sentence(f"{measure.title} of the last model of each run: {of_each}")
        panels.append(
            Panel(
                "Last model of each run",
                f"{text} Dots with an interval are means over fresh seeds, the others one "
                "model each.",
                charts.levels(levels, measure=measure),
                runs_table(runs),
            )
        )
    lines = [
        Line(
            run.name,
            [r.generation for r in known],
            [r.metric(tested) for r in known],
            place,
        )
        for place, run in alike
        if (known := [r for r in run.results if tested in r.metrics])
    ]
    if lines:
        numbers = sorted({int(x) for line in lines for x in line.x})
        by_run = [dict(zip(line.x, line.y, strict=True)) for line in lines]
        rows = [(str(k), *(words.value(of.get(k), tested) for of in by_run)) for k in numbers]
        panels.append(
            Panel(
                f"Test {metric.label} per generation",
                "Of the chosen models, one a generation and run.",
                charts.curves(lines, x="generation", measure=measure),
                Table(("generation", *(line.name for line in lines)), tuple(rows)),
            )
        )
    return panels


def _differences(runs: Sequence[Run]) -> list[Panel]:
    metric = runs[0].data.tested
    measure = replace(measure_of(metric), title=f"difference in {title(metric)}")
    found, repeated = comparisons(runs), repeats(runs)
    panels = []
    if found:
        levels = [Level(f"{row.run} − {row.reference}", bar(row.difference)) for row in found]
        panels.append(
            Panel(
                f"Against {runs[0].name}",
                " ".join(_sentence(row) for row in found),
                charts.levels(levels, measure=measure, reference=0),
                comparisons_table(found),
            )
        )
    if len(repeated) > 1:
        levels = [
            Level(row.name, bar(row.first), number=place + 1)
            for place, row in enumerate(repeated[1:])
            if row.first
        ]
        unit = f" {find_metric(metric).unit}".rstrip()
        gains = "; ".join(
            f"{row.name} {words.bare_difference(row.first, metric)}{unit}" for row in repeated[1:]
        )
        panels.append(
            Panel(
                "Generations against generation 0 of the same run",
                f"{gains}.",
                charts.levels(levels, measure=measure, reference=0),
                repeats_table(repeated, metric),
            )
        )
    return panels


def record_fields(runs: Sequence[Run]) -> list[str]:
    """Return the names of the columns of flat rows."""
    of_runs = [
        [f"val_{run.data.metric}", run.data.tested, *map(key_on_test, run.data.further)]
        for run in runs
    ]
    names = dict.fromkeys(name for names in of_runs for name in names if name not in LAST)
    return [*FIRST, *names, *LAST]


def records(run: Run) -> list[Record]:
    """Return a run as flat rows for programs: generations and ensemble, or its table's rows."""
    same = {"run": run.name, "command": run.command, "finished": run.finished}
    rows: list[Record] = []
    for generation in run.generations:
        if generation.result is None:
            continue
        row = to_row(generation.result)
        confirmed = generation.confirmation
        if confirmed is not None:
            mean = confirmed.mean
            row |= {"mean": mean.value, "low": mean.low, "high": mean.high}
            row["seeds"] = len(confirmed.seeds)
        rows.append({**row, **same, "row": f"generation {generation.number}"})
    if run.ensemble is not None:
        rows.append({**to_row(run.ensemble), **same, "row": "ensemble of all"})
    for measured in run.ensemble_summary.rows if run.ensemble_summary else ():
        row = to_row(measured)
        rows.append({**row, **same, "row": measured.name, "seeds": len(measured.runs) or None})
    for size in run.capacity_summary.sizes if run.capacity_summary else ():
        for name, arm in (("labels only", size.labels), ("distilled", size.distilled)):
            rows.append(
                {
                    **same,
                    "row": f"{size.value}, {name}",
                    "parameters": size.parameters,
                    **_ends(arm),
                }
            )
    for each in run.study_summary.arms if run.study_summary else ():
        rows.append({**same, "row": each.name, **_ends(each.mean), "seeds": len(each.runs)})
    for form in run.deploy_summary.rows if run.deploy_summary else ():
        row = flat_row(form)
        ends = {"low": row.get("mean_low"), "high": row.get("mean_high")}
        rows.append({**row, **ends, **same, "row": f"deployed, {form.title}"})
    return [{field: row.get(field) for field in record_fields([run])} for row in rows]


def _ends(estimate: Interval | Seeds) -> Record:
    found: Record = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
    return {**found, "seeds": len(estimate.runs)} if isinstance(estimate, Seeds) else found
