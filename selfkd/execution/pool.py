"""Ray Tune as a pool of warm workers: the jobs of all batches run in one `Tuner`.

A `Tuner` for each batch would start new workers, which import torch and load the data again. Here
one `Tuner` lives as long as the run. Its searcher hands out the jobs of the running batch. Between
two batches each worker runs an idle trial, so that Tune keeps its process (of actors without a
trial it keeps only one). An idle trial ends as soon as a job waits.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import ray
from ray import tune
from ray.util.placement_group import placement_group_table

from selfkd.errors import RayLostError, describe_error
from selfkd.execution.group import TRAIN, Group, JobError, Room, WorkerLostError
from selfkd.execution.jobs import EarlyStopping, Job, Jobs, load_entry
from selfkd.execution.ray_private import keep_registered
from selfkd.execution.scheduler import (
    MAX_FAILURES,
    JobSearcher,
    JobSpec,
    PoolScheduler,
    RunningBatch,
    StopWhenClosed,
)
from selfkd.execution.watch import check
from selfkd.results import Row
from selfkd.storage.files import make_no_folder_again, retry_io
from selfkd.storage.remote import as_path
from selfkd.storage.temporary import TemporaryFolder

COORDINATOR = {"cpu": 0, "memory": 2**20}  # a trial of Tune must request some resource
END_SECONDS = 10.0  # limit for Tune to end its trials
STOP_SECONDS = 1.0  # the same where the run was stopped, and where nothing answers any more
BUSY_SECONDS = 10.0  # without any worker, after which is said that other runs hold the cluster
PERMANENT = (  # errors of the system that another attempt would meet again
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)


class Worker(tune.Trainable):
    """Warm process; `step` advances the generator that runs the job."""

    _rows: Iterator[Row] | None = None

    def setup(self, config: Mapping[str, Any]) -> None:
        entry, group = config["entry"], config["group"]
        # imported here, so that an idle trial warms the worker up
        self._run_job = load_entry(entry) if group is None else partial(Group(*group).run, entry)
        self._unseen: tuple[str, str] | None = config["run"]
        if self._unseen is not None:
            make_no_folder_again(as_path(self._unseen[0]))
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self.cleanup()
        self._job: JobSpec | None = new_config["job"]
        self._seconds: float = new_config["report_seconds"]
        self._fault: OSError | None = None
        return True

    def step(self) -> Row:
        """Return the next rows under a key of their own: Tune reads its own keys beside it."""
        if self._fault is not None:
            raise self._fault  # Tune repeats the trial: the storage may work again
        if self._job is None:
            time.sleep(self._seconds)
            return {"rows": []}
        rows: list[Row] = []
        end = time.monotonic() + self._seconds
        try:
            self._rows = self._rows or self._begin(self._job)
            for row in self._rows:
                rows.append(row)
                if time.monotonic() >= end:
                    return {"rows": rows}
        except WorkerLostError:
            raise  # Tune repeats the trial
        except JobError as error:
            return {"rows": rows, "error": str(error), "done": True}
        except Exception as error:  # noqa: BLE001 - the job would raise it again: no retry
            message = describe_error(error)
            if isinstance(error, OSError) and not isinstance(error, PERMANENT):
                self._fault = error
                return {"rows": rows, "fault": message}
            return {"rows": rows, "error": message, "done": True}
        return {"rows": rows, "done": True}

    def _begin(self, job: JobSpec) -> Iterator[Row]:
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
        self._scheduler = PoolScheduler(warm)
        self._workers, self._room = workers, Room(cpu=cpu, gpu=gpu)
        self._say, self._needs = say, f"{cpu:g} CPU, {gpu:g} GPU"
        group = None if workers == 1 else (workers, cpu, gpu)
        own = {"cpu": cpu, "gpu": gpu} if group is None else COORDINATOR
        self._failure: BaseException | None = None
        keep_registered()
        self._folder = TemporaryFolder("selfkd-tune-")
        self._tuner = tune.Tuner(
            tune.with_resources(Worker, own),
            param_space={"entry": entry, "group": group, "run": run},
            tune_config=tune.TuneConfig(
                search_alg=JobSearcher(self._scheduler),
                scheduler=self._scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(self._folder.path),
                verbose=0,
                # Tune's own of a notebook clears what the cell has printed, even at verbose 0
                progress_reporter=tune.CLIReporter(),
                stop=StopWhenClosed(self._scheduler),
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._scheduler.closed = True
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | RayLostError)
        self._thread.join(timeout=STOP_SECONDS if stopped else END_SECONDS)
        self._folder.remove()

    def _has_room(self, running: Sequence[Job]) -> bool:
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
            RayLostError: Ray has died.
            RuntimeError: Ray Tune stopped before the jobs were done.
            Exception: `jobs` raised it.
        """
        batch = RunningBatch(jobs, early=early, limit=limit, has_room=self._has_room)
        self._scheduler.inbox.put(batch)
        while not batch.finished.wait(timeout=0.2):
            check()
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
