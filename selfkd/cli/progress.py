"""What a run prints: progress while it goes, a table at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from selfkd.analysis.verdicts import sparkline
from selfkd.execution.jobs import Row

LOG_WIDTH = 110  # where there is no terminal to ask


def make_console() -> Console:
    """Return the console of a command's own output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


class _Live(Progress):
    """A bar with lines around it, each of which fits a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the title, the bar and what is to be said of the stage."""
        for task in self.tasks:
            yield _line(task.description)
            yield self.make_tasks_table([task])
            left = task.time_remaining
            counts = [task.fields["counts"], f"{_clock(left)} left" if left else ""]
            for line in (", ".join(filter(None, counts)), task.fields["best"]):
                if line:
                    yield _line(line)


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Follower:
    """Shows a run: a live view on a terminal, plain lines elsewhere.

    Args:
        console: to print on.
        metric: what trials are chosen by.
        mode: `max` or `min`.
        epochs: of a trial, for an estimate of the time left; trials are counted whole without.
        quiet: whether nothing but what fails is told.
    """

    def __init__(
        self,
        console: Console,
        *,
        metric: str = "val_accuracy",
        mode: str = "max",
        epochs: int | None = None,
        quiet: bool = False,
    ) -> None:
        self._console, self._quiet, self._epochs = console, quiet, epochs
        self._plain = not console.is_terminal
        self._running: dict[tuple[str, int], float] = {}
        self._done = 0
        self._metric, self._sign = metric, 1 if mode == "max" else -1
        self.notes: list[str] = []
        self._remade = 0
        self._best: Row | None = None
        self._failed = 0
        self.train_seconds = 0.0
        self._progress = _Live(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=self._plain or quiet,
            transient=True,
            speed_estimate_period=math.inf,  # a stage may take days
        )
        self._task = self._progress.add_task(
            "starting Ray and its workers", total=None, counts="", best=""
        )

    def __enter__(self) -> Follower:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._fail(text)

    def _fail(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True)

    def working(self, title: str, parts: int) -> None:
        """Start the bar of work in parts."""
        self._remade = 0
        self._start(title, parts)
        if self._plain and parts > 1:
            self.say(f"{title}: {parts} parts")

    def worked(self, row: Row) -> None:
        """Count a part; what was damaged and had to be made again is told."""
        if row.get("state") == "remade":
            self._remade += 1
            self.say(f"  a damaged part of the stored soft targets was made again ({self._remade})")
        self._done += 1
        self._update()

    def compressed(self, summary: Row) -> None:
        """Nothing: the table says it."""

    def noted(self, text: str) -> None:
        """Print a note now, and keep it for the end."""
        self.notes.append(f"note:  {text}")
        self.say(f"  {text}")

    def stage_started(self, title: str, trials: int, done: int) -> None:
        """Start the bar of a stage."""
        self._start(title, trials, done)
        if self._plain:
            kept = f", {done} of them done before" if done else ""
            self.say(f"{title}: {count(trials, 'trial')}{kept}")

    def _start(self, title: str, total: int | None, done: int = 0) -> None:
        self._best, self._failed, self._done = None, 0, done
        self._running.clear()
        self._progress.reset(
            self._task, description=title, total=total, completed=done, counts="", best=""
        )

    def _update(self) -> None:
        self._progress.update(
            self._task,
            completed=self._done + sum(self._running.values()),
            counts=", ".join(self._counts()),
            best=self._told_best(),
        )

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """Show how far a trial has come."""
        part = rows[-1]["epoch"] / self._epochs if self._epochs else 0.0
        self._running[trial["stage"], trial["trial"]] = min(
            part, 0.99
        )  # a loop of the user's own may go on
        self._update()

    def trial_finished(self, trial: Row) -> None:
        """Count a trial; a failed one says why."""
        self.train_seconds += trial["train_seconds"]
        self._running.pop((trial["stage"], trial["trial"]), None)
        self._done += 1
        # those of several stages run side by side
        of = f"{trial['stage'].replace('-', ' ')}, " if "confirm" in trial["stage"] else ""
        name = f"  {of}trial {trial['trial']}"
        if trial["status"] == "failed":
            self._failed += 1
            self._fail(f"{name} failed: {trial['error']}")
        else:
            stopped = trial["status"] == "stopped"
            if not stopped and self._is_best(trial):
                self._best = trial
            if self._plain:
                self.say(
                    f"{name}: {self._value(trial)}"
                    f"{_setting(trial['point'])}, {trial['train_seconds']:.1f} s"
                    + (" (stopped early)" if stopped else "")
                )
        self._update()

    def _is_best(self, trial: Row) -> bool:
        if self._best is None:
            return True
        return bool(self._sign * (trial[self._metric] - self._best[self._metric]) > 0)

    def _value(self, row: Row) -> str:
        if self._metric == "val_accuracy":
            return f"val {_percent(row['val_accuracy'])}"
        return f"{self._metric} {row[self._metric]:.4g}"

    def _told_best(self) -> str:
        if self._best is None:
            return ""
        return f"best {self._value(self._best)}{_setting(self._best['point'])}"

    def _counts(self) -> Iterator[str]:
        if self._running:
            yield f"{len(self._running)} running"
        if self._failed:
            yield f"{self._failed} failed"

    def generation_finished(self, result: Row) -> None:
        """Print the line of a finished generation."""
        agrees = result.get("agreement")
        test = f", test {_percent(result['test_accuracy'])}" if "test_accuracy" in result else ""
        self.say(
            f"generation {result['generation']}: {self._value(result)}{test}"
            + (f", agrees with its teacher on {_percent(agrees)}" if agrees is not None else "")
            + f"{_setting(result['point'])}"
        )
        if len(result["models"]) < result["wanted_models"]:
            self.say(f"  only {count(len(result['models']), 'trial')} of it can teach")

    def generation_confirmed(self, confirmation: Row) -> None:
        """Print the mean of a generation's setting on fresh seeds; the end has the verdicts."""
        form = _form(confirmation.get("metric", "test accuracy"))
        self.say(
            f"generation {confirmation['generation']} again on "
            f"{count(len(confirmation['seeds']), 'fresh seed')}: "
            f"{_plus_minus(confirmation['mean'], form)}"
        )


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
    form = _form(metric)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(f"{count(seeds, 'fresh seed')}", justify="left")
    for column in (f"mean {metric}", "vs generation 0", "vs one before", "McNemar"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"generation {row['generation']}",
            _plus_minus(row["mean"], form),
            _plus_minus(row["first"], form, sign="+"),
            _plus_minus(row["previous"], form, sign="+"),
            _number((row["mcnemar"] or {}).get("p"), "{:.2g}"),
        )
    if controls:
        table.add_section()
    for row in controls:
        first = _plus_minus(row["first"], form, sign="+")
        table.add_row(row["title"], _plus_minus(row["mean"], form), first, "", "")
    return table


def _form(metric: str) -> str:
    return "{:.2%}" if "acc" in metric else "{:.4g}"


def _plus_minus(interval: Row | None, form: str, *, sign: str = "") -> str:
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
        _percent(end) if "accuracy" in metric else f"{end:.4g}"
        for end in (min(values), max(values))
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
        _percent(row["val_accuracy"]),
        _percent(row["test_accuracy"]),
        f"{row['test_nll']:.4f}",
        f"{row['test_ece']:.4f}",
    ]


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _setting(point: Row) -> str:
    short = {"distill.temperature": "T", "distill.alpha": "alpha"}
    parts = [
        f"{short.get(key, key)} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in point.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""


def count(number: int, noun: str) -> str:
    """Return a number of things.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


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


def short(number: float) -> str:
    """Return a number in three digits.

    >>> short(24_100), short(640)
    ('24.1 k', '640')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
