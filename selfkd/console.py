"""What a run prints: progress while it goes, a table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from selfkd.jobs import Row

LOG_WIDTH = 110  # where there is no terminal to ask


def make_console() -> Console:
    """Return the console of a command's own output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_WIDTH)
    return console


class Follower:
    """Shows a run: a bar on a terminal, plain lines elsewhere.

    Args:
        console: to print on.
        rounds: born-again generations.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self._console, self._rounds = console, rounds
        self._best: Row | None = None
        self._done = self._failed = 0
        self._generation = 0
        self.train_seconds = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("starting Ray and its workers", total=None, note="")

    def __enter__(self) -> Follower:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text)

    def labelling(self, generation: int, teachers: int) -> None:
        """Show that a generation's teachers are asked for their soft targets."""
        self._show(f"generation {generation}: asking {_count(teachers, 'teacher')}", None, 0, "")

    def generation_started(self, generation: int, trials: int, done: int) -> None:
        """Start the bar of a generation."""
        self._generation, self._best, self._done, self._failed = generation, None, done, 0
        kept = f", {done} of them done before" if done else ""
        if not self._console.is_terminal:
            self.say(f"generation {generation} of {self._rounds}: {_count(trials, 'trial')}{kept}")
        self._show(f"generation {generation} of {self._rounds}", trials, done, "")

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """Nothing: trials are shown when they end."""

    def trial_finished(self, trial: Row) -> None:
        """Count a trial; a failed one says why."""
        self._done += 1
        self.train_seconds += trial["train_seconds"]
        if trial["status"] == "failed":
            self._failed += 1
            self.say(f"trial {trial['trial']} failed: {trial['error']}")
        elif self._best is None or trial["val_accuracy"] > self._best["val_accuracy"]:
            self._best = trial
        if trial["status"] != "failed" and not self._console.is_terminal:
            self.say(
                f"  trial {trial['trial']}: val {_percent(trial['val_accuracy'])}"
                f"{_setting(trial['point'])}, {trial['train_seconds']:.1f} s"
                + (" (stopped early)" if trial["status"] == "stopped" else "")
            )
        note = (
            f"best val {_percent(self._best['val_accuracy'])}{_setting(self._best['point'])}"
            if (self._best)
            else ""
        )
        failed = f", {self._failed} failed" if self._failed else ""
        self._show(None, None, self._done, note + failed)

    def generation_finished(self, result: Row) -> None:
        """Print the line of a finished generation."""
        agrees = result.get("agreement")
        self.say(
            f"generation {result['generation']}: val {_percent(result['val_accuracy'])}, "
            f"test {_percent(result['test_accuracy'])}"
            + (f", agrees with its teacher on {_percent(agrees)}" if agrees is not None else "")
            + f"{_setting(result['point'])}"
        )

    def _show(self, description: str | None, total: int | None, done: int, note: str) -> None:
        changes: dict[str, Any] = {"completed": done, "note": note}
        if description is not None:
            changes |= {"description": description, "total": total}
        self._progress.update(self._task, **changes)


def make_table(results: Sequence[Row], ensemble: Row | None) -> Table:
    """Return the table of a run: a row a generation, then their ensemble."""
    table = Table(title_justify="left")
    table.add_column("generation", justify="left", no_wrap=True)
    for column in ("T", "alpha", "val acc", "test acc", "NLL", "ECE", "agreement", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            str(result["generation"]) + (" (labels)" if result["generation"] == 0 else ""),
            _number(result["temperature"], "{:.2f}"),
            _number(result["alpha"], "{:.2f}"),
            *_measures(result),
            _number(result.get("agreement"), "{:.2%}"),
            f"{result['seconds']:.1f}",
        )
    if ensemble is not None:
        table.add_section()
        table.add_row(f"ensemble of {len(results)}", "", "", *_measures(ensemble), "", "")
    return table


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
