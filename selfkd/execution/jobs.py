"""The words between those who want work done and those who do it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from selfkd.results import Row


@dataclass(frozen=True)
class Job:
    """A unit of work: `kind` names a function of `selfkd.worker`, `payload` is plain data."""

    kind: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its last row, and why it failed or was stopped early."""

    job: Job
    row: Row
    error: str | None = None
    stopped: bool = False


@dataclass(frozen=True)
class EarlyStopping:
    """Trials that are behind others after as many epochs are stopped."""

    max_epochs: int
    """Of a whole trial."""
    metric: str = "val_accuracy"
    mode: Literal["max", "min"] = "max"


def load_entry(entry: str) -> Callable[[str, Mapping[str, Any]], Iterator[Row]]:
    """Import `module:function`, which does jobs; a failure is raised by the jobs."""
    module, _, name = entry.partition(":")
    try:
        function: Callable[[str, Mapping[str, Any]], Iterator[Row]] = getattr(
            importlib.import_module(module), name
        )
    except (ImportError, AttributeError) as error:
        failure = error
    else:
        return function

    def fail(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        raise failure

    return fail


class Jobs(Protocol):
    """A batch of jobs: asked for one after the other, told how each of them goes and ends."""

    def ask(self) -> Job | None:
        """Return the next job, or None when all have been handed out."""

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        """Hear what a running job reports."""

    def tell(self, outcome: Outcome) -> None:
        """Hear how a job ended."""


class Executor(Protocol):
    """Runs a batch of jobs to its end."""

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run all jobs.

        Args:
            jobs: what to run.
            early: how trials are stopped early; none is when not given.
            limit: the most at a time.
        """


class InProcess:
    """An executor without Ray: one job after the other in this process.

    Args:
        run_job: `run_job(kind, payload)` yields rows.
    """

    def __init__(self, run_job: Callable[[str, Mapping[str, Any]], Iterator[Row]]) -> None:
        self._run_job = run_job

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run all jobs to their ends: nothing is stopped early here."""
        while (job := jobs.ask()) is not None:
            row: Row = {}
            error = None
            try:
                for row in self._run_job(job.kind, job.payload):
                    jobs.report(job, [row])
            except Exception as exception:  # noqa: BLE001 - a job may fail in any way
                error = f"{type(exception).__name__}: {exception}"
            jobs.tell(Outcome(job, row, error))


class Batch:
    """Jobs that are known beforehand; keeps their outcomes."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._waiting = list(reversed(jobs))
        self.outcomes: list[Outcome] = []

    def ask(self) -> Job | None:
        """Return the next job."""
        return self._waiting.pop() if self._waiting else None

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        """Nothing: only the end counts."""

    def tell(self, outcome: Outcome) -> None:
        """Keep the outcome."""
        self.outcomes.append(outcome)


def run_one(executor: Executor, kind: str, **payload: Any) -> Row:
    """Run a single job and return its last row.

    Raises:
        RuntimeError: the job failed.
    """
    batch = Batch([Job(kind, payload)])
    executor.run(batch)
    (outcome,) = batch.outcomes
    if outcome.error is not None:
        raise RuntimeError(outcome.error)
    return outcome.row
