"""Several workers that train one student together: Ray Train inside a trial of Ray Tune.

The trial itself is then a coordinator without resources of its own. A job that trains runs on a
group of workers, which may be on several nodes; any other job on one worker, as a plain task.
"""

from __future__ import annotations

import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import get_webui_url_from_internal_kv
from ray.util.placement_group import get_current_placement_group, remove_placement_group
from ray.util.queue import Queue
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from selfkd.execution.jobs import load_entry
from selfkd.results import Row

TRAIN = "train"  # the kind of job that a group does
POLL_SECONDS = 0.2
ROOM_SECONDS = 2.0
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_SECONDS),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process each: a lost trial is repeated anyway
}
_RAISED = "raised"  # key of the row in which a job's own error comes
_PLACE = "place"  # key of the first row, in which comes what Ray holds free for a group
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


class JobError(RuntimeError):
    """A job failed by what it did itself; says how, as the job would."""


class WorkerLostError(RuntimeError):
    """A process that did a job died: it is worth another try."""


@dataclass(frozen=True)
class Group:
    """So many workers, with CPUs and GPUs each."""

    workers: int
    cpu: float
    gpu: float

    def run(self, entry: str, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        """Do a job; closing this ends whatever does it.

        Raises:
            JobError: the job raised.
            OSError: the system refused something to the job, its storage for one.
            WorkerLostError: a process died.
        """
        if kind != TRAIN:
            task = _work.options(
                num_cpus=self.cpu,
                num_gpus=self.gpu,
                # the trial's own place has no room for it
                scheduling_strategy=PlacementGroupSchedulingStrategy(None),
            )
            yield from _followed(task.remote(entry, kind, dict(payload)))
            return
        here = ray.get_runtime_context().get_node_id()
        task = _train.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        with tempfile.TemporaryDirectory(prefix="selfkd-train-") as folder:
            yield from _followed(task.remote(entry, dict(payload), self, folder))


def _followed(rows: Any) -> Iterator[Row]:
    """Yield the rows of a task; closing this kills it, and what it owns dies with it.

    But for the group's place: while the driver lives, Ray frees none that an actor has asked for.
    """
    place = None
    try:
        for reference in rows:
            row: Row = ray.get(reference)
            if _RAISED in row:
                raised = row[_RAISED]
                raise raised if isinstance(raised, OSError) else JobError(raised)
            if _PLACE in row:
                place = row[_PLACE]
            else:
                yield row
    except ray.exceptions.RayError as error:
        raise WorkerLostError(str(error)) from error
    finally:
        ray.cancel(rows, force=True)
        if place is not None:
            remove_placement_group(place)


class Room:
    """How many workers the nodes of the cluster hold, those that join late among them."""

    def __init__(self, *, cpu: float, gpu: float) -> None:
        self._cpu, self._gpu = cpu, gpu
        self._seen, self._seen_at = 0, -ROOM_SECONDS

    def __call__(self) -> int:
        """Return the number, looked up every few seconds."""
        if time.monotonic() - self._seen_at >= ROOM_SECONDS:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._seen = sum(fitting(node, self._cpu, self._gpu) for node in nodes)
            self._seen_at = time.monotonic()
        return self._seen


def fitting(resources: Mapping[str, float], cpu: float, gpu: float) -> int:
    """Return how many workers fit on a node."""
    fits = int(resources.get("CPU", 0.0) / cpu)
    return min(fits, int(resources.get("GPU", 0.0) / gpu)) if gpu > 0 else fits


@ray.remote(max_retries=0, num_returns="streaming")
def _work(entry: str, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Do a job here."""
    try:
        yield from load_entry(entry)(kind, payload)
    except Exception as error:  # noqa: BLE001 - told to whoever waits, as the trial itself does
        yield _told(error)


def _told(error: Exception) -> Row:
    """Return the row of what a job raised: what the system refused as it is, the rest in words."""
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return {_RAISED: error}
    return {_RAISED: f"{type(error).__name__}: {error}"}


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def _train(entry: str, payload: Mapping[str, Any], group: Group, folder: str) -> Iterator[Row]:
    """Train on every rank of a group; yield what the first rank yields.

    All that runs for it is owned by this task, and ends with it.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Leave out, where there is no dashboard, what asks it whether the group still lives.

            It would ask at the dashboard's usual port: there may be another cluster's, which knows
            no such group, and the group would be ended in its midst.
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
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
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
            raised = raised or row  # the first: others may be because of it
    if raised is not None:
        yield raised
    elif failure:
        raise failure[0]


def _on_rank(config: Mapping[str, Any]) -> None:
    """Do a job on this rank, with `torch.distributed` initialised; the first rank's rows count."""
    import torch.distributed as dist

    rows: Queue = config["rows"]
    if dist.get_rank() == 0:
        rows.put({_PLACE: get_current_placement_group()})
    try:
        for row in load_entry(config["entry"])(TRAIN, config["payload"]):
            if dist.get_rank() == 0:
                rows.put(row)
    except Exception as error:
        # where a rank died the others' talk fails: that is no fault of the job
        if not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            rows.put(_told(error))
        raise
