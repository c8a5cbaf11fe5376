"""Ray Tune as a pool of warm workers: the jobs of all batches run in one `Tuner`.

A `Tuner` for each batch would start new workers, which import torch and load the data again. Here
one `Tuner` lives as long as the run. Its searcher hands out the jobs of the running batch. Between
two batches each worker runs an idle trial, so that Tune keeps its process (of actors without a
trial it keeps only one). An idle trial ends as soon as a job waits.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # one line by selfkd instead
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1e9")  # runs resume from the run folder

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import placement_group_table

from selfkd.execution.group import TRAIN, Group, JobError, Room, WorkerLostError
from selfkd.execution.jobs import EarlyStopping, Job, Jobs, Outcome, load_entry
from selfkd.results import Row
from selfkd.storage.files import retry_io
from selfkd.storage.remote import as_path

REPORT_SECONDS = 0.5  # epochs shorter than this are reported together
IDLE_SECONDS = 0.05  # between two results of an idle trial, which ends at one of them
COORDINATOR = {"cpu": 0, "memory": 2**20}  # a trial of Tune must request some resource
RELEASE_SECONDS = 10.0  # after which another idle trial is ended for a job that still waits
RESULTS_PER_SECOND = 100  # of all workers together: with many, the first two times are longer
BUSY_SECONDS = 10.0  # without any worker, after which is said that other runs hold the cluster
MAX_FAILURES = 2  # repetitions of a trial whose worker died before it got further
PERMANENT = (  # errors of the system that another attempt would meet again
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)

log = logging.getLogger(__name__)


class _JobSpec:
    """Job in the config of a trial; a plain dict would be copied, flattened and printed by Tune."""

    def __init__(self, job: Job) -> None:
        self.kind, self.payload = job.kind, dict(job.payload)

    def __deepcopy__(self, memo: object) -> _JobSpec:
        return self

    def __repr__(self) -> str:
        return self.kind


class Worker(tune.Trainable):
    """Warm process; `step` advances the generator that runs the job."""

    _rows: Iterator[Row] | None = None

    def setup(self, config: Mapping[str, Any]) -> None:
        entry, group = config["entry"], config["group"]
        # imported here, so that an idle trial warms the worker up
        self._run_job = load_entry(entry) if group is None else partial(Group(*group).run, entry)
        self._unseen: tuple[str, str] | None = config["run"]
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self.cleanup()
        self._job: _JobSpec | None = new_config["job"]
        self._seconds: float = new_config["report_seconds"]
        self._fault: OSError | None = None
        return True

    def step(self) -> Row:
        if self._fault is not None:
            raise self._fault  # Tune repeats the trial: the storage may work again
        if self._job is None:
            time.sleep(self._seconds)
            return {"idle": True}
        rows: list[Row] = []
        end = time.monotonic() + self._seconds
        try:
            self._rows = self._rows or self._begin(self._job)
            for row in self._rows:
                rows.append(row)
                if time.monotonic() >= end:
                    return {**rows[-1], "rows": rows}
        except WorkerLostError:
            raise  # Tune repeats the trial
        except JobError as error:
            return {"rows": rows, "error": str(error), "done": True}
        except Exception as error:  # noqa: BLE001 - the job would raise it again: no retry
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and not isinstance(error, PERMANENT):
                self._fault = error
                return {**(rows[-1] if rows else {}), "rows": rows, "fault": message}
            return {"rows": rows, "error": message, "done": True}
        return {**(rows[-1] if rows else {}), "rows": rows, "done": True}

    def _begin(self, job: _JobSpec) -> Iterator[Row]:
        """Start a job; before the first one, check that this node sees the run folder.

        A node that joined late may not: files would be written to a local folder, and lost.
        """
        if self._unseen is not None:
            folder, run_id = self._unseen
            if _found(folder) != run_id:
                raise OSError(
                    "storage must be a folder that every node sees, got "
                    f"{folder}, which {socket.gethostname()} does not see"
                )
            self._unseen = None
        return self._run_job(job.kind, job.payload)

    def cleanup(self) -> None:
        """End a job that is stopped early, with its processes on other nodes."""
        rows, self._rows = self._rows, None
        if isinstance(rows, Generator):
            rows.close()


def _found(folder: str) -> str | None:
    path = as_path(folder) / "run_id"
    try:
        return retry_io(path, path.read_text)
    except FileNotFoundError:
        return None


class _Batch:
    """Batch of jobs as the pool runs it."""

    def __init__(
        self, jobs: Jobs, *, early: EarlyStopping | None, limit: int | None, pool: Pool
    ) -> None:
        self.jobs, self.limit, self.pool = jobs, limit, pool
        self.report_seconds = REPORT_SECONDS if early is None else 0.0
        self.scheduler = FIFOScheduler() if early is None else _asha(early)
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
        if full or not self.pool.has_room([*self.running.values()]):
            return None
        if self.again:
            return self.again.pop()
        if self.exhausted:
            return None
        job = self.jobs.ask()
        self.exhausted = job is None
        self.close_if_done()
        return job

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


class _JobSearcher(_Unsaved, Searcher):
    """Searcher that gives Tune the jobs of the running batch, and idle trials for other workers."""

    def __init__(self, scheduler: _PoolScheduler) -> None:
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


class _PoolScheduler(_Unsaved, FIFOScheduler):
    """Scheduler of all trials of the pool; passes those of a batch to the batch's scheduler."""

    def __init__(self, warm: int) -> None:
        super().__init__()
        self.warm = warm
        self.inbox: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self.batch: _Batch | None = None
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
        if self.batch is not None and (job := self.batch.ask()) is not None:
            if self._free or (not self._idle and len(self.live) >= self.warm):
                if self._free:
                    self._released[trial_id] = time.monotonic()
                self._free = self._wanted = False
                self.batch.running[trial_id] = job
                self.live[trial_id] = None
                seconds = self.batch.report_seconds and self._at_least(self.batch.report_seconds)
                return {"job": _JobSpec(job), "report_seconds": seconds}
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
        decision: str = self.batch.scheduler.on_trial_result(tune_controller, trial, result)
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
            self.batch.scheduler.on_trial_complete(tune_controller, trial, result)
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


class Pool:
    """Executor on warm workers of Ray Tune, for one batch of jobs after the other.

    Args:
        entry: Reference of the function that runs jobs, `module:function`, imported on the workers;
            it takes a kind and a payload, and yields rows.
        cpu: CPUs of one worker; fractions are allowed.
        gpu: GPUs of one worker; fractions are allowed.
        warm: Number of workers started at once and kept between batches.
        workers: Number of workers that train one student together; above 1, trials are
            coordinators.
        run: Run folder that every worker must see, and the content of its `run_id`.
        say: Callback for messages to the user, such as that other runs hold the cluster.
    """

    def __init__(
        self,
        entry: str,
        *,
        cpu: float,
        gpu: float,
        warm: int,
        workers: int = 1,
        run: tuple[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._scheduler = _PoolScheduler(warm)
        self._workers, self._room = workers, Room(cpu=cpu, gpu=gpu)
        self._say, self._needs = say, f"{cpu:g} CPU, {gpu:g} GPU"
        group = None if workers == 1 else (workers, cpu, gpu)
        own = {"cpu": cpu, "gpu": gpu} if group is None else COORDINATOR
        self._failure: BaseException | None = None
        self._folder = tempfile.TemporaryDirectory(  # Tune may still write at the end
            prefix="selfkd-tune-", ignore_cleanup_errors=True
        )
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(8, 2 * warm))
        self._tuner = tune.Tuner(
            tune.with_resources(Worker, own),
            param_space={"entry": entry, "group": group, "run": run},
            tune_config=tune.TuneConfig(
                search_alg=_JobSearcher(self._scheduler),
                scheduler=self._scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=self._folder.name,
                verbose=0,
                stop=_StopWhenClosed(self._scheduler),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="tune", daemon=True)

    def _fit(self) -> None:
        try:
            self._tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.closed = True
        self._thread.join(timeout=10)
        self._folder.cleanup()

    def has_room(self, running: Sequence[Job]) -> bool:
        """Return whether one more job like the last one fits beside those that run.

        Only groups are counted here: as a coordinator requests next to nothing, Tune would start
        all of them at once.

        Args:
            running: Jobs that run.
        """
        if self._workers == 1 or not running:
            return True
        sizes = [self._workers if job.kind == TRAIN else 1 for job in running]
        return sum(sizes) + sizes[-1] <= self._room()

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run a batch of jobs to its end.

        Args:
            jobs: Batch of jobs; called from the pool's own thread.
            early: Early stopping of trials, by ASHA; none when not given.
            limit: Largest number of jobs at a time; no limit when not given.

        Raises:
            RuntimeError: Ray Tune stopped before the jobs were done.
            Exception: `jobs` raised it.
        """
        batch = _Batch(jobs, early=early, limit=limit, pool=self)
        self._scheduler.inbox.put(batch)
        while not batch.finished.wait(timeout=0.2):
            if not self._thread.is_alive():
                raise RuntimeError(
                    f"Ray Tune stopped before the jobs were done: {self._failure}"
                ) from self._failure
            if self._say is not None and time.monotonic() - self._began > BUSY_SECONDS:
                self._say_if_waiting(self._say)
        if batch.failure is not None:
            raise batch.failure

    def _say_if_waiting(self, say: Callable[[str], None]) -> None:
        """Say once where other runs hold the cluster; not once a worker has started."""
        states = set(_placement_states())
        if "FINISHED" in states:
            self._say = None
        elif states == {"NO_RESOURCES"}:
            self._say = None
            say(f"no free resources: other runs hold the cluster; waiting for {self._needs}")


def _placement_states() -> list[str]:
    """Return the scheduling state of each placement group of this driver's workers."""
    job = ray.get_runtime_context().get_job_id()
    return [
        group["stats"]["scheduling_state"]
        for name, group in placement_group_table().items()
        if name.endswith(job) and group["state"] != "REMOVED" and _has_workers(group["bundles"])
    ]


def _has_workers(bundles: Mapping[int, Mapping[str, float]]) -> bool:
    """Return whether a placement group is for workers, not for a coordinator alone."""
    return any({"CPU", "GPU"} & bundle.keys() for bundle in bundles.values())


class _StopWhenClosed(_Unsaved, tune.Stopper):
    def __init__(self, scheduler: _PoolScheduler) -> None:
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
        time_attr="epoch",
        metric=early.metric,
        mode=early.mode,
        max_t=early.max_epochs + 1,  # a trial that reaches its last epoch is complete, not stopped
        grace_period=max(1, early.max_epochs // 9),
        reduction_factor=3,
    )
