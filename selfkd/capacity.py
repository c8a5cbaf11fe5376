"""`python -m selfkd.capacity`: where distillation helps, over the student's size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfkd.analysis.verdicts import count
from selfkd.cli.command import Command, Description
from selfkd.cli.options import add_members, base_parser
from selfkd.cli.output import safe_output
from selfkd.cli.plan import plan_capacity
from selfkd.cli.result import Given, Result, Settings, run_command
from selfkd.cli.tables import pick
from selfkd.config import Config
from selfkd.config.augment import check_views
from selfkd.config.validate import check_capacity
from selfkd.experiments.capacity import finished, grow
from selfkd.experiments.members import check_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import capacity_table
from selfkd.reporting.words import describe_members, describe_sizes_kept
from selfkd.results import CapacitySummary, title
from selfkd.text import shell_quote


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "capacity", "Train students of growing size from labels only and from the same teachers."
    )
    add_members(parser)
    parser.add_argument("--key", help="what makes a student larger, such as model.args.width")
    parser.add_argument(
        "--values", nargs="+", metavar="VALUE", help="values of the key, one a student"
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    if arguments.values:
        arguments.settings.append(f"capacity.values=[{', '.join(arguments.values)}]")
    flags: dict[str, Any] = {"members.count": arguments.members, "members.runs": arguments.runs}
    return _COMMAND.main(arguments, {**flags, "capacity.key": arguments.key})


def run_capacity(
    *,
    config: Given = None,
    key: str | None = None,
    values: Sequence[Any] | None = None,
    members: int | None = None,
    runs: Sequence[str] | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    settings: Settings = (),
    quiet: bool = False,
) -> Result[CapacitySummary]:
    """Train students of growing size from labels only and from the same teachers.

    What is not given is as the config says, its defaults or those of a resumed run.

    Args:
        config: YAML file, or a mapping like its content.
        key: Dotted key that makes a student larger, such as `model.args.width`.
        values: Values of the key, one a student.
        members: Number of teachers that are trained.
        runs: Run folders whose models are teachers.
        seed: Seed of the split, the search and all trials.
        name: Name of the run folder.
        resume: Run folder to continue.
        settings: Further values by dotted key, or `dotted.key=value` texts as after `--set`.
        quiet: Whether the table and errors only are printed.

    Returns:
        The result: table, verdict, models and summary.

    Raises:
        ValueError: A setting is not as it must be.
        RuntimeError: All trials of a stage failed.

    Reference:
        Cho, Hariharan, "On the Efficacy of Knowledge Distillation", 2019,
        https://arxiv.org/abs/1910.01348
    """
    flags: dict[str, Any] = {"members.count": members, "members.runs": runs and list(runs)}
    flags |= {"capacity.key": key, "capacity.values": values and list(values)}
    flags |= {"seed": seed, "name": name}
    return run_command(
        _COMMAND, config=config, settings=settings, flags=flags, resume=resume, quiet=quiet
    )


def _check(config: Config) -> None:
    check_members(config)
    check_views(config)
    check_capacity(config)


def _greet(config: Config) -> str:
    capacity = config.capacity
    values = ", ".join(map(str, capacity.values))
    how = (
        f"{config.search.trials} trials for each"
        if capacity.search
        else f"T {config.distill.temperature:.3g}, alpha {config.distill.alpha:.3g}"
    )
    return (
        f"{describe_members(config)}, then students with {capacity.key} {values} on "
        f"{config.data.name}, from labels only and distilled ({how}), "
        f"{count(config.confirm.seeds, 'paired seed')} each"
    )


def _describe(config: Config, folder: RunFolder, summary: CapacitySummary) -> Description:
    metric, seeds = folder.facts.metric, count(summary.seeds, "seed")
    said = (
        f"{title(f'test_{metric}')}, mean ± half of a 95 % interval over {seeds}, for "
        "these teachers and this test split."
    )
    table = capacity_table(summary, metric)
    name = summary.key.rpartition(".")[2]
    run = shell_quote(str(folder.path))
    smallest = shell_quote(str(summary.sizes[0].value))
    command = f"response {run}" if summary.searched else f"budget --from {run} --value {smallest}"
    return Description(
        [*summary.verdict.sentences, *describe_sizes_kept(summary, metric)],
        pick(table, name, *table.head[2:5], "distillation"),
        [
            f"models:  {folder.path}/students/*/trial_*/student.safetensors, the best distilled "
            "one of each size"
        ],
        f"python -m selfkd.{command}",
        [pick(table, name, "params", "p, Holm", "score kept"), *summary.said, said],
    )


_COMMAND = Command(
    name="capacity",
    check=_check,
    greet=_greet,
    finished=finished,
    work=grow,
    describe=_describe,
    plan=plan_capacity,
    most=lambda config: max(
        2 * config.confirm.seeds * len(config.capacity.values), config.members.trained()
    ),
)

if __name__ == "__main__":
    raise SystemExit(main())
