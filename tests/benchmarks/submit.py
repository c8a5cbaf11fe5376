"""Seconds from `python -m selfkd.submit` to the first trial's line, on a head of its own.

python tests/benchmarks/submit.py --repeat 3
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ray_head import Head, ray_head

STEPS = {
    "submitted": "submit: submitted",
    "job starts": "Running entrypoint",
    "driver speaks": "selfkd: generation 0",
    "workers ready": "generation 0 of",
    "first trial": "  trial ",
}


def measure(head: Head, folder: Path) -> dict[str, float]:
    """Return the seconds from the command's start to each step of a job with tiny trials."""
    settings = [f"storage={folder}", "search.trials=2", "train.epochs=1", "model.args={width: 4}"]
    command = [sys.executable, "-m", "selfkd.submit", "--address", head.dashboard, "--"]
    command += ["generations", "--rounds", "0"]
    command += [word for setting in settings for word in ("--set", setting)]
    start = time.perf_counter()
    client = subprocess.Popen(
        command, env=head.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    assert client.stdout is not None
    seen: dict[str, float] = {}
    printed = []
    for line in client.stdout:
        printed.append(line)
        for step, beginning in STEPS.items():
            if line.startswith(beginning):
                seen.setdefault(step, time.perf_counter() - start)
    if client.wait() != 0:
        raise SystemExit("".join(printed))
    return seen | {"end": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ray_head(folder / "head") as head:
            runs = [measure(head, folder / str(number)) for number in range(repeat)]
    for step in (*STEPS, "end"):
        times = [run[step] for run in runs]
        each = ", ".join(f"{seconds:.1f}" for seconds in times)
        print(f"{step:15} {statistics.median(times):6.1f} s   ({each})")


if __name__ == "__main__":
    main()
