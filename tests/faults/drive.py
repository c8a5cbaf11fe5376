"""A driver that dies at a chosen moment: real training of a real run, in one process without Ray.

Run as a script it is a server: it imports what a driver needs once, and forks for each line of
JSON that it reads, so that a kill costs no start of a process. What happens to a run is a sequence
of events, one a line of text:

    stage_started generation 0 of 1        a method of the listener, with what it was told
    writing generation_000/result.json     written beside and flushed, not yet renamed
    wrote generation_000/result.json       renamed
    doing label, did label                 a worker's job, before and after
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self


class Death:
    """Hears of every event, and kills its own process at the n-th that matches a pattern."""

    def __init__(self, root: Path, pattern: str | None, number: int) -> None:
        self._root, self._pattern, self._left = root, pattern, number
        self.log = root.with_name(f"{root.name}.events")

    def event(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text + "\n")
        if self._pattern is not None and re.search(self._pattern, text):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        """What stands for os.replace."""
        name = os.path.relpath(target, self._root)
        self.event(f"writing {name}")
        _REPLACE(source, target, **options)
        self.event(f"wrote {name}")

    def job(self, kind: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What stands for the worker."""
        from selfkd.worker.jobs import run_job

        self.event(f"doing {kind}")
        yield from run_job(kind, payload)
        self.event(f"did {kind}")

    def __getattr__(self, name: str) -> Callable[..., None]:
        def listen(*told: Any) -> None:
            self.event(" ".join([name, *(_plain(value) for value in told)]))

        return listen


_REPLACE = os.replace


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        names = ("stage", "trial", "generation", "state", "status")
        return " ".join(str(value[name]) for name in names if name in value)
    if isinstance(value, list):
        return "epoch " + ",".join(str(row["epoch"]) for row in value)
    return str(value)


def drive(folder: str, settings: list[str], pattern: str | None, number: int) -> None:
    """Start a run, or continue it, as the command does; die at an event."""
    from selfkd.config import load_config
    from selfkd.execution.jobs import InProcess
    from selfkd.experiments.generations import born_again, complete
    from selfkd.experiments.run_folder import RunFolder

    path = Path(folder)
    death = Death(path, pattern, number)
    os.replace = death.replace
    if (path / "config.yaml").exists():
        run, config = RunFolder.open(path)
    else:
        config = load_config(settings=settings)
        run = RunFolder.create(path, config)
    executor = InProcess(death.job)
    results = born_again(config, run, executor, death)  # type: ignore[arg-type]
    complete(config, run, executor, death, results)  # type: ignore[arg-type]


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
    import selfkd.experiments.generations
    import selfkd.worker.jobs  # noqa: F401 - imported once for all forks

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
