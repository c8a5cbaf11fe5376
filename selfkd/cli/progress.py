"""What a run prints while it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.text import Text

from selfkd.analysis.verdicts import count
from selfkd.cli.terminal import metric_format, percent, plus_minus
from selfkd.results import Row


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
            return f"val {percent(row['val_accuracy'])}"
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
        test = f", test {percent(result['test_accuracy'])}" if "test_accuracy" in result else ""
        self.say(
            f"generation {result['generation']}: {self._value(result)}{test}"
            + (f", agrees with its teacher on {percent(agrees)}" if agrees is not None else "")
            + f"{_setting(result['point'])}"
        )
        if len(result["models"]) < result["wanted_models"]:
            self.say(f"  only {count(len(result['models']), 'trial')} of it can teach")

    def generation_confirmed(self, confirmation: Row) -> None:
        """Print the mean of a generation's setting on fresh seeds; the end has the verdicts."""
        form = metric_format(confirmation.get("metric", "test accuracy"))
        self.say(
            f"generation {confirmation['generation']} again on "
            f"{count(len(confirmation['seeds']), 'fresh seed')}: "
            f"{plus_minus(confirmation['mean'], form)}"
        )


def _setting(point: Row) -> str:
    short = {"distill.temperature": "T", "distill.alpha": "alpha"}
    parts = [
        f"{short.get(key, key)} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in point.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""
