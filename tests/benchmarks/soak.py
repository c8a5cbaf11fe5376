"""Kill the command at random moments, resume it, and compare with a run that nothing disturbed.

    python tests/benchmarks/soak.py [--kills 30] [--seed 0] [--folder FOLDER]

Each of N runs is killed (SIGKILL of the driver alone) at one moment, drawn within its own N-th of
the length of an undisturbed run, and resumed at once with --resume until it ends. Compared are
the table, every trial's figures and points, and the hashes of all weights and predictions. With
--folder an interrupted soak goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "faults")]

from record import record  # noqa: E402

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


def killed_at(here: Path, moment: float) -> str:
    """Run the command and kill it at a moment; return what it had done by then."""
    process = first(here)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return state(here / "runs" / "run") if process.returncode == -signal.SIGKILL else "had ended"


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
        assert code == 0, (whole / "log").read_text()
        facts.write_text(json.dumps(time.perf_counter() - begin))
    length = json.loads(facts.read_text())
    expected = record(whole / "runs" / "run")
    print(f"an undisturbed run takes {length:.1f} s; {args.kills} kills within that", flush=True)
    draw = random.Random(args.seed)
    agreed = 0
    for number in range(args.kills):
        moment = length * (number + draw.random()) / args.kills
        here = folder / f"{number:03d}"
        if not (here / "done").exists():
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            seen = killed_at(here, moment)
            run = here / "runs" / "run"
            begun = (run / "config.yaml").exists()
            process = start(here, "--resume", str(run)) if begun else first(here)
            (here / "code").write_text(str(process.wait()))
            (here / "done").write_text(seen)
        seen, code = (here / "done").read_text(), (here / "code").read_text()
        equal = code == "0" and record(here / "runs" / "run") == expected
        agreed += equal
        verdict = "equal" if equal else f"DIFFERS (exit code {code}), see {here}"
        print(f"{number + 1:3}  killed at {moment:5.1f} s: {seen:45} {verdict}", flush=True)
    print(f"\n{agreed} of {args.kills} agreed with the undisturbed run, bit for bit")
    if args.folder is None and agreed == args.kills:
        shutil.rmtree(folder)
    raise SystemExit(agreed != args.kills)


if __name__ == "__main__":
    main()
