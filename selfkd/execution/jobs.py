"""Jobs and outcomes: the interface between experiments and executors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from selfkd.errors import describe_error
from selfkd.imports import without_collection
from selfkd.results import Row


@dataclass(frozen=True)
class Job:
    """Unit of work."""

    kind: str
    """Name of the job's function in `selfkd.worker.jobs`."""
    payload: Mapping[str, Any]
    """Arguments of that function, plain data."""


@dataclass(frozen=True)
class Outcome:
    """End of a job."""

    job: Job
    row: Row
    """Last row of the job; empty where it yielded none."""
    error: str | None = None
    """Error of a failed job."""
    stopped: bool = False
    """Whether the job was stopped early."""


@dataclass(frozen=True)
class EarlyStopping:
    """Early stopping of trials that are worse than others after as many epochs."""

    max_epochs: int
    """Epochs of a complete trial."""
    metric: str = "val_accuracy"
    """Metric that trials are compared by."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller values are better."""


def load_entry(entry: str) -> Callable[[str, Mapping[str, Any]], Iterator[Row]]:
    """Import the function that runs jobs; where that fails, each job raises the error.

    timm imports W&B where it is installed, which no job needs: it takes half a second, and leaves
    temporary files where the process is killed. So it is as if it were not, meanwhile.

    Args:
        entry: Reference of the function, `module:function`.
    """
    module, _, name = entry.partition(":")
    try:
        with _without("wandb"), without_collection(keep=module not in sys.modules):
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


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let no import find a module meanwhile, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as Python has what cannot be imported
    try:
        yield
    finally:
        del sys.modules[module]


class Jobs(Protocol):
    """Source of a batch of jobs, and receiver of their rows and outcomes."""

    def ask(self) -> Job | None:
        """Return the next job; None where none is left."""

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        """Receive rows of a running job."""

    def tell(self, outcome: Outcome) -> None:
        """Receive the outcome of a job."""


class Executor(Protocol):
    """Executor of batches of jobs."""

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run a batch of jobs to its end.

        Args:
            jobs: Batch of jobs.
            early: Early stopping of trials; none when not given.
            limit: Largest number of jobs at a time; no limit when not given.
        """


class InProcess:
    """Executor without Ray: one job after the other in this process.

    Args:
        run_job: Function `run_job(kind, payload)` that yields rows.
    """

    def __init__(self, run_job: Callable[[str, Mapping[str, Any]], Iterator[Row]]) -> None:
        self._run_job = run_job

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run a batch of jobs to its end, without early stopping."""
        while (job := jobs.ask()) is not None:
            row: Row = {}
            error = None
            try:
                for row in self._run_job(job.kind, job.payload):
                    jobs.report(job, [row])
            except Exception as exception:  # noqa: BLE001 - a job may fail in any way
                error = describe_error(exception)
            jobs.tell(Outcome(job, row, error))


class Batch:
    """Batch of given jobs, which collects their outcomes.

    Args:
        jobs: Jobs in their order.
        done: Callback for the last row of each job that has not failed.
    """

    def __init__(
        self, jobs: Sequence[Job], *, done: Callable[[Row], object] = lambda row: None
    ) -> None:
        self._waiting, self._done = list(reversed(jobs)), done
        self.outcomes: list[Outcome] = []
        """Outcomes in the order in which jobs ended."""

    def ask(self) -> Job | None:
        """Return the next job; None where none is left."""
        return self._waiting.pop() if self._waiting else None

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        """Do nothing: only outcomes are collected."""

    def tell(self, outcome: Outcome) -> None:
        """Add the outcome."""
        self.outcomes.append(outcome)
        if outcome.error is None:
            self._done(outcome.row)


class FailedJobError(RuntimeError):
    """Error of a job that failed each time."""


@dataclass(frozen=True)
class Beside:
    """Job that is run beside others, so that no worker stands idle while it is waited for."""

    job: Job
    take: Callable[[Outcome], object]
    """Callback for its outcome, once all others are done; it may have failed."""


def run_all(
    executor: Executor,
    jobs: Sequence[Job],
    *,
    beside: Sequence[Beside] = (),
    attempts: int = 1,
    done: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Run jobs side by side, those that fail again; return the last row of each.

    Args:
        executor: Executor that runs them.
        jobs: Jobs.
        beside: Further jobs, which may fail; they are run once, after the others have begun.
        attempts: Most attempts at a job.
        done: Callback for the last row of each job that has not failed.

    Raises:
        FailedJobError: A job failed each time.
    """
    rows: dict[int, Row] = {}
    others = {id(one.job): one for one in beside}
    taken: list[Outcome] = []
    for attempt in range(attempts):
        waiting = [job for job in jobs if id(job) not in rows]
        batch = Batch([*waiting, *(one.job for one in beside if attempt == 0)], done=done)
        executor.run(batch)
        taken += [each for each in batch.outcomes if id(each.job) in others]
        found = [each for each in batch.outcomes if id(each.job) not in others]
        rows |= {id(each.job): each.row for each in found if each.error is None}
        if len(rows) == len(jobs):
            for outcome in taken:
                others[id(outcome.job)].take(outcome)
            return [rows[id(job)] for job in jobs]
    raise FailedJobError(next(each.error for each in found if each.error is not None))


def run_one(executor: Executor, kind: str, *, beside: Sequence[Beside] = (), **payload: Any) -> Row:
    """Run a single job and return its last row.

    Args:
        executor: Executor that runs it.
        kind: Kind of the job.
        beside: Further jobs to run beside it.
        payload: Payload of the job.

    Raises:
        FailedJobError: The job failed.
    """
    (row,) = run_all(executor, [Job(kind, payload)], beside=beside)
    return row
