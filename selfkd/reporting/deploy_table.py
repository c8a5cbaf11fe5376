"""The table of a deployment: each form of the model beside the float file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfkd.analysis.deploy import difference_of, format_ratio, kept_of, shortfalls, size_ratio
from selfkd.analysis.statistics import mean_interval
from selfkd.reporting import words
from selfkd.reporting.table import Table
from selfkd.results import DeployRow, DeploySummary, Facts, Interval, Timing, find_metric


def deploy_table(summary: DeploySummary, facts: Facts) -> Table:
    """Return a row a form of the model; a narrow terminal hides the last columns.

    Args:
        summary: Rows that were measured.
        facts: Facts of the data, which name the further metrics.
    """
    metric = summary.metric
    batches = sorted({timing.items for row in summary.rows for timing in row.timings})
    further = [name for name in _shown(facts) if name not in (metric, "agreement")]
    head = (
        "model",
        f"test {words.short_metric(metric)}",
        "beside float",
        "size",
        *(f"ms, {items}" for items in batches),
        f"difference{words.difference_head(metric)}",
        "of its size",
        "score kept",
        *(f"speed, {items}" for items in batches),
        "agreement",
        *map(words.short_metric, further),
        "tokens/s",
        f"val {words.short_metric(metric)}",
        "parameters",
    )
    rows = tuple(_row(row, summary, facts, batches, further) for row in summary.rows)
    note = (
        "ms a batch of so many inputs, on one thread; speed: how many times as fast as the float "
        "file, measured side by side."
    )
    return Table(head, rows, note).without_empty()


def _shown(facts: Facts) -> Sequence[str]:
    """Return the further metrics that compression may change."""
    known = ("nll", "perplexity", "bits_per_byte")
    return [name for name in known if name in (*facts.further, "nll", "perplexity")]


def _row(
    row: DeployRow,
    summary: DeploySummary,
    facts: Facts,
    batches: Sequence[int],
    further: Sequence[str],
) -> tuple[str, ...]:
    metric = summary.metric
    of = {timing.items: timing for timing in row.timings}
    times = [of.get(items) for items in batches]
    ratio = size_ratio(row, summary)
    return (
        short_name(row),
        _tested(row, metric),
        _beside(row, summary),
        _bytes(row.bytes),
        *(_milliseconds(time) for time in times),
        words.bare_difference(difference_of(row, summary, facts), metric),
        words.number(ratio, ".2f"),
        words.kept(kept_of(row, summary)),
        *(_speed(time.speed_up if time else None) for time in times),
        words.percent(row.agreement),
        *(words.number(row.metric(f"test_{n}"), find_metric(n).cell) for n in further),
        words.number(row.tokens_a_second, ",.0f"),
        words.value(row.metric(f"val_{metric}"), metric),
        words.size(row.parameters),
    )


def short_name(row: DeployRow) -> str:
    """Return the title of a row as a narrow column has it, without what all rows share.

    >>> short_name(DeployRow(key="pruned_labels", title="pruned by 50%, from labels"))
    'pruned, labels'
    >>> short_name(DeployRow(key="fresh", title="fresh of that size, distilled"))
    'fresh of that size'
    """
    name = re.sub(r" by \d+%|(?<=-bit) weights|(?<=, )from ", "", row.title)
    return name.removesuffix(", distilled") if row.key == "fresh" else name


def _beside(row: DeployRow, summary: DeploySummary) -> str:
    """Return whether a row is smaller and faster than the float file; nothing of that file."""
    compared = size_ratio(row, summary) is not None and len(row.timings) > 0
    return shortfalls(row, summary) or ("smaller, faster" if compared else "")


def _tested(row: DeployRow, metric: str) -> str:
    """Return the test metric, its mean over seeds with half of the interval where there are."""
    if row.values:
        return words.mean(mean_interval(row.values), metric)
    return words.value(row.metric(f"test_{metric}"), metric)


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return ""
    return words.number(timing.ms, ".3g" if timing.ms >= 0.1 else ".2g")


def _speed(estimate: Interval | None) -> str:
    return "" if estimate is None else f"{format_ratio(estimate.value)}x"


def _bytes(size: int | None) -> str:
    """Return a size of a file in three digits.

    >>> _bytes(96_100), _bytes(12), _bytes(None)
    ('96.1 kB', '12 B', '')
    """
    text = words.size(size)
    return f"{text}{'B' if text[-1:].isalpha() else ' B'}" if text else ""
