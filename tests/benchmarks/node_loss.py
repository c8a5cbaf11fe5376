"""Seconds from the loss of a node to its trial running again on another.

    python tests/benchmarks/node_loss.py [--times 3]

Real Ray nodes on this machine with GPUs that are not real ones, and Ray's own times for noticing
that a node is gone. One node trains and another stands idle, its worker warm, or joins only after
the loss. The trial sleeps, so nothing of it is the time of imports or of loading data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "faults")]
sys.path[:0] = PATHS
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

from nodes import Nodes, apart  # noqa: E402

from selfkd.execution.jobs import Batch, Job  # noqa: E402
from selfkd.execution.pool import Pool  # noqa: E402
from selfkd.results import Row  # noqa: E402


class Rows(Batch):
    def __init__(self) -> None:
        super().__init__([Job("train", {"name": "a", "epochs": 600, "pause": 0.1})])
        self.last: Row | None = None

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        self.last = rows[-1]


def lose_one(nodes: Nodes, pool: Pool, *, warm: bool) -> float:
    nodes.have(2 if warm else 1)
    rows = Rows()
    thread = threading.Thread(target=pool.run, args=(rows,), daemon=True)
    thread.start()
    while rows.last is None:
        time.sleep(0.05)
    time.sleep(5.0)  # the other node's worker has time to start
    lost = rows.last["node"]
    begin = time.time()
    nodes.lose(lost)
    if not warm:
        nodes.add()
    while rows.last["node"] == lost:
        time.sleep(0.05)
    seconds = float(rows.last["time"][0]) - begin
    thread.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    lines = [f"{os.cpu_count()} cores; seconds from the loss of a node to its trial on another"]
    with apart():
        nodes = Nodes(quick=False)
        nodes.have(2)
        nodes.join()
        with Pool("pool_jobs:run_job", cpu=1, gpu=1, warm=2) as pool:
            for warm in (True, False):
                found = [lose_one(nodes, pool, warm=warm) for _ in range(args.times)]
                where = "a node that is there, idle" if warm else "a node that joins then"
                times = ", ".join(f"{seconds:.1f}" for seconds in found)
                lines.append(f"{where:28} median {statistics.median(found):5.1f} s of {times}")
        nodes.close()
    print("\n".join(lines))  # at the end: Ray prints the last words of every node


if __name__ == "__main__":
    main()
