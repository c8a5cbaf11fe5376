"""`python -m selfkd.study`: settings side by side, each trained on the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from selfkd.command import Command, base_parser, everyone
from selfkd.compression import finished
from selfkd.config import Config
from selfkd.console import Follower, count, print_table
from selfkd.experiment import check_study, experiment, trainings
from selfkd.jobs import Executor, Row
from selfkd.ledger import RunFolder
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


def make_study_table(summary: Row) -> Table:
    """Return the table of a study: a row an arm, in the order of the config."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", justify="left")
    for column in (
        "seeds",
        "test errors",
        "test acc",
        "agreement",
        "one bias",
        "biases",
        "val acc",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for arm in summary["arms"]:
        table.add_row(
            arm["name"],
            str(len(arm["runs"])),
            _spread(arm["errors"], "{:.1f}"),
            _spread(arm["mean"], "{:.2%}"),
            _spread(arm.get("agreement"), "{:.2%}"),
            _spread(arm.get("biased_errors"), "{:.1f}"),
            _spread(arm.get("all_biased_errors"), "{:.1f}"),
            f"{arm['val_accuracy']:.2%}",
        )
    members = summary["members"]
    if members:
        table.add_section()
        accuracy = f"{members['test_accuracy']:.2%}"
        name = f"members ({members['count']})"
        val = f"{members['val_accuracy']:.2%}"
        table.add_row(name, "", str(members["errors"]), accuracy, "", "", "", val)
    return table


def _spread(interval: Row | None, form: str) -> str:
    if interval is None:
        return ""
    text = form.format(interval["value"])
    if interval["low"] is None:
        return text
    return f"{text} ± {form.format((interval['high'] - interval['low']) / 2)}"


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
    print_table(console, make_study_table(summary))
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
