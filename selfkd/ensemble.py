"""`python -m selfkd.ensemble`: many teachers, one student, from a command to a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfkd.cli.command import Command, Description, load_line
from selfkd.cli.options import add_members, base_parser
from selfkd.cli.output import safe_output
from selfkd.cli.plan import plan_ensemble
from selfkd.cli.result import Given, Result, Settings, run_command
from selfkd.cli.tables import pick
from selfkd.config import Config
from selfkd.config.augment import check_views
from selfkd.experiments.ensemble import arms_of, compress, finished
from selfkd.experiments.members import check_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import ensemble_table, further_head
from selfkd.reporting.words import describe_ensemble, describe_members, short_metric
from selfkd.results import EnsembleSummary


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "ensemble", "Train several models, average them, and distil the average into one."
    )
    add_members(parser)
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    flags: dict[str, Any] = {"members.count": arguments.members, "members.runs": arguments.runs}
    return _COMMAND.main(arguments, flags)


def run_ensemble(
    *,
    config: Given = None,
    members: int | None = None,
    runs: Sequence[str] | None = None,
    trials: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    settings: Settings = (),
    quiet: bool = False,
) -> Result[EnsembleSummary]:
    """Train several models, average them, and distil the average into one.

    What is not given is as the config says, its defaults or those of a resumed run.

    Args:
        config: YAML file, or a mapping like its content.
        members: Number of models that are trained.
        runs: Run folders whose models are members.
        trials: Number of trials of the student.
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
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    flags: dict[str, Any] = {"members.count": members, "members.runs": runs and list(runs)}
    flags |= {"search.trials": trials, "seed": seed, "name": name}
    return run_command(
        _COMMAND, config=config, settings=settings, flags=flags, resume=resume, quiet=quiet
    )


def _check(config: Config) -> None:
    check_members(config)
    check_views(config)


def _greet(config: Config) -> str:
    alone = "" if config.confirm.baseline else ", without the labels-only baseline"
    return (
        f"{describe_members(config)}, then {config.search.trials} trials of one student, "
        f"{config.network().name} on {config.data.name}, and {config.confirm.seeds} fresh seeds to "
        f"confirm the best{alone}"
    )


def _describe(config: Config, folder: RunFolder, summary: EnsembleSummary) -> Description:
    metric, further = folder.facts.metric, folder.facts.further
    short, table = short_metric(metric), ensemble_table(summary.rows, metric, further)
    setting, *sentences = describe_ensemble(summary, metric)
    return Description(
        sentences,
        pick(table, "model", f"test {short}", "parameters", "ms, 1", "ms, 128"),
        [f"model:   {folder.path}/student.safetensors", load_line(folder)],
        f"python -m selfkd.targets ls {folder.targets(config)}",
        [
            pick(table, "model", f"val {short}", *further_head(further)),
            setting,
            f"test {short} ± half of a 95 % interval over members or seeds; ms an item, of 1 and "
            "of 128 at once, on one thread.",
        ],
    )


_COMMAND = Command(
    name="ensemble",
    check=_check,
    greet=_greet,
    finished=finished,
    work=compress,
    describe=_describe,
    plan=plan_ensemble,
    most=lambda config: max(
        config.search.trials,
        config.members.trained(),
        arms_of(config) * config.confirm.seeds,
    ),
)

if __name__ == "__main__":
    raise SystemExit(main())
