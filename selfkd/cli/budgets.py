"""Budgets of the figures that are given to `selfkd.budget`, over those of a finished run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from selfkd.analysis.budget import OPERATIONS, PASSES, Budget, budget, check_figure
from selfkd.analysis.kept import describe_kept, size_kept
from selfkd.loading.costs import FinishedRun, figures_of, open_finished, trained_items
from selfkd.results import find_metric

HOUR_MS = 3_600_000.0
MEASURED = ("teacher_ms", "student_ms", "train_seconds")
PARAMETERS = ("teacher_params", "student_params")
DAYS = {"/s": 86_400.0, "/min": 1440.0, "/h": 24.0, "/day": 1.0, "": 1.0}
Figures = dict[str, Any]
"""Figures and flags by name."""


@dataclass(kw_only=True)
class Budgets:
    """Budgets of the figures that are given and of those of a run."""

    unit: str
    per: float
    points: str = "points"
    live: bool = False
    """Whether the teacher of a run runs at each training step."""
    plans: dict[str, Budget] = field(default_factory=dict)
    """By what their costs are: `cost` or `hours`, and `operations`."""
    notes: list[str] = field(default_factory=list)

    @property
    def shown(self) -> Figures:
        """Arguments of the table."""
        (of, plan), *more = self.plans.items()
        second = more[0][1] if more else None
        return {"plan": plan, "unit": self.unit, "per": self.per, "of": of} | {
            "operations": second,
            "points": self.points,
        }


def make_budgets(given: Figures) -> Budgets:
    """Return the budgets of given figures over those of a run, and notes on them.

    Args:
        given: Values of the flags that are given, by name.

    Raises:
        ConfigError: The run is not finished, or has no such student.
        ValueError: A figure is missing, not as it must be, or does not go with others.
    """
    given = dict(given)
    unit, per = "token" if "tokens" in given else "item", 1.0
    if "tokens" in given:
        if "items" in given:
            raise ValueError("--tokens must be given without --items, got both")
        check_figure("--tokens", given["tokens"])
        given["items"] = given["tokens"]
    for name in PARAMETERS:
        check_figure(f"--{name.replace('_', '-')}", given.get(name))
    if "rate" in given:
        given["rate"] = _a_day(given["rate"])
    run, figures = None, Figures()
    if "run" in given:
        run = open_finished(given["run"], value=given.get("value"))
        figures = figures_of(run, batch=given["batch"])
        unit, per = run.facts.unit.removesuffix("s"), 1e6 if run.facts.items_an_input > 1 else 1.0
    found = Budgets(unit=given.get("unit", unit), per=given.get("per", per))
    if run is not None:
        found.points = find_metric(run.facts.tested).unit or run.facts.metric
        found.live = run.config.distill.runs_teacher
    in_operations = _operations(given, figures, run, found)
    known = {"teacher", "student", "teacher_ms", "student_ms"}
    if in_operations and not known & {*given, *figures}:  # all that is given is in operations
        in_operations |= {
            name: given[name]
            for name in ("training", "teacher_training", "point_value")
            if name in given and given[name] is not True
        }
        if "training" in given:
            in_operations.pop("search", None)
    else:
        of, plan = _in_cost(given, figures, found)
        found.plans[of] = plan
        if in_operations and "point_value" in given:
            found.notes.append(f"the gap is weighed in {of} alone, not in operations")
    if in_operations:
        found.plans["operations"] = _budget(given, figures, in_operations, found)
    if "gap" in given and "point_value" not in given:
        found.notes.append("a gap costs nothing without --point-value, what a point is worth")
    if run is not None:
        found.notes += _notes(run)
    return found


def _budget(given: Figures, figures: Figures, costs: Figures, found: Budgets) -> Budget:
    """Return the budget of costs, and of the figures that are the same in all units."""
    names = ("items", "views", "epochs", "trials", "volume", "rate", "gap")
    shared = {name: (figures | given)[name] for name in names if name in figures | given}
    if given.get("teacher_training") is True and costs.get("teacher_training") is None:
        raise ValueError("--teacher-training must be given a cost: no run or size says what it is")
    counts = "teacher_training" in given
    return budget(**{**shared, **costs}, counts_teacher=counts, live=found.live)


def _a_day(text: str) -> float:
    """Return a rate in items a day.

    >>> _a_day("20/s"), _a_day("1e6")
    (1728000.0, 1000000.0)
    """
    match = re.fullmatch(r"\s*([^/\s]+)\s*(/\s*(?:s|min|h|day))?\s*", text)
    try:
        rate = float(match[1]) * DAYS["".join((match[2] or "").split())] if match else 0.0
        check_figure("--rate", rate)
    except ValueError:
        raise ValueError(
            "--rate must be a number of items a day above 0, or with /s, /min or /h in that time, "
            f"got {text}"
        ) from None
    return rate


def _in_cost(given: Figures, figures: Figures, found: Budgets) -> tuple[str, Budget]:
    """Return the budget in the unit of given costs, else in hours of the machine."""
    run, figures = given.get("run"), dict(figures)
    for cost, time in (("teacher", "teacher_ms"), ("student", "student_ms")):
        if cost in given:
            figures.pop(time, None)  # given figures replace measured ones
    if "training" in given or given.keys() & {"epochs", "trials"}:
        figures.pop("train_seconds", None)
    if "teacher_training" in given and given["teacher_training"] is not True:
        figures.pop("teacher_seconds", None)
    figures |= given
    timed = [name for name in MEASURED if name in figures]
    names = ("teacher", "student", "training", "teacher_training")
    priced = [name for name in names if given.get(name, True) is not True]
    for name in (*timed, "price"):
        check_figure(f"--{name.replace('_', '-')}", figures.get(name))
    if timed and priced and "price" not in given:
        raise ValueError(
            f"--price, the cost of a machine's hour, must be given where costs "
            f"(--{priced[0].replace('_', '-')}) meet times (--{timed[0].replace('_', '-')})"
        )
    per, price = found.per, figures.get("price", 1.0)
    costs: Figures = {"per": per}
    for cost in ("teacher", "student"):
        if cost in given:
            costs[cost] = given[cost]
        elif f"{cost}_ms" in figures:
            costs[cost] = figures[f"{cost}_ms"] / HOUR_MS * price * per
    if "training" in given:
        costs["training"] = given["training"]
    elif "train_seconds" in figures:
        costs["training"] = figures["train_seconds"] / 3600 * price
        if "search_seconds" in figures and "train_seconds" not in given:
            costs["search"] = figures["search_seconds"] / 3600 * price
    if given.get("teacher_training", True) is not True:
        costs["teacher_training"] = given["teacher_training"]
    elif "teacher_seconds" in figures and ("price" in given or not priced):
        costs["teacher_training"] = figures["teacher_seconds"] / 3600 * price
    if "point_value" in given:
        costs["point_value"] = given["point_value"]
    if found.live and "train_seconds" in figures and "training" not in given:
        costs["caching"] = 0.0  # which is within the seconds of the training
    _check_known({**figures, **costs}, given, found)
    in_hours = bool(timed) and not priced and "price" not in given
    if in_hours:
        found.notes.append(
            "costs are hours of the machine that was timed; --price gives them a price"
        )
    if run is not None and "teacher_ms" in timed and "teacher_ms" not in given:
        found.notes.append(
            f"times of {run}: one thread, {given['batch']} at once; training is that "
            "of all trials of the student"
        )
    return ("hours" if in_hours else "cost"), _budget(given, figures, costs, found)


def _check_known(figures: Figures, given: Figures, found: Budgets) -> None:
    """Check that costs of both models are known, and the number of items."""
    run = given.get("run")
    for name, other in (("teacher", "student"), ("student", "teacher"), ("items", "")):
        if name in figures:
            continue
        if name == "items":
            flags = ["--items"]
        else:
            flags = [f"--{name}", f"--{name}-ms"]
            flags += [] if other in figures else [f"--{name}-params"]
        flags += [] if run else ["--from RUN"]
        why = "; ".join([f"{run} has none", *found.notes]) if run else "no such figure is known"
        choice = " or ".join((", ".join(flags[:-1]), flags[-1])) if flags[1:] else flags[0]
        raise ValueError(f"{choice} must be given: {why}")


def _operations(
    given: Figures, figures: Figures, run: FinishedRun | None, found: Budgets
) -> Figures:
    """Return the costs in operations: of given sizes, else counted; empty where not known."""
    sizes = [name for name in PARAMETERS if name in given]
    if len(sizes) == 1:
        (other,) = set(PARAMETERS) - set(sizes)
        raise ValueError(
            f"--{other.replace('_', '-')} must be given with --{sizes[0].replace('_', '-')}"
        )
    if sizes:
        return _of_sizes(given, figures, found)
    return {} if run is None else _counted(given, run, found)


def _of_sizes(given: Figures, figures: Figures, found: Budgets) -> Figures:
    """Return operations of models of given sizes, two a parameter and item."""
    if "items" not in figures | given:
        raise ValueError("--items, --tokens or --from RUN must be given: no such figure is known")
    teacher, student = (OPERATIONS * given[name] for name in PARAMETERS)
    known = {"epochs": 1.0, "trials": 1.0} | figures | given
    found.notes.append(
        "operations: 2 a parameter and item predicted, 6 where it is trained"
        + ("" if "epochs" in figures | given else "; one epoch, as --epochs says no other number")
    )
    one = known["epochs"] * known["items"] * PASSES
    costs: Figures = {"teacher": teacher, "student": student, "epochs": known["epochs"]}
    if "teacher_training" in given:
        costs["teacher_training"] = one * teacher
    return costs


def _counted(given: Figures, run: FinishedRun, found: Budgets) -> Figures:
    """Return operations of a run's models, counted by torch; empty where it has none."""
    if run.facts.function is not None:
        found.notes.append(
            "operations are not counted of networks of your own, whose code is not in the run: "
            "--teacher-params and --student-params give their sizes"
        )
        return {}
    from selfkd.loading.operations import operations_of  # torch: where operations are counted

    try:
        counted = operations_of(run)
    except (ValueError, OSError, RuntimeError) as error:
        found.notes.append(f"operations are not counted: {' '.join(str(error).split())[:200]}")
        return {}
    costs: Figures = {"teacher": counted.teacher, "student": counted.student}
    all_items, chosen, of_teacher = trained_items(run)
    if given.keys() & {"epochs", "trials", "items"}:
        known = figures_of(run, batch=128) | given
        one = known.get("epochs", 1.0) * known["items"]
        all_items, chosen = known.get("trials", 1.0) * one, one
    costs["training"] = all_items * counted.student_step
    costs["search"] = max(all_items - chosen, 0.0) * counted.student_step
    if counted.teacher_step is not None and of_teacher:
        costs["teacher_training"] = of_teacher * counted.teacher_step
    if found.live:
        costs["caching"] = all_items * counted.teacher
    found.notes.append(
        "operations: those of matrix products, convolutions and attention, forward and backward, "
        "as torch counts them"
    )
    return costs


def _notes(run: FinishedRun) -> list[str]:
    """Return what is to be said of a run: what its student keeps, what is counted how."""
    sizes = [getattr(model, "parameters", None) for model in (run.student, run.teacher)]
    notes = [
        describe_kept(
            "the student",
            "the teacher",
            run.scores,
            run.teacher.metric(run.facts.tested),
            metric=run.facts.metric,
            size=size_kept(*sizes),
        )
    ]
    if not run.config.distill.runs_teacher and run.generations > 1:
        notes.append(
            f"the logits of the teacher of each of {run.generations} generations are cached"
        )
    return [note for note in notes if note]
