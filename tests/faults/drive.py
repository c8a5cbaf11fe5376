"""A driver that dies at a chosen moment: real training of a real run, in one process without Ray.

Run as a script it is a server: it imports what a driver needs once, and forks for each line of
JSON that it reads, so that a kill costs no start of a process. What happens to a run is a sequence
of events, one a line of text:

    StageStarted generation 0 of 1         an event of the run
    writing generation_000/result.json     written beside and flushed, not yet renamed
    wrote generation_000/result.json       renamed
    doing train, did train                 a worker's job, before and after
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Self


class Death:
    """Logs what happens, and kills its own process at the n-th line that matches a pattern."""

    def __init__(self, root: Path, pattern: str | None, number: int) -> None:
        self._root, self._pattern, self._left = root, pattern, number
        self.log = root.with_name(f"{root.name}.events")

    def happened(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text + "\n")
        if self._pattern is not None and re.search(self._pattern, text):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        """What stands for os.replace."""
        name = os.path.relpath(target, self._root)
        self.happened(f"writing {name}")
        _REPLACE(source, target, **options)
        self.happened(f"wrote {name}")

    def job(self, kind: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What stands for the worker."""
        from selfkd.worker.jobs import run_job

        self.happened(f"doing {kind}")
        yield from run_job(kind, payload)
        self.happened(f"did {kind}")

    def __call__(self, event: Any) -> None:
        values = map(_plain, vars(event).values())
        self.happened(" ".join([type(event).__name__, *values]))


_REPLACE = os.replace


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "epoch " + ",".join(str(row.epoch) for row in value)
    if is_dataclass(value):
        names = ("stage", "trial", "generation", "status")
        return " ".join(str(getattr(value, name)) for name in names if hasattr(value, name))
    return str(value)


def drive(folder: str, settings: list[str], pattern: str | None, number: int) -> None:
    """Start a run, or continue it, as the command does; die at an event."""
    from selfkd.config import load_config
    from selfkd.execution.jobs import InProcess
    from selfkd.experiments.arms import Run
    from selfkd.experiments.generations import born_again
    from selfkd.experiments.run_folder import RunFolder

    path = Path(folder)
    death = Death(path, pattern, number)
    os.replace = death.replace
    if (path / "config.yaml").exists():
        run_folder, config = RunFolder.open(path)
    else:
        config = load_config(settings=settings)
        run_folder = RunFolder.create(path, config)
    executor = InProcess(death.job)
    born_again(Run(config=config, folder=run_folder, executor=executor, events=death))


class Driver:
    """Runs drivers, one after the other."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def run(
        self, folder: Path, settings: list[str], *, die: str | None = None, number: int = 1
    ) -> tuple[int, str]:
        """Run a driver to its end; return its exit code, -9 if it died, and its error."""
        self._server.stdin.write(json.dumps([str(folder), settings, die, number]) + "\n")
        self._server.stdin.flush()
        code, error = json.loads(self._server.stdout.readline())
        return code, error

    def events(self, folder: Path) -> list[str]:
        """Return what happened to a run, in all its starts."""
        return folder.with_name(f"{folder.name}.events").read_text().splitlines()


def serve() -> None:
    # once for all forks: each of them takes a run a second or more when it is first needed
    for name in (
        *("scipy.optimize", "sklearn.datasets", "timm.optim", "timm.scheduler"),
        *("selfkd.experiments.generations", "selfkd.worker.jobs", "selfkd.tasks.images.task"),
        *("selfkd.tasks.images.check", "selfkd.data.timm_sets", "selfkd.storage.foreign"),
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            code, error = 0, ""
            try:
                drive(*json.loads(line))
            except BaseException as exception:  # noqa: BLE001 - told to the test
                code, error = 1, f"{type(exception).__name__}: {exception}"
            os.write(writes, error.encode())
            os._exit(code)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            error = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), error]), flush=True)


if __name__ == "__main__":
    serve()
