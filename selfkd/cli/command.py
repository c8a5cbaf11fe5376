"""What the commands that train have in common: flags, the run folder, Ray, how they end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

from rich.console import Console

from selfkd.cli.environment import record
from selfkd.cli.progress import Follower
from selfkd.cli.terminal import make_console
from selfkd.config import Config, load_config, merge_settings
from selfkd.errors import ConfigError, LockedError
from selfkd.execution.jobs import Executor
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.read import REPORT
from selfkd.reporting.watch import Reporter, make_plots
from selfkd.storage.files import remove_tree
from selfkd.storage.lock import Lock
from selfkd.storage.remote import as_path
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
        tell: prints the result; gets what is to be said beside it, or None for the table alone.
        stem: of a run's name where the user gives none; the data's name when not given.
        again: what of the command line must be given again to continue.
        most: trials that are run at a time, if there is room.
    """

    name: str
    check: Callable[[Config], None]
    greet: Callable[[Config], str]
    is_finished: Callable[[Config, RunFolder], bool]
    work: Work
    tell: Callable[[Console, Config, RunFolder, list[str] | None], None]
    stem: str | None = None
    again: str = ""
    most: Callable[[Config], int] = lambda config: max(
        config.search.trials, config.members.trained()
    )

    def main(self, arguments: argparse.Namespace, flags: dict[str, Any]) -> int:
        """Run the command; return its exit code.

        Args:
            arguments: those of `base_parser`.
            flags: the command's own, as dotted config keys with values.
        """
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        folder = None
        try:
            with interruptible():
                folder, config = self._prepare(arguments, flags)
                self._run(folder, config, arguments)
        except KeyboardInterrupt as stop:
            if not isinstance(stop, _Stopped):
                self._say_stopped(folder)
            if inside_job():
                _leave_now()
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
        with interruptible():
            folder, config = self._prepare(arguments, flags)
            self._run(folder, config, arguments)
        return folder, config

    def resume(self, folder: RunFolder) -> str:
        """Return what continues a run."""
        return f"python -m selfkd.{self.name} --resume {shlex.quote(str(folder.path))}{self.again}"

    def _say_stopped(self, folder: RunFolder | None) -> None:
        again = "" if folder is None else f"; continue with:\n  {self.resume(folder)}"
        make_console().print(f"\nstopped{again}", soft_wrap=True)

    def _prepare(
        self, arguments: argparse.Namespace, flags: dict[str, Any]
    ) -> tuple[RunFolder, Config]:
        flags = {**flags, "seed": arguments.seed, "name": arguments.name}
        if arguments.resume is None:
            config = load_config(arguments.config, settings=arguments.settings, flags=flags)
            _refuse_relative(config, ("storage", config.storage))
            config = _at_home(config)
            self.check(config)
            stem = (self.stem or config.data.name).replace("/", "-")
            now = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
            path = as_path(config.storage).expanduser() / (config.name or now)
            return RunFolder.create(path, config, command=self.name), config
        _refuse_relative(None, ("--resume", arguments.resume))
        folder, stored = RunFolder.open(as_path(arguments.resume))
        folder.check_command(self.name)
        if arguments.config:
            flags = {"rounds": stored.rounds, "name": stored.name} | {
                key: value for key, value in flags.items() if value is not None
            }
            config = load_config(arguments.config, settings=arguments.settings, flags=flags)
        else:
            config = merge_settings(stored, settings=arguments.settings, flags=flags)
        _refuse_relative(config)
        config = _at_home(config)
        folder.check_change(stored, config)
        return folder, config

    def _run(self, folder: RunFolder, config: Config, arguments: argparse.Namespace) -> None:
        console = make_console()
        quiet = arguments.quiet
        if not quiet:
            console.print(f"selfkd: {self.greet(config)}; run folder {folder.path}", soft_wrap=True)
        notes: list[str] = []
        if not self.is_finished(config, folder):
            try:
                with Lock(folder.path):
                    notes = self._train(console, folder, config, arguments)
            except LockedError:
                raise
            except ConfigError:
                if arguments.resume is None:
                    _remove_if_empty(folder)
                raise
        self.tell(console, config, folder, None if quiet else notes)

    def _train(
        self,
        console: Console,
        folder: RunFolder,
        config: Config,
        arguments: argparse.Namespace,
    ) -> list[str]:
        """Do what is left of a run; return what to say of it."""
        start = time.perf_counter()
        # imported here, where bad input has been refused: ray takes a second
        from selfkd.execution.cluster import connect, find_slots

        resources, name = config.resources, folder.path.name
        where, run_id = folder.local, folder.run_id
        tracker = make_tracker(
            config,
            name=name,
            run_id=run_id,
            folder=where,
            run=folder.path,
            plots=make_plots,
        )
        if not arguments.quiet:
            console.print(tracker.description, soft_wrap=True)
        record(folder.path)
        reporter = Reporter(folder.path)
        meanwhile = threading.Thread(target=_import_the_rest, name="imports", daemon=True)
        meanwhile.start()
        follower = Follower(
            console,
            metric=config.search.metric,
            mode=config.search.mode,
            epochs=config.train.epochs,
            quiet=arguments.quiet,
        )
        try:
            with follower, connect(verbose=arguments.verbose) as joined:
                _heed_sigterm()  # again: Ray has set a handler of its own
                slots = find_slots(
                    cpu=resources.cpu,
                    gpu=resources.gpu,
                    workers=resources.workers,
                    storage=folder.path,
                    joined=joined,
                    wait=resources.wait,
                    tell=follower.say,
                )
                meanwhile.join()
                from selfkd.execution.pool import Pool

                workers = min(slots, self.most(config))
                with Pool(
                    "selfkd.worker.jobs:run_job",
                    cpu=resources.cpu,
                    gpu=resources.gpu,
                    warm=workers,
                    workers=resources.workers,
                    run=(str(folder.path), run_id),
                    tell=follower.say,
                ) as pool:
                    try:
                        self.work(config, folder, pool, follower, everyone(reporter, tracker))
                        reporter.finish()
                    except KeyboardInterrupt:
                        # first of all: a Ray job that is stopped is killed after three seconds
                        self._say_stopped(folder)
                        if inside_job():
                            logging.disable(logging.WARNING)  # W&B's process was stopped, too
                        tracker.close()
                        raise _Stopped from None
        finally:
            tracker.close()
            folder.bring("wandb")
        cost = _cost(time.perf_counter() - start, follower.train_seconds, workers)
        where_to_look = f"report:  {folder.path / REPORT}"
        return [*follower.notes, cost, tracker.description, where_to_look]


class _Stopped(KeyboardInterrupt):
    """The run was stopped, and that has been said."""


def inside_job() -> bool:
    """Return whether this process is the driver of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


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
    parser.add_argument("--quiet", action="store_true", help="print the table and errors only")
    return parser


def relative_paths(config: Config | None, *named: tuple[str, str | None]) -> list[str]:
    """Return what is wrong with the relative paths of a Ray job: its own folder ends with it.

    Args:
        config: of the run, where it is known.
        named: further paths, each after what gives it.
    """
    paths = list(named)
    if config is not None:
        paths += [("data.root", config.data.root), ("targets.root", config.targets.root)]
        paths += [("--from", run) for run in config.members.runs]
        paths += [("members.checkpoints", file.path) for file in config.members.checkpoints]
    return [
        f"{name}: must be absolute (or a URI) in a Ray job, whose own folder is removed with it, "
        f"got {path!r}" + (": --set storage=/shared/runs" if name == "storage" else "")
        for name, path in paths
        if path and "://" not in path and not as_path(path).expanduser().is_absolute()
    ]


def _refuse_relative(config: Config | None, *named: tuple[str, str | None]) -> None:
    surroundings = ("SELFKD_DATA", os.environ.get("SELFKD_DATA"))
    faults = relative_paths(config, surroundings, *named) if inside_job() else []
    if faults:
        raise ConfigError("\n".join(faults))


def add_members(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that have several teachers."""
    parser.add_argument("--members", type=int, help="models that are trained")
    parser.add_argument(
        "--from",
        metavar="RUN",
        action="append",
        dest="runs",
        help="run folder whose models are members; may be given several times",
    )


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
    return str(as_path(path).expanduser().absolute())


def _import_the_rest() -> None:
    """Import what takes seconds and is needed later, while Ray waits for its own processes."""
    for module in ("selfkd.execution.pool", "scipy.stats"):
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


def _leave_now() -> None:
    """End without W&B's exit handlers: its process got the signal of a stopped job, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is, and afterwards what it was before."""
    before = _heed_sigterm()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _heed_sigterm() -> Any:
    """Return the handler that was there; none where this is not the thread that gets signals."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fault(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return USAGE


def _remove_if_empty(folder: RunFolder) -> None:
    """Remove the folder of a run that never began, so that its name is free again."""
    if not any(folder.path.glob("*/*/result.json")):
        remove_tree(folder.path)


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
