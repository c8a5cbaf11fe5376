"""What is served of a run: its table, what it costs, and its files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from urllib.parse import quote

from selfkd.analysis.statistics import mean_interval
from selfkd.reporting import words
from selfkd.reporting.deploy_table import deploy_table, short_name
from selfkd.reporting.figures.costs import Costed, over_costs
from selfkd.reporting.figures.style import Bar, Figure
from selfkd.reporting.read import Run
from selfkd.reporting.sections.panels import Panel, Section, bar, measure_of
from selfkd.results import DeployRow, DeploySummary

FORMS = "Each beside the float file, on one machine: smaller and faster, or not, and at what cost."


def deploy_sections(run: Run) -> Iterator[Section]:
    """Yield what was deployed of a run; on the first screen where it is all that the run did."""
    summary = run.deploy_summary
    if summary is None:
        return
    files = [(name, f"./{quote(file)}") for name, file in summary.files.items()]
    if run.command == "deploy":  # whose headlines are the sentences
        yield Section("", (_costs(run, summary),))
        yield Section("Files", (), links=files)
        return
    sentences = tuple(map(words.sentence, [*summary.sentences[:1], *_stale(run, summary)]))
    sentences += tuple(map(words.sentence, summary.sentences[1:]))
    table = Panel("Forms of the model", FORMS, None, deploy_table(summary, run.data))
    yield Section("Deployed", (table,), findings=sentences, links=files)
    yield Section("Size and time", (_costs(run, summary),))


def _stale(run: Run, summary: DeploySummary) -> Iterator[str]:
    """Yield that another generation is the best, as after a run was continued."""
    if run.best is not None and run.best.hash != summary.model:
        best = f"generation {run.best.generation}"
        yield f"what was deployed is {summary.title}, and the best of the run is {best}"


def _costs(run: Run, summary: DeploySummary) -> Panel:
    tested = f"test_{summary.metric}"
    shown = measure_of(tested)
    return Panel(
        f"{shown.title[:1].upper()}{shown.title[1:]} over size and time",
        "Each form of the model; further to the left is smaller, or faster.",
        _figure(summary, tested),
        deploy_table(summary, run.data),
    )


def _figure(summary: DeploySummary, tested: str) -> Figure | None:
    rows = [(row, value) for row in summary.rows if (value := _value(row, tested)) is not None]
    batch = min((timing.items for row, _ in rows for timing in row.timings), default=1)
    sizes: list[Costed] = [(short_name(row), row.bytes, value) for row, value in rows if row.bytes]
    times: list[Costed] = [
        (short_name(row), timing.ms, value)
        for row, value in rows
        for timing in row.timings
        if timing.items == batch and timing.ms > 0
    ]
    costs = [("size, bytes", sizes), (f"ms a batch of {batch}", times)]
    known = [(title, points) for title, points in costs if points]
    return over_costs(known, measure=measure_of(tested)) if known else None


def _value(row: DeployRow, tested: str) -> Bar | None:
    if row.values:
        return bar(mean_interval(row.values))
    value = row.metric(tested)
    return None if value is None or not math.isfinite(value) else Bar(value)
