"""The result of a run as rows of plain values, and its headline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from selfkd.analysis.deploy import flat_row, kept_of, size_ratio
from selfkd.analysis.kept import score_kept, size_kept
from selfkd.analysis.verdicts import format_difference, sentences_of
from selfkd.reporting import words
from selfkd.reporting.deploy_table import deploy_table
from selfkd.results import (
    CapacitySummary,
    DeploySummary,
    EnsembleSummary,
    Facts,
    GenerationsSummary,
    Interval,
    Row,
    StudySummary,
    Summary,
    TeacherRow,
    find_main,
    find_metric,
    title,
)


def headline(summary: Summary) -> str:
    """Return the verdict of a run in one sentence; empty where there is none."""
    if isinstance(summary, DeploySummary):
        return summary.sentences[0] if summary.sentences else ""
    if isinstance(summary, EnsembleSummary | GenerationsSummary):
        return next(iter(sentences_of(summary)), "")
    verdict = summary.verdict
    return verdict.sentences[0] if verdict and verdict.sentences else ""


def plain_rows(summary: Summary) -> list[Row]:
    """Return a row for each model, arm or size of a run, with its metrics and intervals.

    All rows have the same keys in the same order: `name`, the settings, metrics by their names,
    and where fresh seeds say it `mean` and `gain` with the ends of their intervals,
    `mean_low`, `mean_high`, `gain_low`, `gain_high`; of smaller models `score_kept`, with its ends,
    and `size_kept`, shares of the score and size of the teacher or float file. What is not known
    is None.
    """
    if isinstance(summary, GenerationsSummary):
        rows = list(_generations(summary))
    elif isinstance(summary, EnsembleSummary):
        rows = list(_ensemble(summary))
    elif isinstance(summary, CapacitySummary):
        rows = list(_sizes(summary))
    elif isinstance(summary, DeploySummary):
        rows = [
            flat_row(row) | _kept(kept_of(row, summary), size_ratio(row, summary))
            for row in summary.rows
        ]
    else:
        rows = list(_arms(summary))
    keys = dict.fromkeys(key for row in rows for key in row)
    known = [key for key in keys if any(row.get(key) is not None for row in rows)]
    return [{key: row.get(key) for key in known} for row in rows]


def short_table(summary: Summary) -> list[list[str]]:
    """Return the head and the rows of a table that fits a page: metric, mean, gain, T and alpha.

    The metric is that of the chosen models, the one that the means over fresh seeds are of; mean
    and gain stand beside their 95 % intervals.
    """
    if isinstance(summary, DeploySummary):
        table = deploy_table(summary, Facts(metric=summary.metric))
        more = (n for n, name in enumerate(table.head) if name.startswith(("difference", "of its")))
        width = next(more, len(table.head))
        return [list(row[:width]) for row in (table.head, *table.rows)]
    rows = plain_rows(summary) or [{"name": ""}]
    metrics = [row.metric for row in getattr(summary, "confirmations", ())[:1]]
    metrics += [key for start in ("test_", "val_") for key in rows[0] if key.startswith(start)]
    measured = [key for key in metrics if key in rows[0]][:1]
    elsewhere = [key for key in _of_teacher(summary) if key.startswith("test_")]
    metric = (measured or elsewhere or [words.MAIN])[0]
    settings = [key for key in ("temperature", "alpha") if key in rows[0]]
    ends = [key for key in ("labels", "mean", "gain") if f"{key}_low" in rows[0]]
    named = [*map(title, measured), *(f"{key} [95 %]" for key in ends)]
    return [
        ["", *named, *("T" if key == "temperature" else key for key in settings)],
        *(
            [
                row["name"],
                *(_number(row[key], words.form(metric)) for key in measured),
                *(_between(row, key, metric) for key in ends),
                *(_number(row[key], ".3g") for key in settings),
            ]
            for row in rows
        ),
    ]


def _of_teacher(summary: Summary) -> Iterable[str]:
    """Return the names of the metrics of a capacity curve, whose rows have none."""
    return summary.teacher.metrics if isinstance(summary, CapacitySummary) else ()


def _between(row: Row, key: str, metric: str) -> str:
    value, low, high = (row[f"{key}{end}"] for end in ("", "_low", "_high"))
    if key == "gain" and value is not None:
        form = find_metric(metric).difference
        return format_difference(Interval(value, low, high), form=form)
    text, *ends = (_number(each, words.form(metric)) for each in (value, low, high))
    return f"{text} [{', '.join(ends)}]" if all(ends) else text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def confirmed_rows(summary: Summary) -> Sequence[Any]:
    """Return the rows of a summary that were measured on fresh seeds."""
    if isinstance(summary, GenerationsSummary):
        return (*summary.confirmations, *summary.controls)
    if isinstance(summary, EnsembleSummary):
        return tuple(row for row in summary.rows if row.runs)
    if isinstance(summary, DeploySummary):
        return tuple(row for row in summary.rows if row.values)
    return summary.sizes if isinstance(summary, CapacitySummary) else summary.arms


def _generations(summary: GenerationsSummary) -> Iterator[Row]:
    replicated = {row.generation: row for row in summary.confirmations}
    for result in summary.generations:
        own = replicated.get(result.generation)
        yield {
            "name": f"generation {result.generation}",
            "generation": result.generation,
            "temperature": result.temperature,
            "alpha": result.alpha,
            **result.metrics,
            **(_ends("mean", own.mean) | _ends("gain", own.first) if own else {}),
            "seeds": len(own.seeds) if own else None,
        }
    if summary.ensemble is not None:
        yield {"name": "ensemble of all", **summary.ensemble.metrics}
    for control in summary.controls:
        ends = _ends("mean", control.mean) | _ends("gain", control.first)
        yield {"name": control.title, **ends, "seeds": len(control.seeds)}


def _ensemble(summary: EnsembleSummary) -> Iterator[Row]:
    for row in summary.rows:
        distilled = row.name == summary.rows[-1].name
        costs = {"parameters": row.parameters, "ms_1": row.ms_1, "ms_128": row.ms_128}
        yield {
            "name": row.name,
            **row.metrics,
            **(_ends("mean", Interval(fmean(row.runs), row.low, row.high)) if row.runs else {}),
            **(_ends("gain", summary.gain) if distilled else {}),
            "seeds": len(row.runs) or None,
            **costs,
            **(_kept_of(row.runs, row.parameters, summary.teacher) if distilled else {}),
        }


def _sizes(summary: CapacitySummary) -> Iterator[Row]:
    for size in summary.sizes:
        yield {
            "name": f"{summary.key} {size.value}",
            "parameters": size.parameters,
            "temperature": size.temperature,
            "alpha": size.alpha,
            **_ends("labels", size.labels.interval),
            **_ends("mean", size.distilled.interval),
            **_ends("gain", size.difference),
            "p_holm": size.p_holm,
            "seeds": summary.seeds,
            **_kept_of(size.distilled.runs, size.parameters, summary.teacher),
        }


def _arms(summary: StudySummary) -> Iterator[Row]:
    for arm in summary.arms:
        yield {
            "name": arm.name,
            **arm.metrics,
            **_ends("mean", arm.mean),
            "seeds": len(arm.runs),
        }


def _kept_of(runs: Sequence[float], parameters: float | None, teacher: TeacherRow) -> Row:
    """Return what students keep of their teacher's score and parameters."""
    metric = find_main(teacher.metrics)
    share = score_kept(runs, teacher.metric(f"test_{metric}"), metric=metric)
    return _kept(share, size_kept(parameters, teacher.parameters))


def _kept(score: Interval | None, size: float | None) -> Row:
    return {**_ends("score_kept", score), "size_kept": size}


def _ends(name: str, interval: Interval | None) -> Row:
    if interval is None:
        return {}
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
