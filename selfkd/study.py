"""`python -m selfkd.study`: settings side by side, each trained on the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from selfkd.analysis.verdicts import count
from selfkd.cli.command import Command, base_parser, everyone
from selfkd.cli.progress import Follower
from selfkd.cli.terminal import print_rows
from selfkd.config import Config
from selfkd.execution.jobs import Executor
from selfkd.experiments.ensemble import finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import check_study, experiment, trainings
from selfkd.reporting.tables import study_table
from selfkd.results import Row, Study
from selfkd.tracking import NoTracker


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "study", "Train settings side by side on the same seeds, and compare them in pairs."
    )
    parser.add_argument(
        "--from",
        metavar="RUN",
        action="append",
        dest="runs",
        help="run folder whose models are the teacher `members`; may be given several times",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    return _COMMAND.main(arguments, {"members.runs": arguments.runs})


def _tell_contrast(row: Row) -> str:
    share = row["share"]
    if share is None:
        return str(row["verdict"])
    ends = "" if share["low"] is None else f" [{share['low']:.0%}, {share['high']:.0%}]"
    gone = f"{share['value']:.0%}{ends} of the way from {row['to']} to {row['towards']}"
    return f"{row['verdict']}; {gone}"


def _greet(config: Config) -> str:
    arms = config.study.arms
    return (
        f"{count(len(arms), 'arm')} ({', '.join(arms)}) on {config.data.name}, "
        f"{count(trainings(config), 'training')} on {count(config.confirm.seeds, 'seed')}"
    )


def _work(
    config: Config, folder: RunFolder, pool: Executor, follower: Follower, tracker: NoTracker
) -> None:
    experiment(config, folder, pool, everyone(follower, tracker))


def _tell(console: Console, config: Config, folder: RunFolder, notes: list[str] | None) -> None:
    summary = finished(folder) or {}
    table = study_table(Study.model_validate(summary))
    print_rows(console, table.head, table.rows)
    if notes is None:
        return
    lines = [
        *map(_tell_contrast, summary["contrasts"]),
        f"± is half of a 95 % interval over seeds (Student's t), on {summary['images']:,} test "
        "images; differences are paired by seed, shares have Fieller's interval.",
        *_tell_bias(summary),
        *notes,
        f"models:  {folder.path}/arms/*/trial_*/student.safetensors",
    ]
    console.print("\n".join(lines), soft_wrap=True)


def _tell_bias(summary: Row) -> list[str]:
    biased = [arm["name"] for arm in summary["arms"] if "biased_errors" in arm]
    if not biased:
        return []
    return [
        f"one bias: errors with one number added to the classes that {', '.join(biased)} saw no "
        "image of; biases: with one for each class. Both are fitted on validation."
    ]


_COMMAND = Command(
    name="study",
    check=check_study,
    greet=_greet,
    is_finished=lambda config, folder: finished(folder) is not None,
    work=_work,
    tell=_tell,
    most=trainings,
)

if __name__ == "__main__":
    raise SystemExit(main())
