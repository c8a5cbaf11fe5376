"""What the commands that train have in common: flags, the run folder, Ray, how they end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from selfkd.config import Config, ConfigError, load_config, merge_settings
from selfkd.console import Follower, make_console
from selfkd.jobs import Executor
from selfkd.ledger import RunFolder
from selfkd.tracking import NoTracker, make_tracker

INTERRUPTED = 130
USAGE = 2
FAILED = 1

Work = Callable[[Config, RunFolder, Executor, Follower, NoTracker], object]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that trains.

    Args:
        name: of its module.
        check: raises ConfigError for what can be known before anything starts.
        greet: what to say first.
        is_finished: whether a run has nothing left to do.
        work: does what is left.
        tell: prints the result; gets what is to be said beside it.
        stem: of a run's name where the user gives none; the data's name when not given.
        again: what of the command line must be given again to continue.
    """

    name: str
    check: Callable[[Config], None]
    greet: Callable[[Config], str]
    is_finished: Callable[[Config, RunFolder], bool]
    work: Work
    tell: Callable[[Console, Config, RunFolder, list[str]], None]
    stem: str | None = None
    again: str = ""

    def main(self, arguments: argparse.Namespace, flags: dict[str, Any]) -> int:
        """Run the command; return its exit code.

        Args:
            arguments: those of `base_parser`.
            flags: the command's own, as dotted config keys with values.
        """
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        folder = None
        try:
            folder, config = self._prepare(arguments, flags)
            self._run(folder, config, arguments)
        except KeyboardInterrupt:
            again = "" if folder is None else f"; continue with:\n  {self.resume(folder)}"
            make_console().print(f"\nstopped{again}", soft_wrap=True)
            return INTERRUPTED
        except (RuntimeError, ValueError, OSError) as error:
            usage = folder is None or isinstance(error, ConfigError)
            again = "" if usage or folder is None else f"\ncontinue with: {self.resume(folder)}"
            print(f"error: {error}{again}", file=sys.stderr)  # noqa: T201
            return USAGE if usage else FAILED
        return 0

    def run(self, arguments: argparse.Namespace, flags: dict[str, Any]) -> tuple[RunFolder, Config]:
        """Run the command from Python; return where its results lie.

        Raises:
            ConfigError: as for exit code 2.
            RuntimeError: as for exit code 1.
        """
        folder, config = self._prepare(arguments, flags)
        self._run(folder, config, arguments)
        return folder, config

    def resume(self, folder: RunFolder) -> str:
        """Return what continues a run."""
        return f"python -m selfkd.{self.name} --resume {shlex.quote(str(folder.path))}{self.again}"

    def _prepare(
        self, arguments: argparse.Namespace, flags: dict[str, Any]
    ) -> tuple[RunFolder, Config]:
        flags = {**flags, "seed": arguments.seed, "name": arguments.name}
        if arguments.resume is None:
            config = _at_home(
                load_config(arguments.config, settings=arguments.settings, flags=flags)
            )
            self.check(config)
            stem = (self.stem or config.data.name).replace("/", "-")
            now = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
            path = Path(config.storage).expanduser() / (config.name or now)
            return RunFolder.create(path, config, command=self.name), config
        folder, stored = RunFolder.open(Path(arguments.resume))
        folder.check_command(self.name)
        if arguments.config:
            flags = {"rounds": stored.rounds, "name": stored.name} | {
                key: value for key, value in flags.items() if value is not None
            }
            config = load_config(arguments.config, settings=arguments.settings, flags=flags)
        else:
            config = merge_settings(stored, settings=arguments.settings, flags=flags)
        config = _at_home(config)
        folder.check_change(stored, config)
        return folder, config

    def _run(self, folder: RunFolder, config: Config, arguments: argparse.Namespace) -> None:
        console = make_console()
        console.print(f"selfkd: {self.greet(config)}; run folder {folder.path}", soft_wrap=True)
        notes = []
        if not self.is_finished(config, folder):
            try:
                notes = self._train(console, folder, config, verbose=arguments.verbose)
            except ConfigError:
                if arguments.resume is None:
                    _remove_if_empty(folder)
                raise
        self.tell(console, config, folder, notes)

    def _train(
        self, console: Console, folder: RunFolder, config: Config, *, verbose: bool
    ) -> list[str]:
        """Do what is left of a run; return what to say of it."""
        start = time.perf_counter()
        # imported here, where bad input has been refused: ray takes a second
        from selfkd.cluster import connect

        resources, name = config.resources, folder.path.name
        tracker = make_tracker(config, name=name, run_id=folder.run_id, folder=folder.path)
        console.print(tracker.description, soft_wrap=True)
        meanwhile = threading.Thread(target=_import_the_rest, name="imports", daemon=True)
        meanwhile.start()
        follower = Follower(console, metric=config.search.metric, mode=config.search.mode)
        ray = connect(
            cpu=resources.cpu,
            gpu=resources.gpu,
            workers=resources.workers,
            storage=folder.path,
            verbose=verbose,
        )
        try:
            with follower, ray as slots:
                meanwhile.join()
                from selfkd.search import Pool

                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, _interrupt)  # after Ray has set its own
                workers = min(slots, max(config.search.trials, config.members.trained()))
                pool = Pool(
                    "selfkd.trial:run_job",
                    cpu=resources.cpu,
                    gpu=resources.gpu,
                    warm=workers,
                    workers=resources.workers,
                )
                with pool:
                    self.work(config, folder, pool, follower, tracker)
        finally:
            tracker.close()
        cost = _cost(time.perf_counter() - start, follower.train_seconds, workers)
        return [*follower.notes, cost, tracker.description]


def base_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that all commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m selfkd.{name}", description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file, see tune_configs/")
    parser.add_argument("--name", help="of the run folder")
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue")
    parser.add_argument("--seed", type=int, help="of the split, the search and all trials")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="set any config key, for example --set train.lr=1e-2",
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ray prints")
    return parser


def _at_home(config: Config) -> Config:
    """Return a config whose files lie where this process sees them: workers have other folders."""
    root = config.data.root or os.environ.get("SELFKD_DATA")
    members = dataclasses.replace(
        config.members,
        runs=[_absolute(run) for run in config.members.runs],
        checkpoints=[
            dataclasses.replace(
                file, path=_absolute(file.path), classes=file.classes and _absolute(file.classes)
            )
            for file in config.members.checkpoints
        ],
    )
    data = dataclasses.replace(config.data, root=root and _absolute(root))
    return dataclasses.replace(config, data=data, members=members)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _import_the_rest() -> None:
    """Import what takes seconds and is needed later, while Ray waits for its own processes."""
    for module in ("selfkd.search", "scipy.stats"):
        importlib.import_module(module)


def _cost(wall: float, train_seconds: float, workers: int) -> str:
    if not train_seconds:
        return f"time:  {wall:.1f} s, no trial was left to run"
    ideal = train_seconds / workers
    return (
        f"time:  {wall:.1f} s in all; training alone would take {ideal:.1f} s on {workers} "
        f"workers, so everything else added {wall - ideal:.1f} s "
        f"({(wall - ideal) / ideal:.0%} of the training)"
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fault(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return USAGE


def _remove_if_empty(folder: RunFolder) -> None:
    """Remove the folder of a run that never began, so that its name is free again."""
    if not any(folder.path.glob("*/*/result.json")):
        shutil.rmtree(folder.path)


def everyone(*listeners: object) -> Any:
    """Return a listener that tells several, one after the other."""
    return _Everyone(listeners)


class _Everyone:
    def __init__(self, listeners: Sequence[object]) -> None:
        self._listeners = listeners

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*arguments: object) -> None:
            for listener in self._listeners:
                getattr(listener, name)(*arguments)

        return tell
