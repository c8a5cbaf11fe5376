"""Curves of a run in files for those without W&B: CSV, and what TensorBoard reads."""

from __future__ import annotations

import contextlib
import csv
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from selfkd.results import (
    Epoch,
    Event,
    GenerationConfirmed,
    GenerationFinished,
    Row,
    Trial,
    TrialFinished,
    TrialProgressed,
    TrialResult,
)
from selfkd.storage.rows import load_row
from selfkd.tracking.base import NoTracker, end_of_tracking
from selfkd.tracking.event_file import EventFile
from selfkd.tracking.rows import confirmation_row, epoch_row, generation_row, short_name

FOLDER = "tracking"
"""Folder of the files within a run folder."""
EPOCHS, GENERATIONS = "epochs.csv", "generations.csv"

T = TypeVar("T")
log = logging.getLogger(__name__)


class FileTracker(NoTracker):
    """Writes the epochs of all trials, and the generations, as they come.

    The files are made anew from the finished trials of the run folder at each start, so that
    nothing is missing or doubled after a resume.

    Args:
        writers: Kinds of files: `csv`, `tensorboard`.
        folder: Folder that the files are written to, on this machine.
        run: Run folder.
    """

    def __init__(
        self, writers: Sequence[Literal["csv", "tensorboard"]], *, folder: Path, run: Path
    ) -> None:
        self._folder = folder / FOLDER
        self._writers = " and ".join(writers)
        self._csv, self._board = "csv" in writers, "tensorboard" in writers
        self._last: dict[tuple[str, int], int] = {}
        self._open: dict[tuple[str, int], EventFile] = {}
        self._generations: dict[int, Row] = {}
        self._lineage: EventFile | None = None
        self._stopped: str | None = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._table = Table(self._folder / EPOCHS)
        self._try(self._replay, run)

    @property
    def description(self) -> str:  # type: ignore[override]
        """Where the files are, and from when on nothing is written to them."""
        stopped = f", nothing is written since {self._stopped}" if self._stopped else ""
        return f"{self._writers}: {self._folder}{stopped}"

    @property
    def incomplete(self) -> bool:  # type: ignore[override]
        """Whether something could not be written."""
        return self._stopped is not None

    def __call__(self, event: Event) -> None:
        """Write what an event has; a fault here stops no training."""
        self._try(self._follow, event)

    def _try(self, work: Callable[[T], None], argument: T) -> None:
        if self._stopped is not None:
            return
        try:
            work(argument)
        except Exception as error:  # noqa: BLE001 - tracking must never stop a training
            self._stopped = end_of_tracking(error)
            log.warning("tracking in files stops, training goes on: %s", error)

    def _replay(self, run: Path) -> None:
        for path in sorted(run.glob("*/**/result.json")):
            if path.parent.name.startswith("trial_"):
                self._finish(load_row(TrialResult, path))

    def _follow(self, event: Event) -> None:
        match event:
            case TrialProgressed(trial, epochs):
                self._report(trial, epochs)
            case TrialFinished(trial):
                self._finish(trial)
            case GenerationFinished(result):
                self._generation(generation_row(result))
            case GenerationConfirmed(confirmation):
                self._generation(confirmation_row(confirmation))

    def _report(self, trial: Trial, epochs: Sequence[Epoch]) -> None:
        key = trial.stage, trial.trial
        for epoch in epochs:
            if epoch.epoch > self._last.get(key, -1):  # a trial whose worker died begins again
                self._last[key] = epoch.epoch
                row = epoch_row(epoch)
                if self._csv:
                    named = {"stage": trial.stage, "trial": trial.trial}
                    self._table.add({**named, **row, **trial.point})
                if self._board:
                    if key not in self._open:
                        self._open[key] = EventFile(self._folder / "tensorboard" / short_name(*key))
                    self._open[key].add(row.pop("epoch"), row)

    def _finish(self, trial: TrialResult) -> None:
        self._report(trial, trial.history)
        if file := self._open.pop((trial.stage, trial.trial), None):
            file.close()

    def _generation(self, row: Row) -> None:
        number = row["generation"]
        self._generations[number] = self._generations.get(number, {}) | row
        if self._csv:
            rows = [self._generations[key] for key in sorted(self._generations)]
            write_table(self._folder / GENERATIONS, rows)
        if self._board:
            if self._lineage is None:
                self._lineage = EventFile(self._folder / "tensorboard" / "generations")
            self._lineage.add(number, {k: v for k, v in row.items() if k != "generation"})

    def close(self) -> None:
        """Close the files."""
        for file in (*self._open.values(), self._lineage):
            if file is not None:
                with contextlib.suppress(OSError):  # of what could not be written before
                    file.close()
        self._open.clear()


class Table:
    """A CSV file that rows are added to; one with a new column writes it anew.

    Args:
        path: File, which is not there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: dict[str, None] = {}

    def add(self, row: Row) -> None:
        """Add a row, which is in the file when this returns."""
        if row.keys() <= self._columns.keys():
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, list(self._columns)).writerow(row)
            return
        rows: list[Row] = []
        if self._columns:
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self._columns |= dict.fromkeys(row)
        write_table(self._path, [*rows, row])


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a CSV file with all of their columns, in the order in which they are met."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
