"""`python -m selfkd.budget`: what distilling costs, what it saves, and when it has paid."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.cli.terminal import make_console, print_lines
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    CapacitySummary,
    EnsembleSummary,
    GenerationsSummary,
    Size,
    TableRow,
    TeacherRow,
    TrialResult,
)
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row

USAGE = 2
PASSES = 3.0
"""Forward passes that a training step costs: the backward pass is worth two (Kaplan et al.)."""
HOUR_MS = 3_600_000.0
LARGEST = 1e30
"""Largest figure, and the inverse of the smallest one: no product of them overflows."""
KINDS: dict[str, type[CapacitySummary | EnsembleSummary | GenerationsSummary]] = {
    "ensemble": EnsembleSummary,
    "capacity": CapacitySummary,
    "generations": GenerationsSummary,
}
MEASURED = ("teacher_ms", "student_ms", "train_seconds")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What distilling costs and saves; all costs in the unit of the given ones."""

    teacher_cost: float
    """Cost of the teacher's prediction of one item."""
    student_cost: float
    """Cost of the student's prediction of one item."""
    items: float
    """Number of training items whose teacher logits are cached."""
    views: float
    """Number of views of each item."""
    caching: float
    """Cost of caching the teacher logits."""
    training: float
    """Cost of all training of the student."""
    distilling: float
    """Cost of caching and training."""
    saving: float
    """Saving on each item that the student serves in the teacher's place."""
    break_even: float | None
    """Number of served items that pays for distilling; None where the student saves nothing."""
    volume: float | None = None
    """Number of items that will be served."""
    net: float | None = None
    """Saving at that volume, less the cost of distilling."""


def budget(
    *,
    teacher: float,
    student: float,
    items: float,
    per: float = 1.0,
    views: float = 1.0,
    training: float | None = None,
    epochs: float | None = None,
    trials: float = 1.0,
    volume: float | None = None,
) -> Budget:
    """Return what distilling costs, what each served item saves, and when that has paid.

        caching    = items views c_T
        training   = as given, else trials epochs items 3 c_S
        distilling = caching + training
        saving     = c_T - c_S
        break-even = distilling / saving,    net(volume) = volume saving - distilling

    where c_T and c_S are the costs of one item: `teacher / per` and `student / per`. The teacher
    runs once on each view of each item, however many trials read the cached logits. A training
    step costs about three forward passes, as the backward pass costs two. The teacher's own
    training is not counted: it is there already.

    Args:
        teacher: Cost of the teacher's predictions of `per` items (images, tokens).
        student: Cost of the student's predictions of `per` items.
        items: Number of items in the training data.
        per: Number of items that the two costs are for, 1e6 where they are per million.
        views: Number of views of each item, 1 without augmentation.
        training: Cost of all training of the student.
        epochs: Number of epochs of a trial, where the cost of training is not given.
        trials: Number of trainings of a student.
        volume: Number of items that will be served.

    Raises:
        ValueError: A figure is not finite, not above 0 (`training` may be 0), or beyond all
            measure, or neither `training` nor `epochs` is given.

    >>> plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000)
    >>> plan.distilling, round(plan.break_even / 1e9, 2)
    (11000.0, 1.16)

    Reference:
        Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1 (the backward
        pass takes twice the compute of the forward pass), https://arxiv.org/abs/2001.08361
    """
    above: dict[str, float | None] = {"teacher": teacher, "student": student, "items": items}
    above |= {"per": per, "views": views, "trials": trials, "epochs": epochs, "volume": volume}
    for name, value in above.items():
        _check_figure(name, value)
    if training is not None and not (training >= 0 and math.isfinite(training)):
        raise ValueError(f"training must be a finite number, 0 or more, got {training}")
    _check_figure("training", training or None)
    teacher_cost, student_cost = teacher / per, student / per
    if training is None:
        if epochs is None:
            raise ValueError("training must be given, or epochs to compute it from, got neither")
        training = trials * epochs * items * PASSES * student_cost
    caching = items * views * teacher_cost
    distilling, saving = caching + training, teacher_cost - student_cost
    return Budget(
        teacher_cost=teacher_cost,
        student_cost=student_cost,
        items=items,
        views=views,
        caching=caching,
        training=training,
        distilling=distilling,
        saving=saving,
        break_even=distilling / saving if saving > 0 else None,
        volume=volume,
        net=None if volume is None else volume * saving - distilling,
    )


def _check_figure(name: str, value: float | None) -> None:
    if value is None:
        return
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if not 1 / LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be from {1 / LARGEST:g} to {LARGEST:g}, got {value}")


def describe_budget(plan: Budget, *, unit: str = "item") -> str:
    """Return a budget as one sentence.

    >>> plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000)
    >>> describe_budget(plan, unit="token")
    'distilling costs 11,000 and has paid for itself after 1.16 billion served tokens'
    """
    costs = f"distilling costs {_amount(plan.distilling)}"
    if plan.break_even is None:
        dear = "as dear as" if plan.saving == 0 else "dearer than"
        return f"{costs} and never pays: the student is {dear} the teacher, there is no break-even"
    text = f"{costs} and has paid for itself after {_large(plan.break_even)} served {unit}s"
    if plan.volume is None or plan.net is None:
        return text
    gain = "saves" if plan.net >= 0 else "still loses"
    return f"{text}; at {_large(plan.volume)} it {gain} {_amount(abs(plan.net))}"


def make_budget_table(plan: Budget, *, unit: str = "item", per: float = 1.0) -> Table:
    """Return the table of a budget; costs of an item are shown for `per` of them."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column("", justify="left")
    table.add_column("", justify="right", no_wrap=True)
    each = f"per {unit}" if per == 1 else f"per {_large(per).removeprefix('1 ')} {unit}s"
    views = "" if plan.views == 1 else f" in {_amount(plan.views)} views"
    table.add_row(f"teacher, {each}", _amount(plan.teacher_cost * per))
    table.add_row(f"student, {each}", _amount(plan.student_cost * per))
    cached = f"caching teacher logits of {_large(plan.items)} {unit}s{views}, once"
    table.add_row(cached, _amount(plan.caching))
    table.add_row("training", _amount(plan.training))
    table.add_row("distilling, both", _amount(plan.distilling))
    table.add_row(f"saving, {each} served", _amount(plan.saving * per))
    even = "never" if plan.break_even is None else _whole(plan.break_even)
    table.add_row(f"break-even, {unit}s served", even)
    if plan.volume is not None and plan.net is not None:
        table.add_row(f"net after {_large(plan.volume)} {unit}s", _amount(plan.net))
    return table


def measured(run: str, *, batch: int = 128, value: str | None = None) -> dict[str, float]:
    """Return what a run has measured, as far as it has.

    Args:
        run: Run folder of `selfkd.ensemble`, `selfkd.capacity` or `selfkd.generations`.
        batch: Number of items that are predicted at once.
        value: Value of the student, in a capacity run.

    Returns:
        Some of `items`, `views`, `epochs`, `trials`, `train_seconds` (of all trials of the
        student), `teacher_ms` and `student_ms` (for an item, on one thread).

    Raises:
        ConfigError: It is no finished run, or has no such student.
    """
    path = as_path(run).expanduser()
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"--from must be a run folder (with a config.yaml), got {run}")
    folder, config = RunFolder.open(path)
    try:
        kind, why = KINDS.get(folder.command), ""
    except (ValueError, OSError) as error:
        kind, why = None, f" ({error})"
    if kind is None:
        raise ConfigError(f"--from must be a run of selfkd.{', '.join(KINDS)}, got {run}{why}")
    if not (folder.path / "summary.json").exists():
        raise ConfigError(f"--from must be a finished run (with a summary.json), got {run}")
    facts = folder.facts
    found: dict[str, float] = {} if config.steps_by_part else {"epochs": config.train.epochs}
    if "train" in facts.items:
        found |= {"items": facts.items["train"] + facts.transfer, "views": facts.views}
    summary = load_row(kind, folder.path / "summary.json")
    if isinstance(summary, EnsembleSummary) and not summary.rows:
        raise ConfigError(
            f"--from must be a run with results, got {run}: its summary.json has none"
        )
    match summary:
        case CapacitySummary():
            found |= _of_capacity(summary, batch, value)
        case GenerationsSummary():
            found |= _of_generations(summary)
        case summary:
            found |= _of_ensemble(folder, summary, batch)
    times = {name: value for name, value in found.items() if name.endswith("_ms")}
    return found | {name: value / facts.items_an_input for name, value in times.items()}


def _served(run: str) -> tuple[str, float]:
    """Return the word for what a run's models serve, and of how many the costs are shown."""
    facts = RunFolder.open(as_path(run).expanduser())[0].facts
    several = facts.items_an_input > 1
    return facts.unit.removesuffix("s"), 1e6 if several else 1.0


def _of_ensemble(folder: RunFolder, summary: EnsembleSummary, batch: int) -> dict[str, float]:
    paths = folder.path.glob("student/trial_*/result.json")
    trials = [load_row(TrialResult, path) for path in paths]
    return {
        "trials": len(trials),
        "train_seconds": sum(trial.train_seconds for trial in trials),
        **_milliseconds(batch, teacher=summary.teacher, student=summary.rows[-1]),
    }


def _of_generations(summary: GenerationsSummary) -> dict[str, float]:
    born_again = summary.generations[1:]
    if not born_again:
        return {}
    return {
        "trials": sum(row.trials for row in born_again),
        "train_seconds": sum(row.train_seconds for row in born_again),
    }


def _of_capacity(summary: CapacitySummary, batch: int, value: str | None) -> dict[str, float]:
    sizes = {str(size.value): size for size in summary.sizes}
    if value not in sizes:
        known = ", ".join(sizes)
        raise ConfigError(f"--value must be one of the run's students ({known}), got {value}")
    size = sizes[value]
    return {
        "trials": size.trials,
        "train_seconds": size.train_seconds,
        **_milliseconds(batch, teacher=summary.teacher, student=size),
    }


def _milliseconds(batch: int, **models: TeacherRow | TableRow | Size) -> dict[str, float]:
    found = {f"{name}_ms": getattr(model, f"ms_{batch}") for name, model in models.items()}
    return {name: value for name, value in found.items() if value is not None}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.budget",
        description="What distilling costs, what it saves, and when it has paid.",
    )
    add = parser.add_argument
    cost: dict[str, Any] = {"type": float, "metavar": "COST"}
    number: dict[str, Any] = {"type": float, "metavar": "N"}
    add("--teacher", **cost, help="cost of the teacher's predictions of --per items")
    add("--student", **cost, help="cost of the student's predictions of --per items")
    add("--per", **number, help="items that these costs are for: 1, of tokens of a RUN 1e6")
    add("--items", **number, help="items in the training data")
    add("--views", **number, help="augmented views of each item whose teacher logits are cached")
    add("--training", **cost, help="cost of all training of the student")
    add("--epochs", **number, help="epochs of a trial, where --training is not given")
    add("--trials", **number, help="trainings of a student")
    add("--volume", **number, help="items that will be served")
    add("--teacher-ms", type=float, metavar="MS", help="the teacher's time for an item")
    add("--student-ms", type=float, metavar="MS", help="the student's time for an item")
    add("--train-seconds", type=float, metavar="S", help="seconds of all trials together")
    add("--price", **cost, help="cost of an hour of the machine that was timed")
    add("--from", dest="run", metavar="RUN", help="run folder to take measured figures from")
    add("--batch", type=int, choices=(1, 128), default=128, help="items at once in RUN's times")
    add("--value", help="value of the student in a RUN of selfkd.capacity")
    add("--unit", metavar="WORD", help="word for what is served: item, or that of RUN")
    add("--format", choices=("table", "json"), default="table")
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        plan, notes = _plan(arguments)
    except (ValueError, OSError) as error:
        print_error(str(error))
        return USAGE
    console, sentence = make_console(), describe_budget(plan, unit=arguments.unit)
    if arguments.format == "json":
        tree = {**asdict(plan), "unit": arguments.unit, "sentence": sentence, "notes": notes}
        return print_data(json.dumps(tree, indent=1) + "\n")
    console.print(make_budget_table(plan, unit=arguments.unit, per=arguments.per))
    print_lines(console, [sentence, *notes])
    return 0


def _plan(arguments: argparse.Namespace) -> tuple[Budget, list[str]]:
    """Return the budget of given figures over measured ones, and notes on it."""
    given: dict[str, Any] = {k: v for k, v in vars(arguments).items() if v is not None}
    figures: dict[str, Any] = {}
    unit, per = "item", 1.0
    if arguments.run is not None:
        figures = measured(arguments.run, batch=arguments.batch, value=arguments.value)
        unit, per = _served(arguments.run)
    arguments.unit = arguments.unit or unit
    arguments.per = per if arguments.per is None else arguments.per
    for cost, time in (("teacher", "teacher_ms"), ("student", "student_ms")):
        if cost in given:
            figures.pop(time, None)  # given figures replace measured ones
    if "training" in given or given.keys() & {"epochs", "trials"}:
        figures.pop("train_seconds", None)
    figures |= given
    timed = [name for name in MEASURED if name in figures]
    priced = [name for name in ("teacher", "student", "training") if name in given]
    for name in (*timed, "price"):
        _check_figure(f"--{name.replace('_', '-')}", figures.get(name))
    if timed and priced and "price" not in given:
        raise ValueError(
            f"--price, the cost of a machine's hour, must be given where costs "
            f"(--{priced[0]}) meet times (--{timed[0].replace('_', '-')})"
        )
    per, price = arguments.per, figures.get("price", 1.0)
    costs: dict[str, Any] = {}
    for cost, time in (("teacher", "teacher_ms"), ("student", "student_ms")):
        if time in figures and cost not in figures:
            costs[cost] = figures[time] / HOUR_MS * price * per
    if "train_seconds" in figures and "training" not in figures:
        costs["training"] = figures["train_seconds"] / 3600 * price
    figures = costs | figures
    for name in ("teacher", "student", "items"):
        if name not in figures:
            flags = [f"--{name}", *([f"--{name}-ms"] if name != "items" else [])]
            flags += [] if arguments.run else ["--from RUN"]
            why = f"{arguments.run} has none" if arguments.run else "no such figure is known"
            choice = " or ".join((", ".join(flags[:-1]), flags[-1])) if flags[1:] else flags[0]
            raise ValueError(f"{choice} must be given: {why}")
    names = ("teacher", "student", "items", "views", "training", "epochs", "trials", "volume")
    plan = budget(per=per, **{name: figures[name] for name in names if name in figures})
    return plan, _notes(timed, priced, "price" in given, arguments)


def _notes(
    timed: Sequence[str], priced: Sequence[str], has_price: bool, arguments: argparse.Namespace
) -> list[str]:
    notes = []
    if timed and not priced and not has_price:
        notes.append("costs are hours of the machine that was timed; --price gives them a price")
    if arguments.run is not None and "teacher_ms" in timed and arguments.teacher_ms is None:
        notes.append(
            f"times of {arguments.run}: one thread, {arguments.batch} at once; training is that "
            "of all trials of the student"
        )
    return notes


def _amount(value: float) -> str:
    """Return a cost: whole from 1,000 on, else four digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:,.4g}"


def _large(value: float) -> str:
    """Return a number in words from a million on.

    >>> _large(1.1579e9)
    '1.16 billion'
    """
    for name, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if size <= value < 1e15:
            return f"{value / size:.3g} {name}"
    return _whole(value) if value >= 100 else f"{value:.4g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value < 1e15 else f"{value:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
