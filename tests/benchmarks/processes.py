"""CPU time of a command and of all processes that it starts, Ray's too, for `startup` and `search`.

It is their user and system time, sampled from /proc until the last of them has ended. This process
adopts those whose parent ends before them, so that none is missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

ADOPT = 36  # PR_SET_CHILD_SUBREAPER
INTERVAL = 0.1


def measure(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> tuple[float, list[tuple[str, float]]]:
    """Run a command; return its wall seconds, and the name and CPU seconds of each process.

    Args:
        command: Command.
        folder: Folder that it runs in; what it prints is written to out.txt there.
        environment: Its environment variables.
    """
    if ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0):
        raise SystemExit("processes must be adopted to be waited for, which takes Linux")
    seen = dict[psutil.Process, tuple[str, float]]()
    out, start, wall, code = folder / "out.txt", time.perf_counter(), 0.0, 0
    with open(out, "w", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # the last one has ended
            break
        if pid == child.pid:
            wall, code = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        if pid:
            continue
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times, name = process.cpu_times(), " ".join(process.cmdline()).strip()[:90]
                name = name or seen.get(process, ("", 0.0))[0]
                seen[process] = name, times.user + times.system
        time.sleep(INTERVAL)
    child.returncode = code
    if code:
        text = out.read_text(encoding="utf-8")
        raise SystemExit(f"{' '.join(command)} failed with code {code}:\n{text[-3000:]}")
    return wall, list(seen.values())
