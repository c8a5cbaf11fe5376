"""Several workers that train one student together: Ray Train within a trial of Ray Tune.

The trial is then a coordinator without resources of its own. A training job runs on a group of
workers, which may be on several nodes; any other job runs on one worker, as a Ray task.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group, remove_placement_group
from ray.util.queue import Queue
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from selfkd.errors import describe_error
from selfkd.execution.jobs import load_entry
from selfkd.execution.ray_private import get_webui_url_from_internal_kv
from selfkd.results import Row
from selfkd.storage.temporary import TemporaryFolder

TRAIN = "train"  # kind of the jobs that run on a group
POLL_SECONDS = 0.2
ROOM_SECONDS = 2.0  # between two counts of the nodes' workers
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_SECONDS),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process each; lost trials are repeated anyway
}
_RAISED = "raised"  # key of a row that carries an error of the job itself
_PLACEMENT = "placement_group"  # key of the first row, which carries the group's placement group
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


class JobError(RuntimeError):
    """Error raised by the job itself; another attempt would fail as well."""


class WorkerLostError(RuntimeError):
    """Death of a process that ran a job; another attempt may succeed."""


@dataclass(frozen=True)
class Group:
    """Workers that train one student together."""

    workers: int
    """Number of workers."""
    cpu: float
    """CPUs of each worker."""
    gpu: float
    """GPUs of each worker."""

    def run(self, entry: str, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        """Run a job and yield its rows; closing the generator ends all its processes.

        Args:
            entry: Reference of the function that runs jobs, `module:function`.
            kind: Kind of the job; `train` runs on the group, others on one worker.
            payload: Payload of the job.

        Raises:
            JobError: The job raised an error.
            OSError: The job met an error of the system, such as a failing storage.
            WorkerLostError: A process died.
        """
        if kind != TRAIN:
            task = _work.options(
                num_cpus=self.cpu,
                num_gpus=self.gpu,
                # the placement group of the trial has no resources for it
                scheduling_strategy=PlacementGroupSchedulingStrategy(None),
            )
            yield from _stream_rows(task.remote(entry, kind, dict(payload)))
            return
        here = ray.get_runtime_context().get_node_id()
        task = _train.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        with TemporaryFolder("selfkd-train-") as folder:
            yield from _stream_rows(task.remote(entry, dict(payload), self, str(folder.path)))


def _stream_rows(rows: Any) -> Iterator[Row]:
    """Yield the rows of a task; closing the generator kills it with all that it owns.

    The placement group is removed here: while the driver lives, Ray removes none that an actor has
    created.
    """
    placement = None
    try:
        for reference in rows:
            row: Row = ray.get(reference)
            if _RAISED in row:
                raised = row[_RAISED]
                raise raised if isinstance(raised, OSError) else JobError(raised)
            if _PLACEMENT in row:
                placement = row[_PLACEMENT]
            else:
                yield row
    except ray.exceptions.RayError as error:
        raise WorkerLostError(str(error)) from error
    finally:
        ray.cancel(rows, force=True)
        if placement is not None:
            remove_placement_group(placement)


class Room:
    """Number of workers that fit on the nodes of the cluster, including nodes that join late.

    Args:
        cpu: CPUs of one worker.
        gpu: GPUs of one worker.
    """

    def __init__(self, *, cpu: float, gpu: float) -> None:
        self._cpu, self._gpu = cpu, gpu
        self._seen, self._seen_at = 0, -ROOM_SECONDS

    def __call__(self) -> int:
        """Return the number, updated every `ROOM_SECONDS`."""
        if time.monotonic() - self._seen_at >= ROOM_SECONDS:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._seen = sum(fitting(node, self._cpu, self._gpu) for node in nodes)
            self._seen_at = time.monotonic()
        return self._seen


def fitting(resources: Mapping[str, float], cpu: float, gpu: float) -> int:
    """Return how many workers fit on a node.

    Args:
        resources: Resources of the node, as Ray names them.
        cpu: CPUs of one worker.
        gpu: GPUs of one worker.
    """
    fits = int(resources.get("CPU", 0.0) / cpu)
    return min(fits, int(resources.get("GPU", 0.0) / gpu)) if gpu > 0 else fits


@ray.remote(max_retries=0, num_returns="streaming")
def _work(entry: str, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Run a job in this task."""
    try:
        yield from load_entry(entry)(kind, payload)
    except Exception as error:  # noqa: BLE001 - sent as a row and raised by the consumer
        yield _error_row(error)


def _error_row(error: Exception) -> Row:
    """Return the row of an error: errors of the system as they are, others as text."""
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return {_RAISED: error}
    return {_RAISED: describe_error(error)}


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def _train(entry: str, payload: Mapping[str, Any], group: Group, folder: str) -> Iterator[Row]:
    """Train on every rank of a group; yield the rows of rank 0.

    All processes of the group are owned by this task, and end with it.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Without a dashboard, leave out the callback that checks there that the group lives.

            It would ask at the dashboard's default port, where the dashboard of another cluster
            may be, which does not know the group: the group would be ended in the middle of a job.
            """
            callbacks: list[Any] = super()._create_default_callbacks()
            if get_webui_url_from_internal_kv():
                return callbacks
            cleaner = "PlacementGroupCleanerCallback"
            return [one for one in callbacks if type(one).__name__ != cleaner]

    rows = Queue(actor_options={"num_cpus": 0})
    each = {"CPU": group.cpu, "GPU": group.gpu}
    trainer = Trainer(
        _on_rank,
        train_loop_config={"entry": entry, "payload": payload, "rows": rows},
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=group.gpu > 0,
            resources_per_worker={kind: count for kind, count in each.items() if count > 0},
        ),
        run_config=RunConfig(name="group", storage_path=folder),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)
    thread.start()
    raised = None
    while thread.is_alive() or not rows.empty():
        try:
            row = rows.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if _RAISED not in row:
            yield row
        else:
            raised = raised or row  # the first error: others may be its consequences
    if raised is not None:
        yield raised
    elif failure:
        raise failure[0]


def _on_rank(config: Mapping[str, Any]) -> None:
    """Run a job on this rank, with `torch.distributed` initialised; rank 0 sends its rows."""
    import torch.distributed as dist

    rows: Queue = config["rows"]
    if dist.get_rank() == 0:
        rows.put({_PLACEMENT: get_current_placement_group()})
    try:
        for row in load_entry(config["entry"])(TRAIN, config["payload"]):
            if dist.get_rank() == 0:
                rows.put(row)
    except Exception as error:
        # after the death of a rank, collective operations of others fail: not an error of the job
        if not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            rows.put(_error_row(error))
        raise
