"""`python -m selfkd.generations`: born-again generations, from a command to a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from selfkd.command import Command, base_parser, everyone
from selfkd.config import Config
from selfkd.console import Follower, make_table
from selfkd.jobs import Executor
from selfkd.ledger import RunFolder
from selfkd.lineage import born_again, finished, measure_ensemble
from selfkd.tracking import NoTracker


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "generations", "Train a model on labels, then born-again generations that learn from it."
    )
    parser.add_argument("--rounds", type=int, help="born-again generations after generation 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    return _COMMAND.main(arguments, {"rounds": arguments.rounds})


def _greet(config: Config) -> str:
    return (
        f"generation 0 on labels, then {config.rounds} born-again ({config.rounds + 1} in all), "
        f"{config.search.trials} trials each, {config.model.name} on {config.data.name}"
    )


def _is_finished(config: Config, folder: RunFolder) -> bool:
    return finished(config, folder) is not None


def _work(
    config: Config, folder: RunFolder, pool: Executor, follower: Follower, tracker: NoTracker
) -> None:
    results = born_again(config, folder, pool, everyone(follower, tracker))
    measure_ensemble(config, folder, pool, results)


def _tell(console: Console, config: Config, folder: RunFolder, notes: list[str]) -> None:
    results, ensemble = finished(config, folder) or ([], None)
    console.print(make_table(results, ensemble))
    notes = [
        f"val acc is the best of {config.search.trials} trials, so it is optimistic; the test "
        "split was read once a generation, after the choice.",
        *notes,
        f"models:  {folder.path}/generation_*/student.safetensors",
        f"more generations:  {_COMMAND.resume(folder)} --rounds {config.rounds + 1}",
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

if __name__ == "__main__":
    raise SystemExit(main())
