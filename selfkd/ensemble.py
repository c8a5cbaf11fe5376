"""`python -m selfkd.ensemble`: many teachers, one student, from a command to a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from selfkd.cli.command import Command, add_members, base_parser, everyone
from selfkd.cli.progress import Follower
from selfkd.cli.terminal import make_ensemble_table, print_table
from selfkd.config import Config
from selfkd.execution.jobs import Executor
from selfkd.experiments.ensemble import check_members, compress, finished, tell_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.words import compression_verdict
from selfkd.tracking import NoTracker


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "ensemble", "Train several models, average them, and distil the average into one."
    )
    add_members(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    flags: dict[str, Any] = {"members.count": arguments.members, "members.runs": arguments.runs}
    return _COMMAND.main(arguments, flags)


def _greet(config: Config) -> str:
    student = config.student or config.model
    return (
        f"{tell_members(config)}, then {config.search.trials} trials of one student, "
        f"{student.name} on {config.data.name}, and {config.confirm.seeds} fresh seeds to confirm "
        "the best"
    )


def _work(
    config: Config, folder: RunFolder, pool: Executor, follower: Follower, tracker: NoTracker
) -> None:
    compress(config, folder, pool, everyone(follower, tracker))


def _tell(console: Console, config: Config, folder: RunFolder, notes: list[str] | None) -> None:
    summary = finished(folder) or {}
    print_table(console, make_ensemble_table(summary["rows"]))
    if notes is None:
        return
    notes = [
        *compression_verdict(summary),
        "test acc ± half of a 95 % interval over members or seeds; ms an image, of 1 and of 128 "
        "at once, on one thread.",
        *notes,
        f"model:  {folder.path}/student.safetensors",
        f"targets:  python -m selfkd.targets ls {folder.targets(config)}",
    ]
    console.print("\n".join(notes), soft_wrap=True)


_COMMAND = Command(
    name="ensemble",
    check=check_members,
    greet=_greet,
    is_finished=lambda config, folder: finished(folder) is not None,
    work=_work,
    tell=_tell,
)

if __name__ == "__main__":
    raise SystemExit(main())
