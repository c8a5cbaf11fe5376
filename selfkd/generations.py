"""`python -m selfkd.generations`: born-again generations, from a command to a table."""

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
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from selfkd.config import Config, ConfigError, load_config, merge_settings
from selfkd.console import Follower, make_console, make_table
from selfkd.jobs import Row
from selfkd.lineage import Listener, RunFolder, born_again, finished, measure_ensemble
from selfkd.tracking import make_tracker

INTERRUPTED = 130
USAGE = 2
FAILED = 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.generations",
        description="Train a model on labels, then born-again generations that learn from it.",
    )
    parser.add_argument("--rounds", type=int, help="born-again generations after generation 0")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    console = make_console()
    try:
        folder, config = _prepare(arguments)
    except (ValueError, OSError) as error:
        return _fault(error)
    try:
        return _run(console, folder, config, verbose=arguments.verbose)
    except ConfigError as error:
        if arguments.resume is None:
            _remove_if_empty(folder)
        return _fault(error)
    except KeyboardInterrupt:
        console.print(f"\nstopped; continue with:\n  {_resume(folder)}", soft_wrap=True)
        return INTERRUPTED
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}\ncontinue with: {_resume(folder)}", file=sys.stderr)  # noqa: T201
        return FAILED


def _prepare(arguments: argparse.Namespace) -> tuple[RunFolder, Config]:
    flags = {"rounds": arguments.rounds, "seed": arguments.seed, "name": arguments.name}
    if arguments.resume is None:
        config = _at_home(load_config(arguments.config, settings=arguments.settings, flags=flags))
        name = config.name or f"{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}".replace("/", "-")
        return RunFolder.create(Path(config.storage).expanduser() / name, config), config
    folder, stored = RunFolder.open(Path(arguments.resume))
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


def _at_home(config: Config) -> Config:
    """Return a config whose data lies where this process sees it: workers have other folders."""
    root = config.data.root or os.environ.get("SELFKD_DATA")
    if root is None:
        return config
    absolute = str(Path(root).expanduser().absolute())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=absolute))


def _run(console: Console, folder: RunFolder, config: Config, *, verbose: bool) -> int:
    console.print(
        f"selfkd: generation 0 on labels, then {config.rounds} born-again "
        f"({config.rounds + 1} in all), {config.search.trials} trials each, "
        f"{config.model.name} on {config.data.name}; run folder {folder.path}",
        soft_wrap=True,
    )
    notes = [] if finished(config, folder) else _train(console, folder, config, verbose=verbose)
    results, ensemble = finished(config, folder) or ([], None)
    console.print(make_table(results, ensemble))
    notes = [
        f"val acc is the best of {config.search.trials} trials, so it is optimistic; the test "
        "split was read once a generation, after the choice.",
        *notes,
        f"models:  {folder.path}/generation_*/student.safetensors",
        f"more generations:  {_resume(folder)} --rounds {config.rounds + 1}",
    ]
    console.print("\n".join(notes), soft_wrap=True)
    return 0


def _train(console: Console, folder: RunFolder, config: Config, *, verbose: bool) -> list[str]:
    """Do what is left of a run; return what to say of it."""
    start = time.perf_counter()
    # imported here, where bad input has been refused: ray takes a second
    from selfkd.cluster import connect

    resources = config.resources
    tracker = make_tracker(config, name=folder.path.name, run_id=folder.run_id, folder=folder.path)
    console.print(tracker.description, soft_wrap=True)
    meanwhile = threading.Thread(target=_import_the_rest, name="imports", daemon=True)
    meanwhile.start()
    ray = connect(cpu=resources.cpu, gpu=resources.gpu, storage=folder.path, verbose=verbose)
    try:
        with Follower(console, config.rounds) as follower, ray as slots:
            meanwhile.join()
            from selfkd.search import Pool

            signal.signal(signal.SIGTERM, _interrupt)  # after Ray has set its own
            workers = min(slots, config.search.trials)
            entry = "selfkd.trial:run_job"
            with Pool(entry, cpu=resources.cpu, gpu=resources.gpu, warm=workers) as pool:
                results = born_again(config, folder, pool, _All(follower, tracker))
                measure_ensemble(config, folder, pool, results)
    finally:
        tracker.close()
    cost = _cost(time.perf_counter() - start, follower.train_seconds, workers)
    return [cost, tracker.description]


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


class _All:
    """Tells several listeners, one after the other."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def labelling(self, generation: int, teachers: int) -> None:
        for listener in self._listeners:
            listener.labelling(generation, teachers)

    def generation_started(self, generation: int, trials: int, done: int) -> None:
        for listener in self._listeners:
            listener.generation_started(generation, trials, done)

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        for listener in self._listeners:
            listener.trial_reported(trial, rows)

    def trial_finished(self, trial: Row) -> None:
        for listener in self._listeners:
            listener.trial_finished(trial)

    def generation_finished(self, result: Row) -> None:
        for listener in self._listeners:
            listener.generation_finished(result)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _resume(folder: RunFolder) -> str:
    return f"python -m selfkd.generations --resume {shlex.quote(str(folder.path))}"


def _fault(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return USAGE


def _remove_if_empty(folder: RunFolder) -> None:
    """Remove the folder of a run that never began, so that its name is free again."""
    if not (folder.path / "data.json").exists():
        shutil.rmtree(folder.path)


if __name__ == "__main__":
    raise SystemExit(main())
