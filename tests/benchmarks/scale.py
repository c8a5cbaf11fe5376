"""How well 1 to 64 slots are used, by simulation: real Ray nodes with fake GPUs, trials that sleep.

    python tests/benchmarks/scale.py [--slots 1,2,4,8,16,32,64] [--trials 64] [--generations 5]

Everything of the driver is the real one: the born-again loop, the rows, the search, the pool. A
trial sleeps for a duration drawn from its seed, between half and one and a half times the mean, and
reports twenty epochs; caching and evaluating take no time. A node has at most 8 GPUs.

What no scheduler can avoid is taken out: a generation ends with its last trial, so slots stand
empty near its end. It is what FIFO list scheduling of the same durations leaves empty. Starting the
workers is printed apart: here all of them start on the cores of one machine.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EPOCHS = 20
TARGET = 0.9
HERE = str(Path(__file__).parent)


def duration(seed: int, mean: float) -> float:
    return random.Random(seed).uniform(0.5 * mean, 1.5 * mean)


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a worker does: sleep."""
    if kind == "gather":  # wait until all workers have started
        folder = Path(payload["folder"])
        (folder / str(payload["number"])).touch()
        while len(os.listdir(folder)) < payload["slots"]:
            time.sleep(0.2)
        yield {"epoch": 1}
    elif kind == "check":
        yield {"facts": {"items": {"train": 100, "test": 100}}}
    elif kind == "train":
        begin = time.time()
        seconds = duration(payload["seed"], payload["config"]["params"]["mean"])
        for epoch in range(1, EPOCHS + 1):
            time.sleep(max(0.0, begin + seconds * epoch / EPOCHS - time.time()))
            row = {"epoch": epoch, "val_accuracy": 0.5, "val_nll": 1.0, "seconds": seconds}
            yield {**row, "begin": begin, "end": time.time()}
        yield {**row, "hash": str(payload["seed"]), "begin": begin, "end": time.time()}
    elif kind == "cache_teacher_logits":
        yield {"state": "written"}
    elif kind in ("evaluate", "average"):
        row = {"hash": "a", "test_accuracy": 0.5, "test_nll": 1.0, "test_ece": 0.1}
        yield row if kind == "evaluate" else {"rows": [row]}


def list_schedule(durations: Sequence[float], slots: int) -> float:
    """Return when the last of the trials ends, each given to the slot that is free first."""
    free = [0.0] * slots
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


class Watch:
    """Follows a run: when each generation began and ended, and how much memory there was."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self.cpu = [self._cpu()]
        self.walls: list[float] = []
        self.memory: list[float] = []
        self._begin = time.perf_counter()

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def __call__(self, event: object) -> None:
        from selfkd.results import GenerationFinished

        if not isinstance(event, GenerationFinished):
            return
        self.walls.append(time.perf_counter() - self._begin)
        self.memory.append(self._process.memory_info().rss / 2**20)
        self.cpu.append(self._cpu())
        self._begin = time.perf_counter()


def measure(slots: int, *, trials: int, generations: int, mean: float) -> dict[str, float]:
    import ray
    import scipy.stats  # noqa: F401 - the command, too, imports it while Ray starts
    from ray.cluster_utils import Cluster

    from selfkd.cli.progress import ProgressReporter
    from selfkd.cli.terminal import make_console
    from selfkd.config import load_config
    from selfkd.execution.jobs import Batch, Job
    from selfkd.execution.pool import Pool
    from selfkd.experiments.arms import Run
    from selfkd.experiments.generations import born_again
    from selfkd.experiments.run_folder import RunFolder
    from selfkd.results import Event
    from selfkd.storage.files import load_json

    start = time.perf_counter()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    left = slots
    while left > 0:
        cluster.add_node(num_cpus=min(8, left), num_gpus=min(8, left))
        left -= 8
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    config = load_config(
        settings=[
            f"search.trials={trials}",
            f"rounds={generations - 1}",
            f"params.mean={mean}",
            f"train.epochs={EPOCHS}",
            "confirm.seeds=0",
        ]
    )
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w", encoding="utf-8") as nowhere:
        here = Path(name)
        folder = RunFolder.create(here / "run", config)
        (here / "gathered").mkdir()
        with Pool("scale:run_job", cpu=1, gpu=1, warm=slots) as pool:
            where = {"folder": str(here / "gathered"), "slots": slots}
            pool.run(Batch([Job("gather", {"number": n, **where}) for n in range(slots)]))
            started = time.perf_counter() - start
            watch = Watch()
            console = make_console()
            console.file = nowhere
            with ProgressReporter(console, config) as progress:

                def events(event: Event) -> None:
                    progress(event)
                    watch(event)

                run = Run(config=config, folder=folder, executor=pool, events=events)
                born_again(run)
        ideal = work = 0.0
        for generation in range(generations):
            rows = [
                load_json(path)
                for path in sorted(folder.generation(generation).glob("trial_*/*.json"))
            ]
            rows.sort(key=lambda row: row["history"][-1]["begin"])
            seconds = [duration(row["seed"], mean) for row in rows]
            ideal += list_schedule(seconds, slots)
            work += sum(seconds)
    ray.shutdown()
    cluster.shutdown()
    wall = sum(watch.walls)
    tail = slots * ideal - work
    count = trials * generations
    return {
        "start": started,
        "wall": wall,
        "ideal": ideal,
        "raw": work / (slots * wall),
        "used": work / (slots * wall - tail),
        "tail": tail / (slots * wall),
        "lost": (wall - ideal) * slots / count,
        "switch": (wall - ideal) / generations,
        "driver": (watch.cpu[-1] - watch.cpu[0]) / count,
        "first": watch.memory[0],
        "last": watch.memory[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="1,2,4,8,16,32,64")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--mean", type=float, help="seconds of a trial; by default 0.5 to 10")
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    paths = [
        HERE,
        str(Path(HERE).parent / "faults"),
        str(Path(HERE).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path[:0] = paths[:3]
    from nodes import apart

    print(f"{args.generations} generations of {args.trials} trials; {os.cpu_count()} cores\n")
    print(
        "slots  trial s   wall s  ideal s  used raw  wait at ends      USED  lost s/trial  "
        "s/generation  driver CPU ms/trial    driver MiB  start s"
    )
    for slots in (int(text) for text in args.slots.split(",")):
        count = args.trials * args.generations
        mean = args.mean or min(10.0, max(0.5, 120 * slots / count))
        with apart():
            row = measure(slots, trials=args.trials, generations=args.generations, mean=mean)
        print(
            f"{slots:5} {mean:8.1f} {row['wall']:8.1f} {row['ideal']:8.1f} {row['raw']:9.1%} "
            f"{row['tail']:13.1%} {row['used']:9.1%} {row['lost']:13.2f} {row['switch']:13.2f} "
            f"{1000 * row['driver']:20.1f} {row['first']:6.0f}->{row['last']:5.0f} "
            f"{row['start']:8.1f}",
            flush=True,
        )
    verdict = "reached" if row["used"] >= TARGET else "MISSED"
    print(f"\n{verdict}: {row['used']:.1%} of {slots} slots used, target {TARGET:.0%}")


if __name__ == "__main__":
    main()
