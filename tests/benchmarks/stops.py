"""Stop the command at random moments by Ctrl-C and SIGTERM, and look at how it leaves.

    python tests/benchmarks/stops.py [--rounds 20] [--seed 0] [--length SECONDS]

Each of N runs gets a signal at one moment, drawn within its own N-th of the length of a run: SIGINT
or SIGTERM, to the driver alone or to its process group, once or twice. Printed are the exit code,
the seconds from the signal to the end, how often it said that it was stopped, and what is left:
processes, and files in the folder for temporary files. Wrong is what takes 5 s, an exit code other
than 130 (or 0, where the run was done), a traceback, and a process that is left after 5 s.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LIMIT = 5.0
RUN = [
    *("--name", "run", "--rounds", "1", "--set", "model.name=selfkd_mlp"),
    *("--set", "model.args={width: 8}", "--set", "train.epochs=3", "--set", "search.trials=4"),
]


def start(here: Path) -> subprocess.Popen[bytes]:
    """Start the command, in a process group and with temporary files of its own."""
    (here / "tmp").mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_AUTH_MODE": "disabled",
        "TMPDIR": str(here / "tmp"),
        "WANDB_MODE": "offline",
    }
    environment.pop("RAY_TMPDIR", None)
    with (here / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "selfkd.generations", *RUN],
            cwd=here,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def left(here: Path) -> list[str]:
    """Return what still runs of a command; Ray's processes are seen by the files they have open."""
    found = []
    own = str(here / "tmp")
    for process in psutil.process_iter():
        try:
            files = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
            if process.environ().get("TMPDIR") == own or any(own in file for file in files):
                found.append(process.name())
        except (psutil.Error, OSError):
            continue
    return found


def wait_for_none(here: Path) -> tuple[float, list[str]]:
    begin = time.monotonic()
    while (found := left(here)) and time.monotonic() < begin + LIMIT:
        time.sleep(0.1)
    return time.monotonic() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=float, help="of a run; measured when not given")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="st", dir="/tmp"))  # short: Ray's sockets lie in it
    begin = time.monotonic()
    if (length := args.length) is None:
        process = start(folder / "whole")
        assert process.wait() == 0, (folder / "whole" / "log").read_text(encoding="utf-8")
        length = time.monotonic() - begin
    print(f"an undisturbed run takes {length:.1f} s; {args.rounds} stops within that", flush=True)
    draw = random.Random(args.seed)
    wrong = 0
    for number in range(args.rounds):
        moment = length * (number + draw.random()) / args.rounds
        kind = draw.choice([signal.SIGINT, signal.SIGTERM])
        group, twice = draw.random() < 0.4, draw.random() < 0.3
        here = folder / f"{number:03d}"
        process = start(here)
        begin = time.monotonic()
        while process.poll() is None and time.monotonic() < begin + moment:
            time.sleep(0.01)
        stopped = time.monotonic()
        for count in range(2 if twice else 1):
            if process.poll() is None:
                (os.killpg if group else os.kill)(process.pid, kind)
                time.sleep(0.7 if twice and count == 0 else 0)
        code = process.wait()
        seconds = time.monotonic() - stopped
        until_gone, processes = wait_for_none(here)
        printed = (here / "log").read_text(encoding="utf-8")
        said = printed.count("\nstopped")
        done = code == 0 and "report:" in printed
        right = (done or (code == 130 and said == 1)) and seconds < LIMIT and not processes
        right = right and "Traceback" not in printed
        wrong += not right
        files = sorted(path.name for path in (here / "tmp").glob("*"))
        files += [f"ray/{path.name}" for path in (here / "tmp" / "ray").glob("*")]
        print(
            f"{number + 1:3}  {kind.name} at {moment:4.1f} s{' group' if group else ''}"
            f"{' twice' if twice else ''}: exit {code} after {seconds:.1f} s, said {said} times, "
            f"no process after {until_gone:.1f} s {processes or ''} left {files} "
            f"{'' if right else f'WRONG, see {here}'}",
            flush=True,
        )
        if right:
            shutil.rmtree(here, ignore_errors=True)
    print(f"\n{args.rounds - wrong} of {args.rounds} left as they should")
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
