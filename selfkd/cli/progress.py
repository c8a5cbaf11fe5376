"""What a run prints while it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import ClassVar, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.text import Text

from selfkd.analysis.verdicts import count
from selfkd.cli.terminal import print_lines
from selfkd.config import TERMS, Config
from selfkd.reporting.words import (
    format_setting,
    percent,
    plus_minus,
    short_key,
    short_metric,
    value,
)
from selfkd.results import (
    Event,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    Measured,
    Message,
    Point,
    StageStarted,
    TaskProgressed,
    TaskStarted,
    TrialFinished,
    TrialProgressed,
    TrialResult,
    is_measured,
)
from selfkd.text import one_line


class _Live(Progress):
    """A bar with lines around it, each of which fits a narrow terminal."""

    shown: ClassVar[_Live | None] = None
    """The one that is on the terminal."""

    def start(self) -> None:
        """Show it."""
        _Live.shown = self
        super().start()

    def stop(self) -> None:
        """Remove it from the terminal."""
        _Live.shown = None
        super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the title, the bar and what is to be said of the stage."""
        for task in self.tasks:
            if task.total is None:  # nothing to count yet
                yield _line(f"{task.description} {timedelta(seconds=int(task.elapsed or 0))}")
                continue
            yield _line(task.description)
            yield self.make_tasks_table([task])
            left = task.time_remaining
            time_left = f"{timedelta(seconds=round(left))} left" if left else ""
            counts = [task.fields["counts"], time_left]
            for line in (", ".join(filter(None, counts)), task.fields["best"]):
                if line:
                    yield _line(line)


def end_display() -> None:
    """Remove a live view from the terminal, so that what is printed next stays on it."""
    if _Live.shown is not None:
        _Live.shown.stop()


def _line(text: str) -> Text:
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


class ProgressReporter:
    """Shows the events of a run: a live view on a terminal, plain lines elsewhere.

    Args:
        console: Console to print on.
        config: Config of the run.
        quiet: Whether failures alone are printed.
    """

    def __init__(self, console: Console, config: Config, *, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._epochs, self._metric = config.train.epochs, config.search.metric
        self._sign = 1 if config.search.mode == "max" else -1
        self._plain = not console.is_terminal
        self._running: dict[tuple[str, int], float] = {}
        self._done = self._failed = self._remade = 0
        self._best: TrialResult | None = None
        self.notes: list[str] = []
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
        self._task = self._progress.add_task("starting Ray …", total=None, counts="", best="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def wait_for(self, title: str) -> None:
        """Say what is waited for, while there is nothing to count."""
        self._progress.update(self._task, description=title)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        print_lines(self._progress.console, [text])

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case TaskStarted(title, parts):
                self._remade = 0
                self._start(title, parts)
                if self._plain and parts > 1:
                    self.say(f"{title}: {parts} parts")
            case TaskProgressed(state):
                if state == "remade":
                    self._remade += 1
                    self.say(f"  damaged cached logits were made again ({self._remade})")
                self._done += 1
                self._update()
            case StageStarted(title, trials, done):
                self._start(title, trials, done)
                if self._plain:
                    kept = f", {done} of them done before" if done else ""
                    self.say(f"{title}: {count(trials, 'trial')}{kept}")
            case TrialProgressed(trial, epochs):
                part = epochs[-1].epoch / self._epochs  # a user's own loop may go on for longer
                self._running[trial.stage, trial.trial] = min(part, 0.99)
                self._update()
            case TrialFinished(trial):
                self._finish(trial)
            case GenerationFinished(result):
                self._say_generation(result)
            case GenerationConfirmed(confirmation):
                times = count(len(confirmation.seeds), "time")
                again = "is one given model" if confirmation.given else f"again, {times}"
                mean = plus_minus(confirmation.mean, confirmation.metric)
                name = _named(confirmation.metric)
                self.say(f"generation {confirmation.generation} {again}: {name}{mean}")
            case Message(text):
                self.notes.append(f"note:  {text}")
                self.say(f"  {text}")

    def _start(self, title: str, total: int | None, done: int = 0) -> None:
        self._best, self._failed, self._done = None, 0, done
        self._running.clear()
        self._progress.reset(
            self._task, description=title, total=total, completed=done, counts="", best=""
        )

    def _update(self) -> None:
        best = self._best
        counts = [f"{len(self._running)} running"] if self._running else []
        counts += [f"{self._failed} failed"] if self._failed else []
        self._progress.update(
            self._task,
            completed=self._done + sum(self._running.values()),
            counts=", ".join(counts),
            best="" if best is None else f"best {self._value(best)}{_setting(best.point)}",
        )

    def _finish(self, trial: TrialResult) -> None:
        """Count a trial; a failed one says why."""
        self.train_seconds += trial.train_seconds
        self._running.pop((trial.stage, trial.trial), None)
        self._done += 1
        # those of several stages run side by side
        stage, of = trial.stage, ""
        if stage.startswith("deploy_"):  # and the hash of what is fine-tuned
            of = f"{stage.removeprefix('deploy_').partition('-')[0].replace('_', ' ')}, "
        elif "confirm" in stage:
            of = f"{stage.replace('-', ' ')}, "
        name = f"  {of}trial {trial.trial}"
        if trial.status == "failed":
            self._failed += 1
            self._print(f"{name} failed: {trial.error}")
        else:
            if trial.status == "completed" and self._is_best(trial):
                self._best = trial
            if self._plain:
                early = " (stopped early)" if trial.status == "stopped" else ""
                result = f"{self._value(trial)}{_setting(trial.point)}"
                self.say(f"{name}: {result}, {trial.train_seconds:.1f} s{early}")
        self._update()

    def _is_best(self, trial: TrialResult) -> bool:
        if self._best is None:
            return True
        own, best = trial.metrics[self._metric], self._best.metrics[self._metric]
        return self._sign * (own - best) > 0

    def _value(self, row: Measured) -> str:
        name = "val" if self._metric == "val_accuracy" else short_metric(self._metric)
        return f"{name} {value(row.metrics[self._metric], self._metric)}"

    def _say_generation(self, result: GenerationResult) -> None:
        agreement = result.metric("agreement")
        tested = next((name for name in result.metrics if name.startswith("test_")), "")
        parts = [f"generation {result.generation}: {self._value(result)}"]
        name = _named(tested) or "test "
        parts += [f"{name}{value(result.metrics[tested], tested)}"] if tested else []
        parts += [f"teacher agreement {percent(agreement)}"] if agreement is not None else []
        self.say(", ".join(parts) + _setting(result.point))
        if len(result.models) < result.wanted_models:
            self.say(f"  only {count(len(result.models), 'trial')} of it can teach")


def _named(metric: str) -> str:
    """Return the name of a known metric before its value; none of accuracy, whose % says it."""
    known = is_measured(metric) and metric != "test_accuracy"
    return f"{short_metric(metric)} " if known else ""


def _setting(point: Point) -> str:
    short = {"distill.temperature": "T", "distill.alpha": "alpha", TERMS: "terms"}
    parts = [
        f"{short.get(key, short_key(key))} {format_setting(key, value)}"
        for key, value in point.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""
