"""Tables that the commands print: of generations, and the columns of others that come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfkd.analysis.verdicts import count
from selfkd.reporting import words
from selfkd.reporting.tables import (
    FURTHER,
    Table,
    further_head,
    measures,
    sizes_by_generation,
)
from selfkd.results import (
    Confirmation,
    ControlResult,
    GenerationResult,
    GenerationsSummary,
    find_metric,
    with_agreement,
)


def summary_table(summary: GenerationsSummary, metric: str) -> Table:
    """Return a row a generation: its test metric over fresh seeds, and its gain, come first.

    Args:
        summary: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`; that of the search where
            there is no test split, as with a user's training function.
    """
    confirmed = {row.generation: row for row in summary.confirmations}
    sizes = sizes_by_generation(summary.generations)
    rows = [
        (
            str(result.generation),
            *_replicated(confirmed.get(result.generation), result, metric, alone=summary.alone),
            *_setting(result),
            sizes.get(result.generation, ""),
        )
        for result in summary.generations
    ]
    rules = []
    if summary.ensemble is not None:
        rules = [len(rows)]
        rows.append(("ensemble of all", measures(summary.ensemble, metric)[1], "", "", "", ""))
    for control in summary.controls:
        rules = rules or [len(rows)]
        rows.append((control.title, *_replicated(control, None, metric), "", "", ""))
    seeds = max((len(row.seeds) for row in summary.confirmations), default=0)
    lineages = summary.verdict is not None and summary.verdict.covers == "lineages"
    over = f", {count(seeds, 'lineage' if lineages else 'seed')}" if seeds else ""
    replicated = summary.confirmations[0].metric if summary.confirmations else metric
    larger = find_metric(replicated).mode == "max"  # else what is better is below 0
    gain = f"{'gain' if larger else 'vs gen. 0'}{words.difference_head(replicated)}"
    head = ("generation", f"{_title(summary, metric)}{over}", gain, "T", "alpha", "parameters")
    return Table(head, tuple(rows), rules=tuple(rules)).without_empty()


def _title(summary: GenerationsSummary, metric: str) -> str:
    """Return the name of the metric in words that a column has room for."""
    known = summary.generations[0].metrics if summary.generations else {}
    metric = summary.confirmations[0].metric if summary.confirmations else metric
    tested = metric.startswith("test_") or f"test_{metric}" in known
    metric = metric.removeprefix("test_")
    return f"test {words.short_metric(metric)}" if tested else words.short_metric(metric)


def _replicated(
    row: Confirmation | ControlResult | None,
    result: GenerationResult | None,
    metric: str,
    *,
    alone: bool = False,
) -> tuple[str, str]:
    """Return the mean over fresh seeds and the gain over generation 0, else the chosen model's."""
    if row is not None:
        return words.confirmed(row), words.gained(row, "first")
    if result is None:
        return "", ""
    tested = f"test_{metric}" if f"test_{metric}" in result.metrics else metric
    one = " (one model)" if alone else ""  # beside means over fresh seeds
    return f"{words.value(result.metric(tested), tested)}{one}", ""


def _setting(result: GenerationResult) -> tuple[str, str]:
    return words.number(result.temperature, ".2f"), words.number(result.alpha, ".2f")


def chosen_table(
    summary: GenerationsSummary, metric: str, further: Sequence[str] = FURTHER
) -> Table:
    """Return a row a generation of the models that were chosen, then their ensemble.

    Args:
        summary: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`.
        further: Further metrics, see `Facts.further`.
    """
    short = words.short_metric(metric)
    tests = {row.generation: row.mcnemar.p for row in summary.confirmations if row.mcnemar}
    columns = with_agreement(further)
    head = ("chosen", f"val {short}", f"test {short}", *further_head(columns), "McNemar")
    rows = [
        (
            str(result.generation),
            *measures(result, metric, columns),
            words.number(tests.get(result.generation), ".2g"),
            f"{result.seconds:.1f}",
        )
        for result in summary.generations
    ]
    if summary.ensemble is not None:
        rows.append(("ensemble", *measures(summary.ensemble, metric, columns), "", ""))
    rules = (len(summary.generations),)
    return Table((*head, "seconds"), tuple(rows), rules=rules).without_empty()


def own_metrics_table(results: Sequence[GenerationResult], metric: str) -> Table:
    """Return the table of generations of a user's training function: a column a metric."""
    names = [metric, *(name for name in results[-1].metrics if name != metric)]
    rows = [
        (
            str(result.generation),
            *_setting(result),
            *(words.number(result.metric(name), ".4g") for name in names),
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    return Table(("generation", "T", "alpha", *names, "seconds"), tuple(rows))


def pick(table: Table, *columns: str) -> Table:
    """Return a table with some of its columns, in the order that is given."""
    kept = [table.head.index(column) for column in columns if column in table.head]
    return replace(
        table,
        head=tuple(table.head[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
    )
