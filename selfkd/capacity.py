"""`python -m selfkd.capacity`: where distillation helps, over the student's size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from selfkd.analysis.verdicts import count
from selfkd.cli.command import Command, add_members, base_parser, everyone
from selfkd.cli.progress import Follower
from selfkd.cli.terminal import print_rows
from selfkd.config import Config
from selfkd.execution.jobs import Executor
from selfkd.experiments.capacity import check_sizes, grow, trainings
from selfkd.experiments.ensemble import check_members, finished, tell_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import capacity_table
from selfkd.results import Curve
from selfkd.tracking import NoTracker


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "capacity", "Train students of growing size from labels only and from the same teachers."
    )
    add_members(parser)
    parser.add_argument("--key", help="what makes a student larger, such as model.args.width")
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="of the key, one a student")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    if arguments.values:
        arguments.settings.append(f"capacity.values=[{', '.join(arguments.values)}]")
    flags: dict[str, Any] = {"members.count": arguments.members, "members.runs": arguments.runs}
    return _COMMAND.main(arguments, {**flags, "capacity.key": arguments.key})


def _check(config: Config) -> None:
    check_members(config)
    check_sizes(config)


def _greet(config: Config) -> str:
    capacity = config.capacity
    values = ", ".join(map(str, capacity.values))
    how = (
        f"{config.search.trials} trials for each"
        if capacity.search
        else f"T {config.distill.temperature:.3g}, alpha {config.distill.alpha:.3g}"
    )
    return (
        f"{tell_members(config)}, then students with {capacity.key} {values} on "
        f"{config.data.name}, from labels only and distilled ({how}), "
        f"{count(config.confirm.seeds, 'paired seed')} each"
    )


def _work(
    config: Config, folder: RunFolder, pool: Executor, follower: Follower, tracker: NoTracker
) -> None:
    grow(config, folder, pool, everyone(follower, tracker))


def _tell(console: Console, config: Config, folder: RunFolder, notes: list[str] | None) -> None:
    summary = finished(folder) or {}
    table = capacity_table(Curve.model_validate(summary))
    print_rows(console, table.head, table.rows)
    if notes is None:
        return
    seeds = summary["seeds"]
    lines = [
        summary["verdict"],
        *summary["said"],
        f"test accuracy, mean ± half of a 95 % interval over {count(seeds, 'seed')}, for these "
        "teachers and this test split; the verdict is a paired t test's at 5 %, by Holm for the "
        f"{len(summary['sizes'])} sizes looked at.",
        *notes,
        f"models:  {folder.path}/students/*/student.safetensors, the best taught one of each size",
    ]
    if summary["searched"]:
        lines.append(f"T and alpha against size:  python -m selfkd.response {folder.path}")
    console.print("\n".join(lines), soft_wrap=True)


_COMMAND = Command(
    name="capacity",
    check=_check,
    greet=_greet,
    is_finished=lambda config, folder: finished(folder) is not None,
    work=_work,
    tell=_tell,
    most=lambda config: max(trainings(config), config.members.trained()),
)

if __name__ == "__main__":
    raise SystemExit(main())
