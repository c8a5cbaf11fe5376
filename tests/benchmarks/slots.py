"""Hundreds of slots and ten thousand trials on a machine that has neither, in simulated time.

    python tests/benchmarks/slots.py [--slots 64,512] [--trials 100,1000,10000] [--mean 60]

Everything of the driver is the real one: the search, the rows, the run folder, the pool, and Ray
Tune's own controller. Its workers are simulated: a trial takes a time drawn from its seed, between
half and one and a half times the mean, and no process. The clock jumps to the next thing that
happens, and the CPU time that the driver takes for each thing is added to it, so that a driver that
is too slow for its slots leaves them empty.

Printed are the share of the slots that is busy, but for the end of a stage, where FIFO list
scheduling of the same durations leaves them empty too; and milliseconds of the driver a trial,
which should not grow with the number of trials. `scale.py` has real processes, up to 64 of them.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path[:0] = [HERE]

import ray  # noqa: E402
import scale  # noqa: E402
from ray.air.execution._internal.tracked_actor import TrackedActor  # noqa: E402
from ray.tune.execution import tune_controller  # noqa: E402

CALL_SECONDS = 0.002  # from a call of a worker's method until its result
START_SECONDS = 5.0


class Clock:
    """Simulated time: the driver's own CPU time, and jumps over what the workers take."""

    def __init__(self) -> None:
        self.now, self.spent, self._seen = 0.0, 0.0, time.process_time()

    def spend(self) -> None:
        """Add the CPU time that this process took since the last call."""
        seen = time.process_time()
        self.now, self.spent = self.now + seen - self._seen, self.spent + seen - self._seen
        self._seen = seen


class Worker:
    """Simulated worker: the rows of its job, and when it reports them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.live, self.iteration = False, 0
        self.reset(config)

    def reset(self, config: Mapping[str, Any]) -> None:
        self.job, self.seconds = config["job"], config["report_seconds"]
        self.reported, self.begin = 0, -1.0

    def train(self, now: float, mean: float, epochs: int) -> tuple[float, dict[str, Any]]:
        """Return when it reports next, and what."""
        self.iteration += 1
        result = {"training_iteration": self.iteration, "time_total_s": now, "done": False}
        result |= {"time_this_iter_s": 0.0, "pid": 0, "hostname": "", "node_ip": "", "rows": []}
        if self.job is None:
            return now + self.seconds, result
        if self.job.kind != "train":
            rows = list(scale.run_job(self.job.kind, self.job.payload))
            return now + CALL_SECONDS, result | {"rows": rows, "done": True}
        seed = self.job.payload["seed"]
        length = scale.duration(seed, mean) / epochs
        self.begin = now if self.begin < 0 else self.begin
        due = int((now + self.seconds - self.begin) / length) + 1
        last = min(epochs, max(self.reported + 1, due))
        rows = [
            {"epoch": epoch, "val_accuracy": 0.5, "val_nll": 1.0, "seconds": length * epoch}
            for epoch in range(self.reported + 1, last + 1)
        ]
        if last == epochs:
            rows[-1]["hash"] = str(seed)
        self.reported = last
        end = self.begin + length * last + CALL_SECONDS
        return end, result | {"rows": rows, "done": last == epochs}


class Actors:
    """What Ray Tune's controller starts and calls actors by, without any."""

    clock: Clock
    slots: int
    mean: float
    epochs: int

    def __init__(self, resource_manager: Any) -> None:
        # Tune takes a handle from it, which none has
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[None, None]] = {}
        self._workers: dict[TrackedActor, Worker] = {}
        self._pending: deque[tuple[TrackedActor, Worker]] = deque()
        self._events: list[tuple[float, int, bool, Callable[[], object]]] = []
        self._numbers, self._tasks = itertools.count(), dict[TrackedActor, int]()
        self._busy = 0

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_pending_actors = property(lambda self: len(self._pending))
    num_total_actors = property(lambda self: self.num_live_actors + self.num_pending_actors)
    num_actor_tasks = property(lambda self: len(self._events))

    def next(self, timeout: float | None = None) -> bool:
        """Let the next thing happen; wait for this process's other threads where all are idle."""
        clock = self.clock
        clock.spend()
        self._start()
        if not self._events:
            time.sleep(0.001)
            return False
        due, _, busy, call = self._events[0]
        if due > clock.now and not self._busy:
            time.sleep(0.001)
            clock.now += 0.001
            return False
        heapq.heappop(self._events)
        clock.now = max(clock.now, due)
        self._busy -= busy
        call()
        return True

    def _start(self) -> None:
        while self._pending and self.num_live_actors < self.slots:
            actor, worker = self._pending.popleft()
            self._live_actors_to_ray_actors_resources[actor] = (None, None)
            self._workers[actor] = worker
            self._at(self.clock.now + START_SECONDS, True, lambda actor=actor: self._begin(actor))

    def _begin(self, actor: TrackedActor) -> None:
        if actor in self._live_actors_to_ray_actors_resources and actor._on_start:
            actor._on_start(actor)

    def _at(self, when: float, busy: bool, call: Callable[[], object]) -> None:
        self._busy += busy
        heapq.heappush(self._events, (when, next(self._numbers), busy, call))

    def add_actor(
        self, cls: Any, kwargs: Any, resource_request: Any, **callbacks: Any
    ) -> TrackedActor:
        actor = TrackedActor(next(self._numbers), **callbacks)
        self._pending.append((actor, Worker(kwargs["config"])))
        return actor

    def remove_actor(self, tracked_actor: TrackedActor, kill: bool = False, **_: Any) -> bool:
        if self._live_actors_to_ray_actors_resources.pop(tracked_actor, None) is None:
            self._pending = deque(pair for pair in self._pending if pair[0] != tracked_actor)
            return False
        stopped = tracked_actor._on_stop
        if stopped:
            self._at(self.clock.now, False, lambda: stopped(tracked_actor))
        return True

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    def get_live_actors_resources(self) -> dict[str, float]:
        return {}

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        self._tasks[tracked_actor] = self._tasks.get(tracked_actor, 0) + 1

    def cleanup(self) -> None:
        self.__init__(None)  # type: ignore[misc]

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: Any = (),
        kwargs: Any = None,
        on_result: Callable[..., object] | None = None,
        on_error: Any = None,
        _return_future: bool = False,
    ) -> None:
        worker = self._workers.get(tracked_actor)
        if worker is None:  # it was to be stopped before it started
            return
        when, result = self.clock.now + CALL_SECONDS, None
        if method_name == "reset":
            worker.reset(args[0])
            result = True
        elif method_name == "train":
            when, result = worker.train(self.clock.now, self.mean, self.epochs)
        task = self._tasks.setdefault(tracked_actor, 0)

        def call() -> None:
            if on_result and self._tasks[tracked_actor] == task:
                on_result(tracked_actor, result)

        self._at(when, method_name != "train" or worker.job is not None, call)


def measure(slots: int, trials: int, mean: float, epochs: int) -> dict[str, float]:
    """Return what a search of one generation took on so many slots."""
    from selfkd.cli.progress import ProgressReporter
    from selfkd.cli.terminal import make_console
    from selfkd.config import load_config
    from selfkd.execution.pool import Pool
    from selfkd.experiments.arms import Run
    from selfkd.experiments.generations import born_again
    from selfkd.experiments.run_folder import RunFolder
    from selfkd.results import Event, GenerationFinished, StageStarted
    from selfkd.storage.files import load_json

    clock = Clock()
    Actors.clock, Actors.slots = clock, slots
    Actors.mean, Actors.epochs = mean, epochs
    tune_controller.RayActorManager = Actors
    settings = [f"search.trials={trials}", "rounds=0", f"train.epochs={epochs}", "confirm.seeds=0"]
    config = load_config(settings=settings)
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    seen: dict[type[Any], tuple[float, float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=place) as name,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        Pool("scale:run_job", cpu=1, gpu=0, warm=slots) as pool,
    ):
        folder, console = RunFolder.create(Path(name) / "run", config), make_console()
        console.file = nowhere
        with ProgressReporter(console, config) as progress:

            def events(event: Event) -> None:
                progress(event)
                seen[type(event)] = clock.now, clock.spent

            born_again(Run(config=config, folder=folder, executor=pool, events=events))
        rows = [load_json(path) for path in folder.generation(0).glob("trial_*/result.json")]
    rows.sort(key=lambda row: row["trial"])
    durations = [scale.duration(row["seed"], mean) for row in rows]
    began, ended = (seen[kind] for kind in (StageStarted, GenerationFinished))
    wall, work = ended[0] - began[0], sum(durations)
    tail = slots * scale.list_schedule(durations, slots) - work
    return {
        "wall": wall,
        "used": work / (slots * wall - tail),
        "driver": 1000 * (ended[1] - began[1]) / trials,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", default="64,512")
    parser.add_argument("--trials", default="100,1000,10000")
    parser.add_argument("--mean", type=float, default=60.0, help="simulated seconds of a trial")
    parser.add_argument("--epochs", type=int, default=5, help="reports of a trial")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print("slots  trials  simulated s   slots used  driver ms/trial", flush=True)
    for slots in map(int, options.slots.split(",")):
        for trials in map(int, options.trials.split(",")):
            if trials < slots:  # some slots have nothing to do
                continue
            row = measure(slots, trials, options.mean, options.epochs)
            print(
                f"{slots:5} {trials:7} {row['wall']:12.1f} {row['used']:12.1%} "
                f"{row['driver']:16.2f}",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
