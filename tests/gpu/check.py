"""All parts of the check, each in a process of its own and bounded in time; one table."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from correct import check_features, check_losses, check_training, check_views
from kernels import check_heads, check_kernels
from plug_ins import check_plug_ins
from ranks import check_ranks
from setting import Row, Setting
from speed import NETWORKS, check_ensemble, check_rates

PARTS: dict[str, tuple[Callable[[Setting], list[Row]], float]] = {
    "losses": (check_losses, 25),
    "views": (check_views, 15),
    "features": (check_features, 15),
    "training": (check_training, 75),
    "plug-ins": (check_plug_ins, 45),
    "ranks": (check_ranks, 40),
    **{name: (partial(check_rates, name=name), 40) for name in NETWORKS},
    "ensemble": (check_ensemble, 30),
    "kernels": (check_kernels, 60),
    "heads": (check_heads, 60),
}
"""Parts and the seconds that each may take, with its start."""
SECONDS = 350.0
"""Seconds that all of them may take."""
LEAST = 5.0
"""Seconds that a part is begun with at least."""
MARK = "ROWS "


QUICK = (
    ", --quick: one tiny network stands for those that are named, so times and rates say nothing"
)


def run_part(name: str, device: str, *, quick: bool) -> list[Row]:
    """Do one part in this process."""
    part, seconds = PARTS[name]
    return part(Setting(device=device, quick=quick, seconds=5 if quick else seconds * 0.8))


def run_apart(name: str, device: str, left: float) -> list[Row]:
    """Do one part in a process of its own, which is ended after its time."""
    seconds = min(PARTS[name][1], left)
    if seconds < LEAST:
        raise AssertionError("no time was left")
    command = [sys.executable, str(Path(__file__)), "--device", device, "--part", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"took more than {seconds:g} s") from None
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise AssertionError(done.stderr.strip()[-3000:] or f"exit code {done.returncode}")
    return [Row(*row) for row in json.loads(found[-1].removeprefix(MARK))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all parts, or those that are named; print the table and return 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="few steps, all in this process")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="these parts alone")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        say(
            "tests/gpu/check.sh needs a GPU that torch finds: --device cpu --quick tries it without"
        )
        return 1
    alone = given.part is not None and len(given.part) == 1 and not given.quick
    if alone:
        say(MARK + json.dumps(run_part(given.part[0], given.device, quick=False)))
        return 0
    started, rows, failed = time.perf_counter(), list[Row](), list[str]()
    for name in given.part or PARTS:
        begun = time.perf_counter()
        try:
            if given.quick:
                found = run_part(name, given.device, quick=True)
            else:
                left = SECONDS - (time.perf_counter() - started)
                found = run_apart(name, given.device, left)
        except Exception as error:  # noqa: BLE001 - the other parts go on
            failed.append(name)
            if given.quick:
                traceback.print_exc()
            lines = str(error).strip().splitlines()
            found = [Row(f"FAILED: {name}", lines[-1][:100] if lines else type(error).__name__)]
            print(f"{name}: {error}", file=sys.stderr)
        say(f"{name}: {time.perf_counter() - begun:.0f} s")
        rows += found
    where = describe(given.device) + QUICK * given.quick
    say(table(rows, where, time.perf_counter() - started))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def describe(device: str) -> str:
    """Return what was computed on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    count = f"{torch.cuda.device_count()} x " if device == "cuda" else ""
    return f"{count}{name}, torch {torch.__version__}, {platform.platform()}"


def table(rows: Sequence[Row], where: str, seconds: float) -> str:
    """Return the rows as a table of Markdown, to be copied into a page."""
    lines = [f"{where}, {seconds:.0f} s", "", "| what | found | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.what} | {row.found} | {row.note} |" for row in rows)])


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
