"""Whole commands against Ray Tune alone: born-again generations, and an ensemble of ten.

    python tests/benchmarks/search.py --root MNIST [--rows generations,ensemble,teacher] [--times 1]
    python tests/benchmarks/search.py --root MNIST --epochs 1 --trials 4 --members 4 --processes

MNIST, a network of two layers of 800 units, 3 epochs, 8 trials, no fresh seeds, no tracking: the
same network, optimiser, learning rate, batch and clipping on both sides, `plain_tune.py` as a
careful person writes it. The row `teacher` has a teacher five times the size of its student.

Commands are run in turn. Printed are seconds of wall time, and CPU seconds of the command and of
all it has started, Ray's processes too, sampled from /proc until the last of them has ended. On a
machine with other work the CPU seconds are what to judge by.
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
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

HERE = Path(__file__).parent
INTERVAL = 0.25
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes whose parent has ended become this one's
SPACE = "{distill.temperature: {loguniform: [1, 20]}, distill.alpha: {uniform: [0, 1]}}"
STUDENT = 240  # units of a student with a fifth of the parameters of 800 units


def selfkd(row: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return selfkd's command of a row."""
    settings = [
        *("data.name=mnist", f"data.root={options.root}", "data.val_size=10000"),
        "model={name: selfkd_mlp, args: {width: 800, depth: 2}}",
        *(f"train.epochs={options.epochs}", "train.batch_size=128", "train.lr=0.1"),
        *("train.weight_decay=0", "train.clip_grad=1.0", f"search.trials={options.trials}"),
        f"search.space={SPACE}",
        *("confirm.seeds=0", "tracking=none", f"storage={folder}", "name=run"),
    ]
    if row == "ensemble":
        command = ["ensemble", "--members", str(options.members)]
        settings.append("confirm.baseline=false")
    else:
        command = ["generations", "--rounds", str(options.rounds if row == "generations" else 1)]
    if row == "teacher":
        settings.append(f"student={{name: selfkd_mlp, args: {{width: {STUDENT}, depth: 2}}}}")
    name, *more = command
    sets = [word for setting in settings for word in ("--set", setting)]
    return [options.python, "-m", f"selfkd.{name}", *more, *sets]


def plain(row: str, options: argparse.Namespace) -> list[str]:
    """Return the command of a row with Ray Tune alone."""
    what = "ensemble" if row == "ensemble" else "generations"
    more = ["--width", str(STUDENT), "--rounds", "1"] if row == "teacher" else []
    if row == "generations":
        more = ["--rounds", str(options.rounds)]
    counts = ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    members = ["--members", str(options.members)] if row == "ensemble" else []
    script = str(HERE / "plain_tune.py")
    return [sys.executable, script, what, "--root", options.root, *counts, *members, *more]


def measure(command: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Return the wall seconds of a command, and the CPU seconds of its processes by name."""
    spent: dict[psutil.Process, float] = {}
    names: dict[psutil.Process, str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    start = time.perf_counter()
    with open(folder / "out.txt", "w", encoding="utf-8") as out:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        wall = 0.0
        while True:
            code = child.poll()
            if code is not None and not wall:
                wall = time.perf_counter() - start
            running = list(_running(child.pid))
            for process in running:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    spent[process] = times.user + times.system
                    names[process] = " ".join(process.cmdline())[:60] or names.get(process, "")
            if code is not None and not running:
                break
            time.sleep(INTERVAL)
    if child.returncode:
        text = (folder / "out.txt").read_text(encoding="utf-8")
        raise SystemExit(
            f"{' '.join(command)} failed with code {child.returncode}:\n{text[-3000:]}"
        )
    found: dict[str, float] = defaultdict(float)
    for process, seconds in spent.items():
        found[names[process]] += seconds
    return wall, found


def _running(child: int) -> Iterator[psutil.Process]:
    """Yield the processes that this one has started, directly or not; bury those that ended."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
            elif process.ppid() == os.getpid() and process.pid != child:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", default=os.environ.get("SELFKD_DATA"), help="folder of MNIST")
    parser.add_argument("--rows", default="generations,ensemble,teacher")
    parser.add_argument("--times", type=int, default=1, help="number of runs of each command")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--only", choices=["selfkd", "plain"], help="one side alone")
    parser.add_argument("--python", default=sys.executable, help="Python with selfkd installed")
    parser.add_argument("--processes", action="store_true", help="list each kind of process, too")
    parser.add_argument("--out", action="store_true", help="print what the commands print")
    options = parser.parse_args()
    if options.root is None:
        parser.error("--root must be given, or SELFKD_DATA")
    options.root = str(Path(options.root).resolve())
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    print(f"{os.cpu_count()} cores\n{'':12}  {'':6}   wall s   CPU s", flush=True)
    for row in options.rows.split(","):
        least: dict[str, list[float]] = {}
        for _ in range(options.times):
            for side in ("plain", "selfkd"):
                if options.only not in (None, side):
                    continue
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    own = selfkd(row, options, folder) if side == "selfkd" else plain(row, options)
                    wall, spent = measure(own, folder)
                    text = (folder / "out.txt").read_text(encoding="utf-8")
                found = [wall, sum(spent.values())]
                print(f"{row:12}  {side:6} {found[0]:8.1f} {found[1]:7.1f}", flush=True)
                for process, seconds in sorted(spent.items(), key=lambda item: -item[1])[:12]:
                    if options.processes:
                        print(f"    {seconds:7.1f}  {process}")
                if options.out:
                    print(text)
                known = least.get(side, found)
                least[side] = [min(pair) for pair in zip(known, found, strict=True)]
        if len(least) == 2:
            ratios = [
                own / other for own, other in zip(least["selfkd"], least["plain"], strict=True)
            ]
            print(f"{row:12}  ratio  {ratios[0]:8.2f} {ratios[1]:7.2f}\n", flush=True)


if __name__ == "__main__":
    main()
