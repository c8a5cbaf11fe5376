"""`python -m selfkd.budget`: what distilling costs, what it saves, and when it has paid."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from selfkd.analysis.budget import Budget as Budget
from selfkd.analysis.budget import budget as budget
from selfkd.analysis.budget import describe_budget as describe_budget
from selfkd.cli.budgets import Figures, make_budgets
from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.cli.terminal import make_console, print_lines
from selfkd.loading.costs import measured as measured
from selfkd.reporting.budget_table import make_budget_table as make_budget_table

USAGE = 2


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.budget",
        description="What distilling costs, what it saves, and when it has paid: in money or hours "
        "of a machine, in operations, or both. Figures are given, or taken from a finished RUN.",
    )
    cost: Figures = {"type": float, "metavar": "COST"}
    number: Figures = {"type": float, "metavar": "N"}
    add = parser.add_argument_group("of both models, one of the three or --from RUN").add_argument
    add("--teacher", **cost, help="cost of the teacher's predictions of --per items")
    add("--student", **cost, help="cost of the student's predictions of --per items")
    add(
        "--per",
        **number,
        help="items that costs and point value are for: 1, of tokens of a RUN 1e6",
    )
    add("--teacher-ms", type=float, metavar="MS", help="the teacher's time for an item")
    add("--student-ms", type=float, metavar="MS", help="the student's time for an item")
    add("--price", **cost, help="cost of an hour of the machine that was timed")
    add(
        "--teacher-params",
        **number,
        help="parameters of the teacher, of all its networks: two "
        "operations a parameter and item, six where it is trained",
    )
    add("--student-params", **number, help="parameters of the student, alike")
    add = parser.add_argument_group("of the training").add_argument
    add("--items", **number, help="items in the training data")
    add("--tokens", **number, help="tokens in the training data, which are then the items")
    add("--views", **number, help="augmented views of each item whose teacher logits are cached")
    add("--epochs", **number, help="epochs of a trial, where --training is not given")
    add("--trials", **number, help="trainings of a student, those of the search included")
    add("--training", **cost, help="cost of all training of the student")
    add("--train-seconds", type=float, metavar="S", help="seconds of all trials together")
    add(
        "--teacher-training",
        nargs="?",
        const=True,
        **cost,
        help="count the teacher's training "
        "too: this cost, or what RUN or the sizes say; it is there already when not given",
    )
    add = parser.add_argument_group("of what is served").add_argument
    add("--volume", **number, help="items that will be served")
    add(
        "--rate",
        metavar="N[/s]",
        help="items that are served a day, or with /s, /min or /h in "
        "that time: gives the days to the break-even",
    )
    add(
        "--gap",
        type=float,
        metavar="POINTS",
        help="score of the teacher less that of the student; that of RUN when not given",
    )
    add(
        "--point-value",
        **cost,
        help="what a point is worth on --per served items: what the gap "
        "costs is taken off the saving",
    )
    add = parser.add_argument_group("of a run").add_argument
    add(
        "--from",
        dest="run",
        metavar="RUN",
        help="run folder to take measured times and counted operations from",
    )
    add("--batch", type=int, choices=(1, 128), default=128, help="items at once in RUN's times")
    add("--value", help="value of the student in a RUN of selfkd.capacity")
    add = parser.add_argument
    add("--unit", metavar="WORD", help="word for what is served: item, or that of RUN")
    add("--format", choices=("table", "json"), default="table")
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        found = make_budgets({k: v for k, v in vars(arguments).items() if v is not None})
    except (ValueError, OSError) as error:
        print_error(str(error))
        return USAGE
    sentences = [
        describe_budget(plan, unit=found.unit, of=of, points=found.points)
        for of, plan in found.plans.items()
    ]
    (of, plan), *_ = found.plans.items()
    if arguments.format == "json":
        tree = {**asdict(plan), "of": of, "unit": found.unit, "sentence": sentences[0]}
        if len(found.plans) > 1:
            tree["operations"] = {**asdict(found.plans["operations"]), "sentence": sentences[1]}
        return print_data(json.dumps({**tree, "notes": found.notes}, indent=1) + "\n")
    console = make_console()
    console.print(make_budget_table(**found.shown))
    print_lines(console, [*sentences, *found.notes])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
