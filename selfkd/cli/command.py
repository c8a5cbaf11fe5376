"""What the commands that train have in common: flags, the run folder, Ray, how they end."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from selfkd.analysis.verdicts import count
from selfkd.cli.environment import record
from selfkd.cli.options import USAGE, config_flags
from selfkd.cli.output import print_error
from selfkd.cli.plan import Plan
from selfkd.cli.print_plan import print_plan
from selfkd.cli.progress import ProgressReporter, end_display
from selfkd.cli.refusals import refuse_other_encodings, refuse_relative
from selfkd.cli.signals import (
    INTERRUPTED,
    inside_command,
    inside_job,
    interruptible,
    leave_now,
    say_stopped,
)
from selfkd.cli.terminal import make_console, print_lines, print_sentences, print_table
from selfkd.config import Config, load_config, merge_settings, refuse_foreign, remember, with_speed
from selfkd.config.paths import with_absolute_paths
from selfkd.errors import ConfigError, LockedError, RayLostError
from selfkd.experiments.arms import Run
from selfkd.experiments.run_folder import RunFolder
from selfkd.imports import without_collection
from selfkd.reporting.read import REPORT
from selfkd.reporting.tables import Table
from selfkd.reporting.watch import Reporter, make_plots
from selfkd.reporting.words import describe_live, duration
from selfkd.results import Event
from selfkd.storage.files import make_no_folder_again, remove_tree
from selfkd.storage.lock import Lock
from selfkd.storage.remote import as_path
from selfkd.storage.temporary import temporary_files
from selfkd.text import shell_quote
from selfkd.tracking import make_tracker

FAILED = 1
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is started with, from a command line or from Python."""

    config: str | Path | None = None
    """YAML file."""
    settings: Sequence[str] = ()
    """`dotted.key=value` texts."""
    flags: Mapping[str, Any]
    """Values by dotted key; None leaves one out."""
    resume: str | Path | None = None
    """Run folder to continue."""
    quiet: bool = False
    """Whether the table and errors only are printed."""
    verbose: bool = False
    """Whether all tables and explanations, and what Ray prints, are shown."""
    plan: bool = False
    """Whether nothing is started, and what would be is said."""


@dataclass(frozen=True)
class Description:
    """Summary of a run as a command prints it."""

    sentences: Sequence[str]
    """Verdict, the headline first."""
    table: Table
    model: Sequence[str]
    """Which model to take, and the line that loads it."""
    next: str
    """Command to type next."""
    more: Sequence[Table | str] = ()
    """Further tables, and what explains them, with `--verbose`."""


@dataclass(frozen=True)
class Work:
    """What is said of the work when it is done."""

    notes: Sequence[str] = ()
    more: Sequence[str] = ()
    """What is said with `--verbose`."""


@dataclass(frozen=True, kw_only=True)
class Command(Generic[S]):
    """A command that trains."""

    name: str
    """Name of its module."""
    check: Callable[[Config], None]
    """Raises ConfigError for what can be known before anything starts."""
    greet: Callable[[Config], str]
    """Returns what is said first."""
    finished: Callable[[Config, RunFolder], S | None]
    """Returns the summary of a run that has nothing left to do."""
    work: Callable[[Run], S]
    """Does what is left, and returns the summary."""
    describe: Callable[[Config, RunFolder, S], Description]
    """Returns what is printed of a summary."""
    plan: Callable[[Config], Plan]
    """Returns what a run trains and caches."""
    function: str | None = None
    """Reference of a user's training function."""
    stem: str | None = None
    """Beginning of a run's name where the user gives none; the data's name when not given."""
    most: Callable[[Config], int] = lambda config: max(
        config.search.trials, config.confirm.replicas
    )
    """Returns how many trials are run at a time, if there is room."""
    check_folder: Callable[[RunFolder, Config], None] | None = None
    """Raises ConfigError for a run folder that it does not continue; those of other commands when
    not given."""
    free: tuple[str, ...] = ()
    """Beginnings of keys that may change beside those that always may, in a run that goes on."""
    flag: str = "--resume"
    """Flag that names the run folder to continue."""
    of_file: str = ""
    """Way out in messages where the flag names a file."""
    again: str = ""
    """Words of the command line that are repeated to continue, as the run folder has none of
    them."""
    code: Callable[[S], int] = lambda summary: 0
    """Returns the exit code of a run that came to its end."""

    def main(self, arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
        """Run the command; return its exit code.

        Args:
            arguments: Those of `base_parser`.
            flags: The command's own, as dotted config keys with values.
        """
        options = Options(
            config=arguments.config,
            settings=arguments.settings,
            flags={**config_flags(arguments), **flags},
            resume=arguments.resume,
            quiet=arguments.quiet,
            verbose=arguments.verbose,
            plan=arguments.plan,
        )
        folder = None
        atexit.register(gc.freeze)  # else Python searches all for garbage at its end: half a second
        with interruptible(lambda: self._say_stopped(folder)):
            try:
                with temporary_files():
                    folder, config = self._prepare(options)
                    if options.plan:
                        print_plan(self.plan(config), self.name, config, folder, self.function)
                    else:
                        return self.code(self._run(folder, config, options))
            except KeyboardInterrupt:
                say_stopped(lambda: self._say_stopped(folder))
                if folder is None:
                    return INTERRUPTED
                leave_now(INTERRUPTED)
            except (RuntimeError, ValueError, OSError) as error:
                usage = folder is None or isinstance(error, ConfigError)
                self._say_failed(error, None if usage else folder)
                if isinstance(error, RayLostError):
                    leave_now(FAILED)
                return USAGE if usage else FAILED
        return 0

    def run(self, options: Options) -> tuple[RunFolder, Config, S]:
        """Run the command from Python; return where its results lie, and the summary.

        Raises:
            ConfigError: As for exit code 2.
            RuntimeError: As for exit code 1.
        """
        with interruptible():
            folder, config = self._prepare(options)
            return folder, config, self._run(folder, config, options)

    def resume(self, folder: RunFolder) -> str:
        """Return what continues a run."""
        train = f" --train {shell_quote(self.function)}" if self.function else ""
        path = shell_quote(str(folder.path))
        again = f" {self.again}" if self.again else ""
        return f"python -m selfkd.{self.name} {self.flag} {path}{train}{again}"

    def _say_failed(self, error: Exception, folder: RunFolder | None) -> None:
        end_display()
        lasts = folder is not None and folder.exists()
        again = f"\ncontinue with: {self.resume(folder)}" if folder and lasts else ""
        print_error(f"{error}{again}")

    def _leave_stuck(self, folder: RunFolder, error: Exception) -> None:
        """Leave where the main thread cannot, as it waits for a Ray that has died."""
        self._say_failed(error, folder)
        leave_now(FAILED)

    def _say_stopped(self, folder: RunFolder | None) -> None:
        if folder is not None and not folder.exists():
            return  # which the lock says
        end_display()
        again = "" if folder is None else f"; continue with:\n  {self.resume(folder)}"
        make_console().print(f"\nstopped{again}", soft_wrap=True)

    def _prepare(self, options: Options) -> tuple[RunFolder, Config]:
        flags, settings = options.flags, options.settings
        named = {"--config": options.config, "--resume": options.resume, **options.flags}
        refuse_other_encodings(named | {"--set": " ".join(options.settings)})
        if options.resume is None:
            config = load_config(options.config, settings=settings, flags=flags)
            refuse_relative(config, ("storage", config.storage))
            config = with_speed(with_absolute_paths(config))
            self.check(config)
            stem = (self.stem or config.data.name).replace("/", "-")
            now = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
            path = as_path(config.storage).expanduser() / (config.name or now)
            if options.plan:
                if config.name is not None:
                    RunFolder.check_new(path)
                return RunFolder(path), config
            remember(config)
            numbered = config.name is None
            return RunFolder.create(path, config, command=self.name, numbered=numbered), config
        refuse_relative(None, (self.flag, str(options.resume)))
        place = as_path(options.resume)
        folder, stored = RunFolder.open(place, flag=self.flag, of_file=self.of_file)
        if self.check_folder is None:
            folder.check_command(self.name)
        else:
            self.check_folder(folder, stored)
        folder.check_entries()
        if options.config:
            given = {key: value for key, value in flags.items() if value is not None}
            flags = {"rounds": stored.rounds, "name": stored.name, **given}
            config = load_config(options.config, settings=settings, flags=flags)
        else:
            config = merge_settings(stored, settings=settings, flags=flags)
        refuse_relative(config)
        config = with_speed(with_absolute_paths(config), stored)
        folder.check_change(stored, config, free=self.free)
        if not options.config:
            confirmed = [setting.partition("=")[0] for setting in settings]
            refuse_foreign(stored, folder.path / "config.yaml", confirmed=confirmed)
        if not options.plan:
            remember(config)
        return folder, config

    def _run(self, folder: RunFolder, config: Config, options: Options) -> S:
        console = make_console()
        if not options.quiet:
            greeting = f"selfkd: {self.greet(config)}; run folder {folder.path}"
            print_sentences(console, [greeting, *describe_live(config)])
        work = Work()
        summary = self.finished(config, folder)
        if summary is None:
            try:
                with Lock(folder.path):
                    make_no_folder_again(folder.path)
                    summary, work = self._train(console, folder, config, options)
                    folder.sweep()
            except LockedError:
                raise
            except ConfigError:
                if options.resume is None:
                    _remove_if_empty(folder)
                raise
            finally:
                make_no_folder_again(None)
        text = self.describe(config, folder, summary)
        if not options.quiet:
            print_sentences(console, ["", *text.sentences])
        elif self.code(summary):
            print_sentences(console, [f"error: {text.sentences[0]}"])
        print_table(console, text.table)
        if options.verbose:
            for part in text.more:
                if isinstance(part, Table):
                    print_table(console, part)
                else:
                    print_sentences(console, [part])
            print_sentences(console, work.more)
        if not options.quiet:
            report = f"report:  {folder.path / REPORT}"
            print_lines(console, [*work.notes, *text.model, report, f"next:    {text.next}"])
        return summary

    def _train(
        self, console: Console, folder: RunFolder, config: Config, options: Options
    ) -> tuple[S, Work]:
        """Do what is left of a run; return the summary, and what to say of the work."""
        start = time.perf_counter()
        # imported here, where bad input has been refused: ray takes a second
        with without_collection():
            from selfkd.execution.cluster import connect, find_slots, open_message

        resources, run_id = config.resources, folder.run_id
        tracker = make_tracker(
            config,
            name=folder.path.name,
            run_id=run_id,
            folder=folder.local,
            run=folder.path,
            plots=make_plots,
        )
        if not options.quiet:
            print_lines(console, [tracker.description])
        record(folder.path)
        reporter = Reporter(folder.path)
        meanwhile = threading.Thread(target=_import_the_rest, name="imports", daemon=True)
        meanwhile.start()
        progress = ProgressReporter(console, config, quiet=options.quiet)

        def events(event: Event) -> None:
            for follow in (progress, reporter, tracker):
                follow(event)

        try:
            stuck = partial(self._leave_stuck, folder) if inside_command() else None
            with progress, connect(verbose=options.verbose, stuck=stuck) as joined:
                if warning := open_message(joined=joined):
                    progress.say(warning)
                slots = find_slots(
                    cpu=resources.cpu,
                    gpu=resources.gpu,
                    workers=resources.workers,
                    storage=folder.path,
                    joined=joined,
                    wait=resources.wait,
                    say=progress.say,
                )
                workers = min(slots, self.most(config))
                progress.wait_for(f"starting Ray, {count(workers, 'worker')} …")
                from selfkd.execution.pool import Pool
                from selfkd.experiments.device import settle_device

                with Pool(
                    "selfkd.worker.jobs:run_job",
                    cpu=resources.cpu,
                    gpu=resources.gpu,
                    warm=workers,
                    workers=resources.workers,
                    run=(str(folder.path), run_id),
                    say=progress.say,
                ) as pool:
                    try:
                        config = settle_device(config, folder, pool, events)
                        tracker.settle(config)
                        run = Run(
                            config=config,
                            folder=folder,
                            executor=pool,
                            events=events,
                            function=self.function,
                        )
                        summary = self.work(run)
                        reporter.finish()
                    except KeyboardInterrupt:
                        # first of all: a Ray job that is stopped is killed after three seconds
                        say_stopped(lambda: self._say_stopped(folder))
                        if inside_job():
                            logging.disable(logging.WARNING)  # W&B's process was stopped, too
                        tracker.close()
                        raise
        finally:
            tracker.close()
            for written in ("wandb", "tracking"):
                folder.upload(written)
            meanwhile.join()
        wall = time.perf_counter() - start
        more = [_cost(wall, progress.train_seconds, workers), tracker.description]
        time_line = f"time:    {duration(wall)} on {count(workers, 'worker')}"
        tracked = [f"note:    {tracker.description}"] if tracker.incomplete else []
        return summary, Work([*progress.notes, *tracked, time_line], more)


def load_line(folder: RunFolder, *, own: bool = False) -> str:
    """Return the line of Python that loads the model of a run.

    Args:
        folder: Run folder.
        own: Whether the network is made by a user's training function.
    """
    more = ", make_model=YOUR_FUNCTION" if own else ""
    return f"load:    model = selfkd.load({json.dumps(str(folder.path))}{more})"


def _import_the_rest() -> None:
    """Import what takes seconds and is needed later, while Ray waits for its own processes."""
    for module in ("selfkd.execution.pool", "scipy.stats"):
        with contextlib.suppress(Exception):  # raised again where it is needed
            importlib.import_module(module)


def _cost(wall: float, train_seconds: float, workers: int) -> str:
    if not train_seconds:
        return f"{wall:.1f} s, no trial was left to run"
    ideal = train_seconds / workers
    return (
        f"{wall:.1f} s in all; training alone would take {ideal:.1f} s on {workers} "
        f"workers, so everything else added {wall - ideal:.1f} s "
        f"({(wall - ideal) / ideal:.0%} of the training)"
    )


def _remove_if_empty(folder: RunFolder) -> None:
    """Remove the folder of a run that never began, so that its name is free again."""
    if not any(folder.path.glob("*/*/result.json")):
        remove_tree(folder.path)
