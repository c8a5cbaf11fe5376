"""`python -m selfkd.generations`: born-again generations, from a command to a table.

The module can be called, too: `selfkd.generations(train_fn, rounds=3)` makes generations with a
training function of your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from selfkd.analysis.verdicts import count, sentences_of, sparkline
from selfkd.cli.command import Command, Description, load_line
from selfkd.cli.functions import absolute_reference, check_reference, stem_of
from selfkd.cli.options import base_parser, config_flags
from selfkd.cli.output import safe_output
from selfkd.cli.plan import plan_generations
from selfkd.cli.result import Given, Result, Settings, run_command
from selfkd.cli.tables import chosen_table, own_metrics_table, summary_table
from selfkd.config import Config
from selfkd.config.validate import check_chain
from selfkd.errors import ConfigError
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.given import check_given
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import Table
from selfkd.reporting.words import form, short_metric, warn_of_collapse
from selfkd.results import GenerationsSummary, title
from selfkd.text import shell_quote
from selfkd.training.functions import function_reference

DEFAULT_JOB = {"confirm.lineages": 12}
"""What the command without a config adds, as `tune_configs/digits.yaml` does: digits are quick."""
ASIDE = ("tracking", "storage", "resources", "checkpoint", "name", "seed", "rounds")
"""Beginnings of the keys that leave the default job what it is."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "generations",
        "Train a model on labels, then born-again generations that are distilled from it.",
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N|auto",
        help="born-again generations after generation 0; auto: until two show no gain",
    )
    parser.add_argument(
        "--from",
        metavar="FILE|RUN",
        dest="given",
        help="generation 0: a file of weights of the model, or the model of an earlier run",
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


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    flags = {"rounds": arguments.rounds, "generation_0.path": arguments.given}
    flags |= DEFAULT_JOB if _is_default_job(arguments) else {}
    return _command(arguments.train).main(arguments, flags)


def _is_default_job(arguments: argparse.Namespace) -> bool:
    """Say whether nothing is given that changes what is trained, but for its seed and rounds."""
    given = [setting.partition("=")[0] for setting in arguments.settings]
    given += [key for key, value in config_flags(arguments).items() if value is not None]
    of_its_own = arguments.config or arguments.resume or arguments.train or arguments.given
    return not of_its_own and all(key.startswith(ASIDE) for key in given)


def run_generations(
    train_fn: Callable[[Any], object] | str | None = None,
    *,
    config: Given = None,
    rounds: int | Literal["auto"] | None = None,
    generation_0: str | Path | None = None,
    space: Mapping[str, Any] | None = None,
    trials: int | None = None,
    metric: str | None = None,
    mode: Literal["max", "min"] | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    settings: Settings = (),
    quiet: bool = False,
) -> Result[GenerationsSummary]:
    """Train born-again generations, with a training function of your own if you have one.

    What is not given is as the config says, its defaults or those of a resumed run.

    Args:
        train_fn: Function that takes a `selfkd.training.trial.Trial`, at the top level of a .py
            file, which workers import (what that file does when run stands under `if __name__ ==
            "__main__"`); or its reference, `path/file.py:name`. The built-in training of the
            config's model when not given.
        config: YAML file, or a mapping like its content.
        rounds: Number of born-again generations after generation 0; `auto` stops by itself.
        generation_0: File of weights of the config's model, or folder of an earlier run whose model
            it is, in place of a generation 0 that is trained; see `--from`.
        space: Dotted keys and distributions, `{"params.lr": {"loguniform": [1e-3, 1e-1]}}`.
        trials: Number of trials of each generation.
        metric: Metric of validation by which the best trial is chosen; `train_fn` reports it.
        mode: Whether more of it is better, or less.
        seed: Seed of the search and of all trials.
        name: Name of the run folder.
        resume: Run folder to continue.
        settings: Further values by dotted key, or `dotted.key=value` texts as after `--set`.
        quiet: Whether the table and errors only are printed.

    Returns:
        The result: table, verdict, models and summary, whose `generations` have the metrics of
        each chosen trial.

    Raises:
        ValueError: A setting, or `train_fn`, is not as it must be.
        RuntimeError: All trials of a generation failed.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """
    reference = function_reference(train_fn) if callable(train_fn) else train_fn
    flags: dict[str, Any] = {
        "rounds": rounds,
        "generation_0.path": None if generation_0 is None else str(generation_0),
        "search.space": space,
        "search.trials": trials,
        "seed": seed,
    }
    flags |= {"search.metric": metric, "search.mode": mode, "name": name}
    return run_command(
        _command(reference),
        config=config,
        settings=settings,
        flags=flags,
        resume=resume,
        quiet=quiet,
    )


def _command(reference: str | None) -> Command[GenerationsSummary]:
    if reference is None:
        return _COMMAND
    reference = absolute_reference(reference)

    def check(config: Config) -> None:
        check_chain(config)
        if config.generation_0.path is not None:
            raise ConfigError(
                "--from must not be given with --train, whose networks and data are its own, got "
                f"{config.generation_0.path}"
            )
        if config.controls:
            raise ConfigError(
                "controls must be empty with --train, whose data and test split are its own, got "
                f"{config.controls}"
            )
        check_reference(reference)

    command = dataclasses.replace(
        _COMMAND,
        check=check,
        greet=lambda config: f"{_plan(config)}, trained by {reference}",
        function=reference,
        stem=stem_of(reference),
    )
    return dataclasses.replace(command, describe=partial(_describe, command=command))


def _check(config: Config) -> None:
    check_chain(config)
    check_given(config)


def _greet(config: Config) -> str:
    networks = [config.model, *config.students] if config.is_chain else [config.model]
    named = " → ".join(model.title if config.is_chain else model.name for model in networks)
    return f"{_plan(config)}, {named} on {config.data.name}"


def _plan(config: Config) -> str:
    most, trials, seeds = config.most_rounds, config.search.trials, config.confirm.replicas
    again = f"{most} born-again ({most + 1} in all)"
    if config.rounds == "auto":
        again = f"at most {most} born-again, until two in a row show no gain"
    noun = "whole lineage" if config.confirm.lineages else "fresh seed"
    confirmed = f", confirmed on {count(seeds, noun)}" if seeds else ""
    if seeds and not config.confirm.baseline:
        confirmed += " without the labels-only baseline"
    given = config.generation_0.path
    first = "on labels" if given is None else f"from {given}"
    return f"generation 0 {first}, then {again}, {count(trials, 'trial')} each{confirmed}"


def _describe(
    config: Config,
    folder: RunFolder,
    summary: GenerationsSummary,
    *,
    command: Command[GenerationsSummary] | None = None,
) -> Description:
    metric, trials, facts = config.search.metric, config.search.trials, folder.facts
    results, own = summary.generations, summary.ensemble is None
    chosen = chosen_table(summary, facts.metric, facts.further)
    more: list[Table | str] = [
        own_metrics_table(results, metric) if own else chosen,
        _sparkline(summary, metric, facts.metric),
        f"models:  {folder.path}/generation_*/student.safetensors",
    ]
    if own:
        more.append(f"{metric} is the best of {trials} trials, so it is optimistic.")
    else:
        also = ", and once for each model that confirms" if summary.confirmations else ""
        more.append(
            f"val {short_metric(facts.metric)} is of one chosen among {trials} trials, so it is "
            f"optimistic; the test split was read once a generation, after the choice{also}."
        )
    if summary.confirmations:
        tested = any(row.mcnemar for row in summary.confirmations)
        more.append(
            "± is half of a 95 % interval: over seeds (Student's t), of an ensemble over test "
            f"{facts.tested_on} (bootstrap)."
            + (" McNemar: exact p of a chosen model and its teacher." if tested else "")
        )
    return Description(
        [
            *_sentences(summary),
            *([summary.stopped] if summary.stopped else []),
            *warn_of_collapse(summary.generations),
        ],
        summary_table(summary, metric if own else facts.metric),
        [_best(summary), load_line(folder, own=own)],
        _next(config, folder, command or _COMMAND, own=own),
        more,
    )


def _next(
    config: Config, folder: RunFolder, command: Command[GenerationsSummary], *, own: bool
) -> str:
    """Return the command to type next: one generation more, where there is a network of it."""
    if not config.is_chain:
        return f"{command.resume(folder)} --rounds {len(folder.results())}"
    path = shell_quote(str(folder.path))
    return f"python -m selfkd.report {path}" if own else f"python -m selfkd.deploy --from {path}"


def _sentences(summary: GenerationsSummary) -> Sequence[str]:
    """Return the verdict in words, or why there is none."""
    if found := sentences_of(summary):
        return found
    if len(summary.generations) == 1:
        return ["generation 0 alone, so there is nothing to compare: --rounds 5 adds generations"]
    return ["one model a generation, so no interval and no verdict: --seeds 3 replicates each"]


def _best(summary: GenerationsSummary) -> str:
    """Return which generation's model to take."""
    results = summary.generations
    of = f"the best of {len(results)} on validation" if len(results) > 1 else "the only one"
    return f"model:   generation {summary.best}, {of}"


def _sparkline(summary: GenerationsSummary, metric: str, compared_by: str) -> str:
    """Return a line of the generations' metric: of the fresh seeds where there are any."""
    results, confirmed = summary.generations, summary.confirmations
    if len(confirmed) == len(results):
        values = [row.mean.value for row in confirmed]
        metric = confirmed[0].metric
        mean = "mean " if metric.startswith("test_") else ""
    else:
        metric = tested if (tested := f"test_{compared_by}") in results[0].metrics else metric
        mean, values = "", [row.metrics[metric] for row in results]
    low, high = (format(end, form(metric)) for end in (min(values), max(values)))
    return f"{mean}{title(metric)} by generation:  {sparkline(values)}  ({low} to {high})"


_COMMAND = Command(
    name="generations",
    check=_check,
    greet=_greet,
    finished=finished,
    work=born_again,
    describe=_describe,
    plan=plan_generations,
)


class _Callable(types.ModuleType):
    """This module, which is the Python function of its name as well."""

    __call__ = staticmethod(run_generations)


if __name__ == "__main__":
    raise SystemExit(main())
sys.modules[__name__].__class__ = _Callable
