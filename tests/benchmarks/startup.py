"""CPU time of the smallest command: what a start costs, of every process of it.

    python tests/benchmarks/startup.py --times 3

The time is user and system time of the command and of all it starts, Ray's processes too, sampled
from /proc until the last of them has ended; this process adopts those whose parent ends before
them, so that none is missed. The least of several runs is what other work on the machine has added
least to. Another checkout is measured by its own Python: `--python`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import psutil

SMALLEST = [
    *("-m", "selfkd.generations", "--rounds", "0", "--set", "search.trials=1"),
    *("--set", "train.epochs=1", "--set", "confirm.seeds=0"),
]
ADOPT = 36  # PR_SET_CHILD_SUBREAPER
INTERVAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="number of runs")
    parser.add_argument("--python", default=sys.executable, help="Python with selfkd installed")
    parser.add_argument("--processes", action="store_true", help="list each process, too")
    arguments = parser.parse_args()
    totals = []
    for number in range(arguments.times):
        start = time.perf_counter()
        each = measure([arguments.python, *SMALLEST])
        wall = time.perf_counter() - start
        totals.append(sum(each.values()))
        print(f"run {number}: {totals[-1]:.2f} CPU-s of {len(each)} processes, {wall:.1f} s")
        if arguments.processes:
            for name, seconds in sorted(each.items(), key=lambda item: -item[1])[:12]:
                print(f"  {seconds:6.2f}  {name}")
    print(f"least: {min(totals):.2f} CPU-s")


def measure(command: list[str], variables: Mapping[str, str] | None = None) -> dict[str, float]:
    """Return the CPU seconds of a command and of all it starts, each by its number and name.

    Args:
        command: The command.
        variables: Variables of its environment, beside PATH and HOME.
    """
    if ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0):
        raise SystemExit("processes must be adopted to be waited for, which takes Linux")
    seen = dict[tuple[int, float], tuple[str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, **(variables or {})}
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        code = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # the last one has ended
                break
            if pid:
                code = os.waitstatus_to_exitcode(status) if pid == child.pid else code
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    name = " ".join(process.cmdline()).strip()[:90]
                    key = (process.pid, process.create_time())
                    seen[key] = name or seen.get(key, ("", 0))[0], times.user + times.system
            time.sleep(INTERVAL)
    child.returncode = code
    if code:
        raise SystemExit(f"the command failed with code {code}")
    return {f"{pid} {name}": seconds for (pid, _), (name, seconds) in seen.items()}


if __name__ == "__main__":
    main()
