"""CPU time of the smallest command: what a start costs, of every process of it.

    python tests/benchmarks/startup.py --times 3

The least of several runs is what other work on the machine has added least to. Another checkout is
measured by its own Python: `--python`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from processes import measure

SMALLEST = [
    *("-m", "selfkd.generations", "--rounds", "0", "--set", "search.trials=1"),
    *("--set", "train.epochs=1", "--set", "confirm.seeds=0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="number of runs")
    parser.add_argument("--python", default=sys.executable, help="Python with selfkd installed")
    parser.add_argument("--processes", action="store_true", help="list each process, too")
    arguments = parser.parse_args()
    totals = []
    for number in range(arguments.times):
        with tempfile.TemporaryDirectory() as folder:
            environment = {"PATH": "/usr/bin:/bin", "HOME": folder}
            wall, each = measure([arguments.python, *SMALLEST], Path(folder), environment)
        totals.append(sum(seconds for _, seconds in each))
        print(f"run {number}: {totals[-1]:.2f} CPU-s of {len(each)} processes, {wall:.1f} s")
        if arguments.processes:
            for name, seconds in sorted(each, key=lambda item: -item[1])[:12]:
                print(f"  {seconds:6.2f}  {name}")
    print(f"least: {min(totals):.2f} CPU-s")


if __name__ == "__main__":
    main()
