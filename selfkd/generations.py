"""`python -m selfkd.generations`: born-again generations, from a command to a table.

The module can be called, too: `selfkd.generations(train_fn, rounds=3)` makes generations with a
training function of your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from selfkd.cli.command import Command, base_parser, everyone, inside_job
from selfkd.cli.progress import Follower
from selfkd.cli.terminal import (
    make_confirmation_table,
    make_metric_table,
    make_sparkline,
    make_table,
    print_table,
)
from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.execution.jobs import Executor
from selfkd.experiments.generations import born_again, complete, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Row
from selfkd.tracking import NoTracker
from selfkd.training.functions import function_reference


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "generations", "Train a model on labels, then born-again generations that learn from it."
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N|auto",
        help="born-again generations after generation 0; auto: until two show no gain",
    )
    parser.add_argument(
        "--train",
        metavar="FILE.py:FUNCTION",
        help="a training function of your own; its file is run on every worker",
    )
    return parser


def _rounds(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text  # the config says what it must be


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    return _command(arguments.train).main(arguments, {"rounds": arguments.rounds})


def run_generations(
    train_fn: Callable[[Any], object] | str,
    *,
    rounds: int | Literal["auto"] = 5,
    space: Mapping[str, Any] | None = None,
    trials: int = 8,
    metric: str = "val_accuracy",
    mode: str = "max",
    seed: int = 0,
    name: str | None = None,
    resume: str | Path | None = None,
    settings: Sequence[str] = (),
) -> list[Row]:
    """Train born-again generations with a training function of your own.

    Args:
        train_fn: takes a `selfkd.training.trial.Trial`; stands at the top level of a .py file,
            which workers import (what it does when run stands under `if __name__ ==
            "__main__"`).
            Or its reference, `path/file.py:name`.
        rounds: born-again generations after generation 0; `auto` stops by itself.
        space: dotted keys and distributions, `{"params.lr": {"loguniform": [1e-3, 1e-1]}}`; by
            default T and alpha.
        trials: of each generation.
        metric: that `train_fn` reports, by which the best trial is chosen.
        mode: `max` or `min`.
        seed: of the search and all trials.
        name: of the run folder.
        resume: run folder to continue; its settings stay but for `rounds`.
        settings: further `dotted.key=value` texts, as after `--set`.

    Returns:
        The result of each generation, as in its `result.json`; `models[0]["checkpoint"]` is the
        chosen student's file within the run folder.

    Raises:
        ValueError: a setting, or `train_fn`, is not as it must be.
        RuntimeError: all trials of a generation failed.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """
    reference = train_fn if isinstance(train_fn, str) else function_reference(train_fn)
    arguments = ["--train", reference, "--rounds", str(rounds)]
    texts = list(settings)
    if resume is None:
        texts += [f"search.trials={trials}", f"search.metric={metric}", f"search.mode={mode}"]
        texts += [] if space is None else [f"search.space={json.dumps(dict(space))}"]
        arguments += ["--seed", str(seed), *(["--name", name] if name else [])]
    else:
        arguments += ["--resume", str(resume)]
    for text in texts:
        arguments += ["--set", text]
    folder, config = _command(reference).run(
        make_parser().parse_args(arguments), {"rounds": rounds}
    )
    return folder.results()[: config.most_rounds + 1]


def _command(reference: str | None) -> Command:
    if reference is None:
        return _COMMAND
    path, colon, name = reference.rpartition(":")
    if colon and not inside_job():  # workers have other folders, but for a job's own
        reference = f"{Path(path).expanduser().absolute()}:{name}"

    def check(config: Config) -> None:
        if config.controls:
            raise ConfigError(
                "controls must be empty with --train, whose data and test split are its own, got "
                f"{config.controls}"
            )
        if not colon or not Path(path).expanduser().is_file():
            raise ConfigError(f"--train must be path/file.py:function, got {reference!r}")

    def greet(config: Config) -> str:
        return f"{_plan(config)}, trained by {reference}"

    command = dataclasses.replace(
        _COMMAND,
        check=check,
        greet=greet,
        work=partial(_work, function=reference),
        stem=f"{Path(path).stem}-{name}",
        again=f" --train {shlex.quote(reference)}",
    )
    return dataclasses.replace(command, tell=partial(_tell, command=command))


def _greet(config: Config) -> str:
    return f"{_plan(config)}, {config.model.name} on {config.data.name}"


def _plan(config: Config) -> str:
    most, trials, seeds = config.most_rounds, config.search.trials, config.confirm.seeds
    again = f"{most} born-again ({most + 1} in all)"
    if config.rounds == "auto":
        again = f"at most {most} born-again, until two in a row show no gain"
    confirmed = f", confirmed on {seeds} fresh seed" + ("s" if seeds > 1 else "") if seeds else ""
    return f"generation 0 on labels, then {again}, {trials} trials each{confirmed}"


def _is_finished(config: Config, folder: RunFolder) -> bool:
    return finished(config, folder) is not None


def _work(
    config: Config,
    folder: RunFolder,
    pool: Executor,
    follower: Follower,
    tracker: NoTracker,
    *,
    function: str | None = None,
) -> None:
    listener = everyone(follower, tracker)
    results = born_again(config, folder, pool, listener, function=function)
    complete(config, folder, pool, listener, results, function=function)


def _tell(
    console: Console,
    config: Config,
    folder: RunFolder,
    notes: list[str] | None,
    *,
    command: Command | None = None,
) -> None:
    summary = finished(config, folder)
    if summary is None:
        raise ConfigError(f"{folder.path} must have a summary.json once it is finished, got none")
    results, metric, trials = summary["generations"], config.search.metric, config.search.trials
    if summary["ensemble"] is None:
        print_table(console, make_metric_table(results, metric))
        said = f"{metric} is the best of {trials} trials, so it is optimistic."
    else:
        print_table(console, make_table(results, summary["ensemble"]))
        said = (
            f"val acc is the best of {trials} trials, so it is optimistic; the test "
            "split was read once a generation, after the choice"
        )
        said += ", and once for each model that confirms." if config.confirm.seeds else "."
    confirmed = [row["confirmation"] for row in results if row["confirmation"]]
    if confirmed:
        print_table(console, make_confirmation_table(results, summary["controls"]))
        said += (
            "\n± is half of a 95 % interval: over seeds (Student's t), of an ensemble over test "
            "images (bootstrap). McNemar: exact p of a chosen model and its teacher."
        )
    if notes is None:
        return
    told = [*(confirmed[1:] or confirmed), *summary["controls"]]
    notes = [
        *(verdict for row in told for verdict in row["verdict"].split("; ")),
        *([summary["stopped"]] if summary["stopped"] else []),
        make_sparkline(results, metric),
        said,
        *notes,
        f"models:  {folder.path}/generation_*/student.safetensors",
        f"more generations:  {(command or _COMMAND).resume(folder)} --rounds {len(results)}",
    ]
    console.print("\n".join(notes), soft_wrap=True)


_COMMAND = Command(
    name="generations",
    check=lambda config: None,
    greet=_greet,
    is_finished=_is_finished,
    work=_work,
    tell=_tell,
)


class _Callable(types.ModuleType):
    """This module, which is the Python function of its name as well."""

    __call__ = staticmethod(run_generations)


if __name__ == "__main__":
    raise SystemExit(main())
sys.modules[__name__].__class__ = _Callable
