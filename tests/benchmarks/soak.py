"""Kill the command's processes at random moments, resume it, and compare with an undisturbed run.

    python tests/benchmarks/soak.py [--kills 30] [--seed 0] [--folder FOLDER]

In each of N runs one process is killed (SIGKILL) at one moment, drawn within its own N-th of the
length of an undisturbed run: in turn the driver, a worker, the raylet, the GCS and W&B's service.
A run that this ends, within 15 s and, but for the driver, with a message how to continue it, is
resumed at once with --resume. Compared are the table, every trial's figures and points, and the
hashes of all weights and predictions. With --folder an interrupted soak goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "faults")]

from record import record  # noqa: E402

KINDS = ("driver", "worker", "raylet", "GCS", "W&B")
NAMES = {"worker": "ray::", "raylet": "raylet", "GCS": "gcs_server", "W&B": "wandb-core"}
LIMIT = 15.0  # seconds in which a run ends whose Ray has died
SETTINGS = [
    "model.args={width: 8}",
    "train.epochs=3",
    "search.trials=2",
    "targets.shard_size=200",
    "rounds=2",
]


def start(here: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_AUTH_MODE": "disabled",
        "WANDB_MODE": "offline",
    }
    with (here / "log").open("ab") as log:
        command = [sys.executable, "-m", "selfkd.generations", *arguments]
        return subprocess.Popen(command, cwd=here, env=environment, stdout=log, stderr=log)


def first(here: Path) -> subprocess.Popen[bytes]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return start(here, "--name", "run", *sets)


def find(driver: psutil.Process, kind: str) -> psutil.Process | None:
    """Return a process of a run, the one with most memory of several workers; None before it is."""
    if kind == "driver":
        return driver
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = process.name()
            agent = "Agent" in name  # the raylet dies with each of its own
            if NAMES[kind] in name and not agent and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.memory_info().rss, process))
    return max(found, key=lambda one: one[0])[1] if found else None


def killed_at(here: Path, moment: float, kind: str) -> str:
    """Run the command and kill a process of it at a moment; return what it had done by then."""
    begin = time.monotonic()
    process = first(here)
    driver = psutil.Process(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    victim = None
    while process.poll() is None and victim is None:
        with contextlib.suppress(psutil.Error):
            victim = find(driver, kind)
    if victim is None:
        return "had ended"
    seen = state(here / "runs" / "run")
    with contextlib.suppress(psutil.Error):
        victim.kill()
    killed = time.monotonic()
    code = process.wait()
    seconds = time.monotonic() - killed
    log = (here / "log").read_text(errors="replace", encoding="utf-8")
    wrong = [text for text in ("Traceback", "Fatal Python error") if text in log]
    if kind in ("raylet", "GCS"):
        ended_well = code == 1 and seconds < LIMIT and "continue with: " in log
        wrong += [] if ended_well or code == 0 else [f"exit {code} after {seconds:.0f} s"]
    elif kind != "driver" and code != 0:
        wrong.append(f"exit {code}")
    at = f"{killed - begin:5.1f} s: {seen}"
    return (
        f"{at}; exit {code} after {seconds:4.1f} s{' WRONG: ' if wrong else ''}{', '.join(wrong)}"
    )


def state(run: Path) -> str:
    if not (run / "config.yaml").exists():
        return "had not begun"
    generations = len(list(run.glob("generation_*/result.json")))
    trials = len(list(run.glob("generation_*/trial_*/result.json")))
    shards = len(list(run.glob("targets/*/*/view_*/shard_*")))
    return f"{generations} generations, {trials} trials, {shards} shards done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept, and continued; else a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="selfkd-soak-"))
    whole = folder / "whole"
    facts = whole / "soak.json"
    if not facts.exists():
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        begin = time.perf_counter()
        code = first(whole).wait()
        assert code == 0, (whole / "log").read_text(encoding="utf-8")
        facts.write_text(json.dumps(time.perf_counter() - begin), encoding="utf-8")
    length = json.loads(facts.read_text(encoding="utf-8"))
    expected = record(whole / "runs" / "run")
    print(f"an undisturbed run takes {length:.1f} s; {args.kills} kills within that", flush=True)
    draw = random.Random(args.seed)
    agreed = 0
    for number in range(args.kills):
        moment = length * (number + draw.random()) / args.kills
        kind = KINDS[number % len(KINDS)]
        here = folder / f"{number:03d}"
        if not (here / "done").exists():
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            seen = killed_at(here, moment, kind)
            run = here / "runs" / "run"
            begun = (run / "config.yaml").exists()
            process = start(here, "--resume", str(run)) if begun else first(here)
            (here / "code").write_text(str(process.wait()), encoding="utf-8")
            (here / "done").write_text(seen, encoding="utf-8")
        seen, code = (
            (here / "done").read_text(encoding="utf-8"),
            (here / "code").read_text(encoding="utf-8"),
        )
        equal = code == "0" and record(here / "runs" / "run") == expected and "WRONG" not in seen
        agreed += equal
        verdict = "equal" if equal else f"DIFFERS (exit code {code}), see {here}"
        print(f"{number + 1:3}  {kind:6} killed at {seen:75} {verdict}", flush=True)
    print(f"\n{agreed} of {args.kills} agreed with the undisturbed run, bit for bit")
    if args.folder is None and agreed == args.kills:
        shutil.rmtree(folder)
    raise SystemExit(agreed != args.kills)


if __name__ == "__main__":
    main()
