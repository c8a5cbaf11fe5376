"""CPU time of the smallest command: what a start costs, of every process of it.

    python tests/benchmarks/startup.py --times 3

The time is user and system time of the command and of all it starts, Ray's processes too, sampled
from /proc until the last of them has ended. The least of several runs is what other work on the
machine has added least to. Another checkout is measured by its own Python: `--python`.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import psutil

SMALLEST = [
    *("-m", "selfkd.generations", "--rounds", "0", "--set", "search.trials=1"),
    *("--set", "train.epochs=1", "--set", "confirm.seeds=0", "--set", "tracking=none"),
]
MARK = "SELFKD_BENCHMARK"
INTERVAL = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="number of runs")
    parser.add_argument("--python", default=sys.executable, help="Python with selfkd installed")
    parser.add_argument("--processes", action="store_true", help="list each process, too")
    arguments = parser.parse_args()
    totals = []
    for number in range(arguments.times):
        start = time.perf_counter()
        spent = measure([arguments.python, *SMALLEST])
        wall = time.perf_counter() - start
        totals.append(sum(spent.values()))
        print(f"run {number}: {totals[-1]:.2f} CPU-s of {len(spent)} processes, {wall:.1f} s")
        if arguments.processes:
            for (_, name), seconds in sorted(spent.items(), key=lambda item: -item[1])[:12]:
                print(f"  {seconds:6.2f}  {name}")
    print(f"least: {min(totals):.2f} CPU-s")


def measure(command: list[str]) -> dict[tuple[int, str], float]:
    """Return the CPU seconds of each process of a command, by its number and what it is."""
    token = secrets.token_hex(8)
    spent: dict[tuple[int, str], float] = defaultdict(float)
    known: dict[psutil.Process, str] = {}
    others: set[psutil.Process] = set(psutil.process_iter())
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, MARK: token}
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        while child.poll() is None or any(process.is_running() for process in known):
            for process in psutil.process_iter():
                if process in others:
                    continue
                with contextlib.suppress(psutil.Error):
                    if process not in known:
                        if process.environ().get(MARK) != token:
                            others.add(process)
                            continue
                        known[process] = ""
                    words = process.cmdline()
                    if words:
                        known[process] = " ".join(words)[:90]
                    times = process.cpu_times()
                    spent[process.pid, ""] = times.user + times.system
            time.sleep(INTERVAL)
    if child.returncode:
        raise SystemExit(f"the command failed with code {child.returncode}")
    names = {process.pid: name for process, name in known.items()}
    return {(pid, names[pid]): seconds for (pid, _), seconds in spent.items()}


if __name__ == "__main__":
    main()
