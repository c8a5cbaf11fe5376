"""`python -m selfkd.study`: settings side by side, each trained on the same seeds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfkd.analysis.verdicts import count
from selfkd.cli.command import Command, Description
from selfkd.cli.functions import absolute_reference, check_reference, stem_of
from selfkd.cli.options import add_from, base_parser
from selfkd.cli.output import safe_output
from selfkd.cli.plan import plan_study
from selfkd.cli.result import Given, Result, Settings, run_command
from selfkd.cli.tables import pick
from selfkd.config import Config
from selfkd.config.validate import check_study
from selfkd.errors import ConfigError
from selfkd.experiments.members import check_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms, finished
from selfkd.reporting.tables import study_table
from selfkd.reporting.words import short_metric
from selfkd.results import ContrastResult, Interval, StudySummary
from selfkd.text import shell_quote
from selfkd.training.functions import function_reference

_UNSEEN = ("unseen acc", "with one bias")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "study", "Train settings side by side on the same seeds, and compare them in pairs."
    )
    add_from(
        parser,
        "run folder whose models are the teacher `members`; may be given several times",
    )
    parser.add_argument(
        "--train",
        metavar="FILE.py:FUNCTION",
        help="a training function of your own, which reads an arm's settings from its trial",
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    return _command(arguments.train).main(arguments, {"members.runs": arguments.runs})


def run_study(
    train_fn: Callable[[Any], object] | str | None = None,
    *,
    config: Given = None,
    runs: Sequence[str] | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    settings: Settings = (),
    quiet: bool = False,
) -> Result[StudySummary]:
    """Train settings side by side on the same seeds, and compare them in pairs.

    What is not given is as the config says, its defaults or those of a resumed run.

    Args:
        train_fn: Training function of a `Trial`, which reports a metric and its student, or
            `path/file.py:function`; the built-in training when not given.
        config: YAML file with the arms, `study.arms`, or a mapping like its content.
        runs: Run folders whose models are the teacher `members`.
        seed: Seed of the split and all trials.
        name: Name of the run folder.
        resume: Run folder to continue.
        settings: Further values by dotted key, or `dotted.key=value` texts as after `--set`.
        quiet: Whether the table and errors only are printed.

    Returns:
        The result: table, verdict, models and summary.

    Raises:
        ValueError: A setting is not as it must be.
        RuntimeError: All trials of an arm failed.
    """
    reference = function_reference(train_fn) if callable(train_fn) else train_fn
    flags: dict[str, Any] = {"members.runs": runs and list(runs), "seed": seed, "name": name}
    return run_command(
        _command(reference),
        config=config,
        settings=settings,
        flags=flags,
        resume=resume,
        quiet=quiet,
    )


def _command(reference: str | None) -> Command[StudySummary]:
    """Return the command, of a training function of a user where there is one."""
    if reference is None:
        return _COMMAND
    reference = absolute_reference(reference)

    def check(config: Config) -> None:
        check_study(config)
        check_reference(reference)
        if config.members.runs or config.members.checkpoints:
            raise ConfigError(
                "--from must not be given with --train, whose networks and data are its own, got "
                f"{', '.join(config.members.runs) or 'members.checkpoints'}"
            )
        for name, arm in config.study.arms.items():
            if arm.average or arm.target_transform != "none":
                key = "average" if arm.average else "target_transform"
                raise ConfigError(
                    f"study.arms.{name}: {key} must be left out with --train, whose models have "
                    "no predictions here and whose teachers are run by itself"
                )

    return dataclasses.replace(
        _COMMAND,
        check=check,
        greet=lambda config: _greet(config, reference),
        function=reference,
        stem=stem_of(reference),
    )


def _describe_contrasts(summary: StudySummary) -> list[str]:
    said = list(summary.verdict.sentences) if summary.verdict else []
    return said + [_describe_share(row, row.share) for row in summary.contrasts if row.share]


def _describe_share(row: ContrastResult, share: Interval) -> str:
    ends = "" if share.low is None else f" [{share.low:.0%}, {share.high:.0%}]"
    return f"{row.arm} closes {share.value:.0%}{ends} of the gap from {row.to} to {row.reference}"


def _check(config: Config) -> None:
    check_study(config)
    check_members(config)


def _trainings(config: Config) -> int:
    """Return how many students are trained."""
    arms = config.study.arms.values()
    return sum(config.arm_seeds(arm) for arm in arms if not arm.average)


def _greet(config: Config, function: str | None = None) -> str:
    arms = config.study.arms
    on, by = (
        (f" on {config.data.name}", "") if function is None else ("", f", trained by {function}")
    )
    return (
        f"{count(len(arms), 'arm')} ({', '.join(arms)}){on}, "
        f"{count(_trainings(config), 'training')} on {count(config.confirm.seeds, 'seed')}{by}"
    )


def _describe(config: Config, folder: RunFolder, summary: StudySummary) -> Description:
    if summary.metric is not None:
        return _describe_own(folder, summary)
    said = (
        f"± is half of a 95 % interval over seeds (Student's t), on {summary.items:,} test "
        f"{folder.facts.tested_on}; differences are paired by seed, shares have Fieller's interval."
    )
    metric = folder.facts.metric
    table = study_table(summary, metric)
    shown = ("arm", f"test {short_metric(metric)}", "seeds", "test errors", *_UNSEEN)
    more = (column for column in table.head[4:] if column not in _UNSEEN)
    return Description(
        _describe_contrasts(summary),
        pick(table, *shown),
        [f"models:  {folder.path}/arms/*/trial_*/student.safetensors"],
        f"python -m selfkd.report {shell_quote(str(folder.path))} --format csv",
        [pick(table, "arm", *more), said, *_describe_bias(summary)],
    )


def _describe_own(folder: RunFolder, summary: StudySummary) -> Description:
    """Describe arms that a user's function has trained, by the metric that it has reported."""
    table = study_table(summary)
    return Description(
        _describe_contrasts(summary),
        table,
        [f"models:  {folder.path}/arms/*/trial_*/student.safetensors"],
        f"python -m selfkd.report {shell_quote(str(folder.path))} --format csv",
        ["± is half of a 95 % interval over seeds (Student's t); differences are paired by seed."],
    )


def _describe_bias(summary: StudySummary) -> list[str]:
    biased = [arm.name for arm in summary.arms if arm.biased_errors is not None]
    if not biased:
        return []
    return [
        f"unseen acc: test accuracy on the classes that {', '.join(biased)} saw no image of; one "
        "bias: with one number added to the logits of these classes; biases: with one for each "
        "class. Both are fitted on validation."
    ]


_COMMAND = Command(
    name="study",
    check=_check,
    greet=_greet,
    finished=finished,
    work=compare_arms,
    describe=_describe,
    plan=plan_study,
    most=_trainings,
)

if __name__ == "__main__":
    raise SystemExit(main())
