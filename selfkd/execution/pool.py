"""Ray Tune as a pool of warm workers: the jobs of every generation run in one `Tuner`.

A new `Tuner` for each generation would start new workers each time, and each of them imports torch
and loads the data again. Here one `Tuner` lives as long as the run. Its searcher hands out the jobs
of the running batch; between two batches the workers hold an empty trial, so that Tune keeps their
processes for reuse (of idle actors it keeps only one). A hold ends as soon as a job waits.
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
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # a line of our own, no traceback
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1e9")  # a run resumes from its own folder

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
IDLE_SECONDS = 0.05  # how soon an idle worker notices that a job waits
COORDINATOR = {"cpu": 0, "memory": 2**20}  # Tune's trials must ask for something
RELEASE_SECONDS = 10.0  # after which a worker set free for a job that has none was lost on its way
RESULTS_PER_SECOND = 100  # of all workers together: with many, both times above are longer
BUSY_SECONDS = 10.0  # without a worker, after which is said that others hold the cluster
MAX_FAILURES = 2  # how often a trial is repeated whose worker died before it got further
LASTING = (  # of what the system may refuse: a job that names a wrong file would again
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)

log = logging.getLogger(__name__)


class _JobSpec:
    """A job on its way to a worker; a plain dict Tune would copy, flatten and print."""

    def __init__(self, job: Job) -> None:
        self.kind, self.payload = job.kind, dict(job.payload)

    def __deepcopy__(self, memo: object) -> _JobSpec:
        return self

    def __repr__(self) -> str:
        return self.kind


class Worker(tune.Trainable):
    """A warm process: `step` advances the generator that does the job."""

    _rows: Iterator[Row] | None = None

    def setup(self, config: Mapping[str, Any]) -> None:
        entry, group = config["entry"], config["group"]
        # imported here, so that a hold warms a worker up
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
            raise self._fault  # Tune repeats the trial: the storage may be there again
        if self._job is None:
            time.sleep(self._seconds)
            return {"held": True}
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
        except Exception as error:  # noqa: BLE001 - a job that raises would raise again: no retry
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and not isinstance(error, LASTING):
                self._fault = error
                return {**(rows[-1] if rows else {}), "rows": rows, "fault": told}
            return {"rows": rows, "error": told, "done": True}
        return {**(rows[-1] if rows else {}), "rows": rows, "done": True}

    def _begin(self, job: _JobSpec) -> Iterator[Row]:
        """Start a job; before the first, see whether this node, which may have joined late, can.

        A folder that is not the run's would be made here, and lost.
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
        """End a job that is stopped early, and with it what runs elsewhere for it."""
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
        self.faults: dict[str, str | None] = {}  # of storage, as each trial last told
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

    def hear(self, listen: Callable[[], None]) -> None:
        """Tell the jobs something; Tune would take what they raise for a failure of the trial."""
        try:
            listen()
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            self.failure = self.failure or error
            self.finished.set()


class _Unsaved:
    """Leaves its state out of the state that Tune pickles: a run resumes from its own folder."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _JobSearcher(_Unsaved, Searcher):
    """Hands the jobs of the running batch to Tune, and holds for workers that would be idle."""

    def __init__(self, desk: _PoolScheduler) -> None:
        super().__init__()
        self.desk = desk

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return self.desk.next_config(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self.desk.give_up(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `_Unsaved`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `_Unsaved`."""


class _PoolScheduler(_Unsaved, FIFOScheduler):
    """Follows every trial of the pool and passes those of the batch to the batch's scheduler."""

    def __init__(self, warm: int) -> None:
        super().__init__()
        self.warm = warm
        self.inbox: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self.batch: _Batch | None = None
        self.closed = False
        self.live: dict[str, Trial | None] = {}
        self._over: list[Trial] = []
        self._waiting: set[str] = set()  # jobs without a worker, when a hold last looked
        self._released: dict[str, float] = {}  # those that a hold was ended for, and when

    def next_config(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.closed:
            return str(Searcher.FINISHED)
        if (self.batch is None or self.batch.finished.is_set()) and not self.inbox.empty():
            self.batch = self.inbox.get()
        if self.batch is not None and (job := self.batch.ask()) is not None:
            self.batch.running[trial_id] = job
            self.live[trial_id] = None
            seconds = self.batch.report_seconds and self._at_least(self.batch.report_seconds)
            return {"job": _JobSpec(job), "report_seconds": seconds}
        if len(self.live) < self.warm:
            self.live[trial_id] = None
            return {"job": None, "report_seconds": self._at_least(IDLE_SECONDS)}
        return None

    def _at_least(self, seconds: float) -> float:
        """Return how often a worker reports, so that all of them do not flood the driver."""
        return max(seconds, self.warm / RESULTS_PER_SECOND)

    def _job(self, trial: Trial) -> Job | None:
        return self.batch.running.get(trial.trial_id) if self.batch else None

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Give a free worker to a job, else to the newest hold.

        An older hold that still waits has a worker of its own starting, which Tune would drop.
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
            return self._idle_or_release()
        self._report(trial, job, result)
        decision: str = self.batch.scheduler.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._end(trial.trial_id, stopped=True)
        return decision

    def _idle_or_release(self) -> str:
        """End a hold only for a job that waits and has not been given another hold's worker."""
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
        """Forget a release: a job has started, not always the one that it was meant for."""
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

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A worker died, or its storage failed: Tune repeats the trial, or gives it up."""
        if trial.trial_id in self._waiting:
            self._waiting.remove(trial.trial_id)
            self._served(trial.trial_id)
        job = self._job(trial)
        if self.batch and job:
            what = self.batch.faults.get(trial.trial_id) or "a worker was lost"
            log.warning("%s in mid-%s; what it did is done again", what, job.kind)
            self.batch.scheduler.on_trial_error(tune_controller, trial)

    def give_up(self, trial_id: str) -> None:
        trial = self.live.pop(trial_id, None)
        if self.batch is None or trial_id not in self.batch.running:
            return
        if trial is not None and trial.run_metadata.num_failures <= MAX_FAILURES:
            # Tune repeats no trial whose worker dies as it is handed over from another
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
                # so that a long trial outlives any number of nodes, but not its own fault
                self.batch.furthest[trial.trial_id] = rows[-1]["epoch"]
                trial.run_metadata.num_failures = 0
            jobs = self.batch.jobs
            self.batch.hear(lambda: jobs.report(job, rows))

    def _end(self, trial_id: str, *, error: str | None = None, stopped: bool = False) -> None:
        if self.batch is not None:
            job = self.batch.running.pop(trial_id)
            row = self.batch.last_rows.pop(trial_id, {})
            jobs = self.batch.jobs
            self.batch.hear(lambda: jobs.tell(Outcome(job, row, error, stopped)))
            self.batch.close_if_done()


class Pool:
    """Warm Tune workers that run batches of jobs, one batch after the other.

    Args:
        entry: `module:function` of what does a job, imported on the workers: it takes a kind and
            a payload, and yields rows.
        cpu: CPUs of one worker (a fraction is allowed).
        gpu: GPUs of one worker (a fraction is allowed).
        warm: workers started at once and kept while nothing runs.
        workers: how many train one student together; the trials are then coordinators.
        run: run folder that every worker must see, and what stands in its `run_id`.
        tell: says, where others hold the cluster, that this is waited for.
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
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._desk = _PoolScheduler(warm)
        self._workers, self._room = workers, Room(cpu=cpu, gpu=gpu)
        self._tell, self._needs = tell, f"{cpu:g} CPU and {gpu:g} GPU"
        group = None if workers == 1 else (workers, cpu, gpu)
        own = {"cpu": cpu, "gpu": gpu} if group is None else COORDINATOR
        self._failure: BaseException | None = None
        self._folder = tempfile.TemporaryDirectory(  # Tune may still write when it is left
            prefix="selfkd-tune-", ignore_cleanup_errors=True
        )
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(8, 2 * warm))
        self._tuner = tune.Tuner(
            tune.with_resources(Worker, own),
            param_space={"entry": entry, "group": group, "run": run},
            tune_config=tune.TuneConfig(
                search_alg=_JobSearcher(self._desk),
                scheduler=self._desk,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=self._folder.name,
                verbose=0,
                stop=_StopWhenClosed(self._desk),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="tune", daemon=True)

    def _fit(self) -> None:
        try:
            self._tuner.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._desk.closed = True
        self._thread.join(timeout=10)
        self._folder.cleanup()

    def has_room(self, running: Sequence[Job]) -> bool:
        """Whether the nodes hold one more job like those that run; Tune itself sees to single ones.

        A coordinator takes next to nothing, so Tune would start all of them at once.
        """
        if self._workers == 1 or not running:
            return True
        sizes = [self._workers if job.kind == TRAIN else 1 for job in running]
        return sum(sizes) + sizes[-1] <= self._room()

    def run(
        self, jobs: Jobs, *, early: EarlyStopping | None = None, limit: int | None = None
    ) -> None:
        """Run a batch to its end.

        Args:
            jobs: where jobs come from and outcomes go; called from the pool's own thread.
            early: how trials are stopped early, by ASHA; none is when not given.
            limit: most jobs at a time, for a search that learns from outcomes.

        Raises:
            RuntimeError: the pool has stopped.
            Exception: what `jobs` raised.
        """
        batch = _Batch(jobs, early=early, limit=limit, pool=self)
        self._desk.inbox.put(batch)
        while not batch.finished.wait(timeout=0.2):
            if not self._thread.is_alive():
                raise RuntimeError(
                    f"Ray Tune stopped before the jobs were done: {self._failure}"
                ) from self._failure
            if self._tell is not None and time.monotonic() - self._began > BUSY_SECONDS:
                self._tell_if_waiting(self._tell)
        if batch.failure is not None:
            raise batch.failure

    def _tell_if_waiting(self, tell: Callable[[str], None]) -> None:
        """Look until there is a worker, which then stays, or others are seen to have it all."""
        places = set(_places())
        if "FINISHED" in places:
            self._tell = None
        elif places == {"NO_RESOURCES"}:
            self._tell = None
            tell(
                f"no worker has started for {BUSY_SECONDS:g} s: others hold the cluster, of which "
                f"a run keeps its workers to its end; this one waits for {self._needs} to be free"
            )


def _places() -> list[str]:
    """Return how far Ray has come with each place for a worker that this driver has asked for."""
    job = ray.get_runtime_context().get_job_id()
    return [
        place["stats"]["scheduling_state"]
        for name, place in placement_group_table().items()
        if name.endswith(job) and place["state"] != "REMOVED" and _holds_more(place["bundles"])
    ]


def _holds_more(bundles: Mapping[int, Mapping[str, float]]) -> bool:
    """Whether a place holds more than a coordinator's."""
    return any({"CPU", "GPU"} & bundle.keys() for bundle in bundles.values())


class _StopWhenClosed(_Unsaved, tune.Stopper):
    def __init__(self, desk: _PoolScheduler) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: Row) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._desk.closed


def _empty(trial: Trial) -> None:
    """Take from a trial that is over what Tune would keep of it as long as the run lasts."""
    trial.config, trial.evaluated_params = {}, {}
    metadata = trial.run_metadata
    metadata.metric_analysis, metadata.metric_n_steps, metadata.last_result = {}, {}, {}


def _asha(early: EarlyStopping) -> TrialScheduler:
    """ASHA (Li et al., 2020, https://arxiv.org/abs/1810.05934)."""
    return ASHAScheduler(
        time_attr="epoch",
        metric=early.metric,
        mode=early.mode,
        max_t=early.max_epochs + 1,  # a trial that reaches its last epoch is complete, not stopped
        grace_period=max(1, early.max_epochs // 9),
        reduction_factor=3,
    )
