"""The terminal: its console, and the tables that are printed on it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from selfkd.analysis.verdicts import count, short, sparkline
from selfkd.results import Row

LOG_WIDTH = 110  # where there is no terminal to ask


def make_console() -> Console:
    """Return the console of a command's own output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def make_table(results: Sequence[Row], ensemble: Row | None) -> Table:
    """Return the table of a run: a row a generation, then their ensemble."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("generation", justify="left", no_wrap=True)
    for column in ("T", "alpha", "val acc", "test acc", "NLL", "ECE", "agrees", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            str(result["generation"]),
            _number(result["temperature"], "{:.2f}"),
            _number(result["alpha"], "{:.2f}"),
            *_measures(result),
            _number(result.get("agreement"), "{:.2%}"),
            f"{result['seconds']:.1f}",
        )
    if ensemble is not None:
        table.add_section()
        table.add_row("ensemble", "", "", *_measures(ensemble), "", "")
    return table


def make_confirmation_table(results: Sequence[Row], controls: Sequence[Row]) -> Table:
    """Return the table of what was trained again on fresh seeds: means and paired differences."""
    rows = [row["confirmation"] for row in results if row["confirmation"]]
    metric = rows[0].get("metric", "test acc")
    seeds = max(len(row["seeds"]) for row in rows)
    form = metric_format(metric)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(f"{count(seeds, 'fresh seed')}", justify="left")
    for column in (f"mean {metric}", "vs generation 0", "vs one before", "McNemar"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"generation {row['generation']}",
            plus_minus(row["mean"], form),
            plus_minus(row["first"], form, sign="+"),
            plus_minus(row["previous"], form, sign="+"),
            _number((row["mcnemar"] or {}).get("p"), "{:.2g}"),
        )
    if controls:
        table.add_section()
    for row in controls:
        first = plus_minus(row["first"], form, sign="+")
        table.add_row(row["title"], plus_minus(row["mean"], form), first, "", "")
    return table


def metric_format(metric: str) -> str:
    return "{:.2%}" if "acc" in metric else "{:.4g}"


def plus_minus(interval: Row | None, form: str, *, sign: str = "") -> str:
    """Return an estimate with half its interval, the larger half where they differ."""
    if interval is None:
        return ""
    text = form.replace(":", f":{sign}").format(interval["value"])
    if interval["low"] is None:
        return text
    ends = interval["high"] - interval["value"], interval["value"] - interval["low"]
    return f"{text} ± {form.format(max(ends))}"


def make_sparkline(results: Sequence[Row], metric: str) -> str:
    """Return a line of the generations' accuracy: of the confirmation where there is one."""
    confirmed = all(row["confirmation"] for row in results)
    if confirmed:
        values = [row["confirmation"]["mean"]["value"] for row in results]
        metric = results[0]["confirmation"].get("metric", "mean test accuracy")
    else:
        metric = "test_accuracy" if "test_accuracy" in results[0] else metric
        values = [row[metric] for row in results]
    low, high = (
        percent(end) if "accuracy" in metric else f"{end:.4g}" for end in (min(values), max(values))
    )
    return f"{metric.replace('_', ' ')} by generation:  {sparkline(values)}  ({low} to {high})"


def print_table(console: Console, table: Table) -> None:
    """Print a table, without its last columns where the terminal is too narrow, which is said."""
    wide = console.options.update(max_width=1000)
    left_out: list[str] = []
    while Measurement.get(console, wide, table).maximum > console.width and len(table.columns) > 2:
        column = next(c for c in table.columns[:0:-1] if c.header != "test acc")
        table.columns.remove(column)
        left_out.insert(0, str(column.header))
    console.print(table)
    if left_out:
        console.print(f"left out for want of width: {', '.join(filter(None, left_out))}")


def print_rows(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of texts whose first column names the row."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, title in enumerate(head):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(console, table)


def _measures(row: Row) -> list[str]:
    return [
        percent(row["val_accuracy"]),
        percent(row["test_accuracy"]),
        f"{row['test_nll']:.4f}",
        f"{row['test_ece']:.4f}",
    ]


def percent(value: float) -> str:
    return f"{value:.2%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def make_metric_table(results: Sequence[Row], metric: str) -> Table:
    """Return the table of generations whose training function reports what it likes."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    hidden = ("generation", "trial", "temperature", "alpha", "trials", "failed", "wanted_models")
    numbers = [k for k, v in results[-1].items() if isinstance(v, int | float) and k not in hidden]
    metrics = [metric, *(k for k in numbers if k not in (metric, "seconds", "train_seconds"))]
    table.add_column("generation", justify="left", no_wrap=True)
    for column in ("T", "alpha", *metrics, "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            str(result["generation"]),
            _number(result["temperature"], "{:.2f}"),
            _number(result["alpha"], "{:.2f}"),
            *(_number(result.get(name), "{:.4g}") for name in metrics),
            f"{result['seconds']:.1f}",
        )
    return table


def make_ensemble_table(rows: Sequence[Row]) -> Table:
    """Return the table of an ensemble and its student: what each is worth and costs."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", justify="left")
    for column in ("val acc", "test acc", "NLL", "ECE", "params", "ms, 1", "ms, 128"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        if number == len(rows) - 2:
            table.add_section()
        val, test, *rest = _measures(row)
        if row.get("low") is not None:
            test = f"{test} ± {(row['high'] - row['low']) / 2:.2%}"
        table.add_row(
            row["name"],
            val,
            test,
            *rest,
            short(row["parameters"]),
            f"{row['ms_1']:.3g}",
            f"{row['ms_128']:.3g}",
        )
    return table
