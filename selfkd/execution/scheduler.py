"""Searcher and scheduler that Ray Tune runs a pool by: which job a worker gets, and when."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from selfkd.execution.jobs import EarlyStopping, Job, Jobs, Outcome
from selfkd.results import Row

REPORT_SECONDS = 0.5  # epochs shorter than this are reported together
IDLE_SECONDS = 0.05  # between two results of an idle trial, which ends at one of them
RELEASE_SECONDS = 10.0  # after which another idle trial is ended for a job that still waits
RESULTS_PER_SECOND = 100  # of all workers together: with many, the first two times are longer
MAX_FAILURES = 2  # repetitions of a trial whose worker died before it got further
TIME, VALUE = "epoch", "value"  # what ASHA sees of a row
PENDING = 8  # most trials without a worker, or twice the workers

log = logging.getLogger(__name__)


class JobSpec:
    """Job in the config of a trial; a plain dict would be copied, flattened and printed by Tune."""

    def __init__(self, job: Job) -> None:
        self.kind, self.payload = job.kind, dict(job.payload)

    def __deepcopy__(self, memo: object) -> JobSpec:
        return self

    def __repr__(self) -> str:
        return self.kind


class RunningBatch:
    """Batch of jobs at work, and what is known of each."""

    def __init__(
        self,
        jobs: Jobs,
        *,
        early: EarlyStopping | None,
        limit: int | None,
        has_room: Callable[[Sequence[Job]], bool],
    ) -> None:
        self.jobs, self.limit, self._has_room = jobs, limit, has_room
        self.report_seconds = REPORT_SECONDS if early is None else 0.0
        self.scheduler = FIFOScheduler() if early is None else _asha(early)
        self._metric = None if early is None else early.metric
        self.exhausted = False
        self.again: list[Job] = []
        self.running: dict[str, Job] = {}
        self.last_rows: dict[str, Row] = {}
        self.furthest: dict[str, int] = {}
        self.faults: dict[str, str | None] = {}  # last storage error of each trial
        self.finished = threading.Event()
        self.failure: Exception | None = None

    def ask(self) -> Job | None:
        full = self.limit is not None and len(self.running) >= self.limit
        if full or not self._has_room([*self.running.values()]):
            return None
        if self.again:
            return self.again.pop()
        if self.exhausted:
            return None
        job = self.jobs.ask()
        self.exhausted = job is None
        self.close_if_done()
        return job

    def compared(self, result: Row) -> Row:
        """Return what the scheduler compares trials by: nothing where it is not finite."""
        last = result["rows"][-1] if result.get("rows") else {}
        value = last.get(self._metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return {}
        return {TIME: last.get("epoch", 0), VALUE: value}

    def close_if_done(self) -> None:
        if self.exhausted and not self.running and not self.again:
            self.finished.set()

    def notify(self, call: Callable[[], None]) -> None:
        """Call a method of the jobs; Tune would take its error for a failure of the trial."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised again by `Pool.run`
            self.failure = self.failure or error
            self.finished.set()


class _Unsaved:
    """Mixin without pickled state: runs resume from the run folder, not from Tune's state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class JobSearcher(_Unsaved, Searcher):
    """Searcher that gives Tune the jobs of the running batch, and idle trials for other workers."""

    def __init__(self, scheduler: PoolScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return self.scheduler.next_config(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self.scheduler.give_up(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: see `_Unsaved`."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `_Unsaved`."""


class PoolScheduler(_Unsaved, FIFOScheduler):
    """Scheduler of all trials of the pool; passes those of a batch to the batch's scheduler."""

    def __init__(self, warm: int) -> None:
        super().__init__()
        self.warm = warm
        self.inbox: queue.SimpleQueue[RunningBatch] = queue.SimpleQueue()
        self.batch: RunningBatch | None = None
        self.closed = False
        self.live: dict[str, Trial | None] = {}
        self._over: list[Trial] = []
        self._free = False  # whether Tune keeps the worker of a trial that ended
        self._wanted = False  # whether a job waits for the worker of an idle trial
        self._ending = ""  # idle trial that was ended for it
        self._waiting: set[str] = set()  # jobs without a worker at the last result of an idle trial
        self._released: dict[str, float] = {}  # jobs for which an idle trial was ended, and when

    def next_config(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.closed:
            return str(Searcher.FINISHED)
        if (self.batch is None or self.batch.finished.is_set()) and not self.inbox.empty():
            self.batch = self.inbox.get()
        statuses = [trial and trial.status for trial in self.live.values()]
        if statuses.count(Trial.PENDING) >= max(PENDING, 2 * self.warm):
            return None
        if self.batch is not None and (job := self.batch.ask()) is not None:
            if self._free or (not self._idle and len(self.live) >= self.warm):
                if self._free:
                    self._released[trial_id] = time.monotonic()
                self._free = self._wanted = False
                self.batch.running[trial_id] = job
                self.live[trial_id] = None
                seconds = self.batch.report_seconds and self._at_least(self.batch.report_seconds)
                return {"job": JobSpec(job), "report_seconds": seconds}
            # Tune would start a worker for it, beside those that are idle or being started
            self.batch.again.append(job)
            self._wanted = True
        if len(self.live) < self.warm:
            self._free = False
            self.live[trial_id] = None
            return {"job": None, "report_seconds": self._at_least(IDLE_SECONDS)}
        return None

    @property
    def _idle(self) -> set[str]:
        return self.live.keys() - (self.batch.running.keys() if self.batch else set())

    def _at_least(self, seconds: float) -> float:
        """Return the seconds between two reports of a worker that do not overload the driver."""
        return max(seconds, self.warm / RESULTS_PER_SECOND)

    def _job(self, trial: Trial) -> Job | None:
        return self.batch.running.get(trial.trial_id) if self.batch else None

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Give a free worker to a job, else to the newest idle trial.

        For an older one that is pending a worker is being started, which Tune would drop.
        """
        jobs = [self.live.get(name) for name in (self.batch.running if self.batch else ())]
        candidates = [*jobs, *reversed(self.live.values())]
        return next(
            (trial for trial in candidates if trial and trial.status == Trial.PENDING), None
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self.live[trial.trial_id] = trial
        while self._over and self._over[0].status in (Trial.TERMINATED, Trial.ERROR):
            _empty(self._over.pop(0))
        if self.batch and self._job(trial):
            self.batch.scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Row) -> str:
        if self.closed:
            return str(TrialScheduler.STOP)
        job = self._job(trial)
        if job is None or self.batch is None:
            return self._idle_or_release(trial)
        self._report(trial, job, result)
        compared = self.batch.compared(result)
        decision: str = self.batch.scheduler.on_trial_result(tune_controller, trial, compared)
        if decision == TrialScheduler.STOP:
            self._end(trial.trial_id, stopped=True)
        return decision

    def _idle_or_release(self, trial: Trial) -> str:
        """End an idle trial only for a waiting job for which no other idle trial has been ended."""
        if self._wanted and not self._free and self._ending not in self.live:
            self._ending = trial.trial_id
            return str(TrialScheduler.STOP)
        live, now = self.live.items(), time.monotonic()
        running = {name for name, trial in live if trial and trial.status == Trial.RUNNING}
        self.warm = max(self.warm, len(running))
        jobs = self.batch.running if self.batch else {}
        waiting = jobs.keys() - running
        for name in self._waiting - waiting:
            self._served(name)
        self._waiting = waiting
        self._released = {
            name: since for name, since in self._released.items() if now - since < RELEASE_SECONDS
        }
        if len(self._released) >= len(waiting):
            return str(TrialScheduler.CONTINUE)
        first = next(name for name in jobs if name in waiting and name not in self._released)
        self._released[first] = now
        return str(TrialScheduler.STOP)

    def _served(self, name: str) -> None:
        """Forget a release: a job has started, not always the one it was meant for."""
        if name not in self._released:
            name = next(iter(self._released), "")
        self._released.pop(name, None)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Row) -> None:
        job = self._job(trial)
        if job is not None and self.batch is not None:
            self._report(trial, job, result)
            compared = self.batch.compared(result)
            self.batch.scheduler.on_trial_complete(tune_controller, trial, compared)
            self._end(trial.trial_id, error=result.get("error"))
        self.live.pop(trial.trial_id, None)
        self._over.append(trial)
        running = self.batch.running if self.batch else {}
        pending = (self.live.get(name) for name in running)
        self._free = not any(other and other.status == Trial.PENDING for other in pending)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Warn: a worker died, or its storage failed; Tune repeats the trial, or gives it up."""
        if trial.trial_id == self._ending:
            self._ending = ""
        if trial.trial_id in self._waiting:
            self._waiting.remove(trial.trial_id)
            self._served(trial.trial_id)
        job = self._job(trial)
        if self.batch and job:
            what = self.batch.faults.get(trial.trial_id) or "a worker was lost"
            log.warning("%s in mid-%s; its work is repeated", what, job.kind)
            self.batch.scheduler.on_trial_error(tune_controller, trial)

    def give_up(self, trial_id: str) -> None:
        trial = self.live.pop(trial_id, None)
        if self.batch is None or trial_id not in self.batch.running:
            return
        if trial is not None and trial.run_metadata.num_failures <= MAX_FAILURES:
            # Tune does not repeat a trial whose worker dies while it is handed over
            self.batch.again.append(self.batch.running.pop(trial_id))
        else:
            fault = self.batch.faults.get(trial_id)
            what = f"{fault}:" if fault else "its worker died"
            self._end(trial_id, error=f"{what} {1 + MAX_FAILURES} times in the same place")

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self.live.pop(trial.trial_id, None)

    def _report(self, trial: Trial, job: Job, result: Row) -> None:
        if self.batch is None:
            return
        self.batch.faults[trial.trial_id] = result.get("fault")
        if rows := result.get("rows"):
            self.batch.last_rows[trial.trial_id] = rows[-1]
            if rows[-1].get("epoch", 0) > self.batch.furthest.get(trial.trial_id, 0):
                # so that a long trial survives any number of lost nodes, but not its own faults
                self.batch.furthest[trial.trial_id] = rows[-1]["epoch"]
                trial.run_metadata.num_failures = 0
            jobs = self.batch.jobs
            self.batch.notify(lambda: jobs.report(job, rows))

    def _end(self, trial_id: str, *, error: str | None = None, stopped: bool = False) -> None:
        if self.batch is not None:
            job = self.batch.running.pop(trial_id)
            row = self.batch.last_rows.pop(trial_id, {})
            jobs = self.batch.jobs
            self.batch.notify(lambda: jobs.tell(Outcome(job, row, error, stopped)))
            self.batch.close_if_done()


class StopWhenClosed(_Unsaved, tune.Stopper):
    def __init__(self, scheduler: PoolScheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, trial_id: str, result: Row) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._scheduler.closed


def _empty(trial: Trial) -> None:
    """Clear the data of an ended trial, which Tune would keep as long as the run lasts."""
    trial.config, trial.evaluated_params = {}, {}
    metadata = trial.run_metadata
    metadata.metric_analysis, metadata.metric_n_steps, metadata.last_result = {}, {}, {}


def _asha(early: EarlyStopping) -> TrialScheduler:
    """Return the scheduler of ASHA (Li et al., 2020, https://arxiv.org/abs/1810.05934)."""
    return ASHAScheduler(
        time_attr=TIME,
        metric=VALUE,
        mode=early.mode,
        max_t=early.max_epochs + 1,  # a trial that reaches its last epoch is complete, not stopped
        grace_period=max(1, early.max_epochs // 9),
        reduction_factor=3,
    )
