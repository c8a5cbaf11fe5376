"""`python -m selfkd.ensemble`: many teachers, one student, from a command to a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selfkd.command import Command, base_parser, everyone
from selfkd.compression import compress, find_members, finished
from selfkd.config import Config, ConfigError
from selfkd.console import Follower, make_ensemble_table
from selfkd.jobs import Executor, Row
from selfkd.ledger import RunFolder
from selfkd.tracking import NoTracker
from selfkd.verdicts import compare, count_seeds, tell


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "ensemble", "Train several models, average them, and distil the average into one."
    )
    parser.add_argument("--members", type=int, help="models that are trained")
    parser.add_argument(
        "--from",
        metavar="RUN",
        action="append",
        dest="runs",
        help="run folder whose models are members; may be given several times",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    flags: dict[str, Any] = {"members.count": arguments.members, "members.runs": arguments.runs}
    return _COMMAND.main(arguments, flags)


def _check(config: Config) -> None:
    for run in config.members.runs:
        find_members(run)
    for file in config.members.checkpoints:
        for path in (file.path, file.classes):
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"members.checkpoints must be files, got {path}")


def _greet(config: Config) -> str:
    members = config.members
    parts = [f"{members.trained()} members on labels"] if members.trained() else []
    parts += [f"those of {run}" for run in members.runs]
    parts += [f"{len(members.checkpoints)} from files"] if members.checkpoints else []
    student = config.student or config.model
    return (
        f"{', '.join(parts)}, then {config.search.trials} trials of one student, {student.name} "
        f"on {config.data.name}, and {config.confirm.seeds} fresh seeds to confirm the best"
    )


def _work(
    config: Config, folder: RunFolder, pool: Executor, follower: Follower, tracker: NoTracker
) -> None:
    compress(config, folder, pool, everyone(follower, tracker))


def _tell(console: Console, config: Config, folder: RunFolder, notes: list[str]) -> None:
    summary = finished(folder) or {}
    console.print(make_ensemble_table(summary["rows"]))
    notes = [
        *_verdict(summary),
        "test acc ± half of a 95 % interval over members or seeds; ms an image, of 1 and of 128 "
        "at once, on one thread.",
        *notes,
        f"model:  {folder.path}/student.safetensors",
        f"targets:  python -m selfkd.targets ls {folder.targets(config)}",
    ]
    console.print("\n".join(notes), soft_wrap=True)


def _verdict(summary: Row) -> list[str]:
    chosen, share, gain = summary["chosen"], summary["share"], summary["gain"]
    setting = (
        f"chosen of {summary['trials']} trials on validation: T {chosen['temperature']:.3g}, "
        f"alpha {chosen['alpha']:.3g}, average of {chosen['average']}"
    )
    pairs = count_seeds(max(1, summary["seeds"]))
    student, labels = "the student from its teacher", "the same from labels only"
    lines = [setting, compare(student, labels, gain, f"test accuracy, {pairs}")]
    if share is None:
        lines.append("share of the teacher's gain kept: none, the teacher gains nothing on it")
    else:
        ends = "" if share["low"] is not None else " (no interval: too little is known for one)"
        lines.append(f"share of the teacher's gain kept: {tell(share)}{ends}")
    return lines


_COMMAND = Command(
    name="ensemble",
    check=_check,
    greet=_greet,
    is_finished=lambda config, folder: finished(folder) is not None,
    work=_work,
    tell=_tell,
)

if __name__ == "__main__":
    raise SystemExit(main())
