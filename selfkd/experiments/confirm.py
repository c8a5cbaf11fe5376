"""Confirmation of generations: each one's chosen setting, trained again on the same fresh seeds.

Teachers stay those of the lineage: what is confirmed is the setting, given its teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from selfkd.analysis.verdicts import compare, is_better, percent, plain, tell, tell_mean
from selfkd.config import Config
from selfkd.execution.jobs import Executor
from selfkd.experiments.arms import Arm, ArmsListener, difference, measure, remove_students, retrain
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import Plan, generation_plan, located
from selfkd.results import Row
from selfkd.storage.files import load_json, save_json

PATIENCE = 2  # generations in a row without evidence of a gain, after which `rounds: auto` stops


class ConfirmListener(ArmsListener, Protocol):
    """Whoever wants to follow a confirmation as well as its arms."""

    def generation_confirmed(self, confirmation: Row) -> None:
        """A generation has been confirmed; also told of those done before a resume."""


def confirm_generations(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: ConfirmListener,
    results: Sequence[Row],
    *,
    function: str | None = None,
) -> list[Row]:
    """Confirm the generations that are not confirmed yet; return the confirmations of all.

    Each is kept as `confirmation.json` in its generation's folder: `seeds`, `test_accuracy` of
    each, their `mean`, the paired difference to generation 0 (`first`) and to the generation before
    (`previous`), `mcnemar` of the chosen model and its teacher, and the `verdict` in words. Where
    `student` differs from `model`, `first` is the difference to the student's own network from
    labels only.

    Args:
        config: of the run.
        folder: what is done.
        executor: runs the trials.
        listener: is told of everything.
        results: of the generations.
        function: reference of a training function of the user's own.

    Raises:
        RunError: all trials of a generation's confirmation failed.
    """
    if not config.confirm.seeds:
        return []
    missing = [row for row in results if not _path(folder, row["generation"]).exists()]
    arms = {f"confirm-{row['generation']}": _arm(config, folder, row, function) for row in missing}
    own_baseline = _has_own_baseline(config, results, function)
    baseline = _baseline_path(folder)
    if own_baseline and not baseline.exists():
        arms["labels"] = _baseline_arm(config, folder, results[0])
    measured: dict[str, Row] = {}
    if arms:
        trained = retrain(config, folder, executor, listener, list(arms.values()))
        found = measure(config, executor, listener, trained, function=function)
        measured = dict(zip(arms, found, strict=True))
    if "labels" in measured:
        save_json(baseline, measured["labels"])
        remove_students(baseline.parent / "confirm")
    confirmations: list[Row] = []
    for result in results:
        path = _path(folder, result["generation"])
        if not path.exists():
            row = measured[f"confirm-{result['generation']}"]
            row = _confirmation(config, folder, result, row, confirmations)
            save_json(path, row)
            remove_students(path.parent / "confirm")
            listener.generation_confirmed(row)
        confirmations.append(load_json(path))
    return confirmations


def labels_only(config: Config, folder: RunFolder, confirmations: Sequence[Row]) -> tuple[str, Row]:
    """Return what born-again generations are compared with: its name, and its measured arm."""
    path = _baseline_path(folder)
    if path.exists():
        return "the same network from labels only", load_json(path)
    return "generation 0", confirmations[0]


def baseline_row(config: Config, folder: RunFolder, confirmations: Sequence[Row]) -> Row | None:
    """Return the row of the student's own network from labels only, where it is another."""
    path = _baseline_path(folder)
    if not path.exists():
        return None
    row: Row = load_json(path)
    title = f"{(config.student or config.model).name}, labels only"
    said = tell_mean(row["mean"], len(row["seeds"]))
    first, _ = difference(row, confirmations[0])
    return {"name": "labels", "title": title, **row, "first": first, "verdict": f"{title}: {said}"}


def _has_own_baseline(config: Config, results: Sequence[Row], function: str | None) -> bool:
    return config.student is not None and function is None and len(results) > 1


def _baseline_path(folder: RunFolder) -> Path:
    return folder.path / "labels" / "confirmation.json"


def load_confirmations(folder: RunFolder, generations: int) -> list[Row]:
    """Return the confirmations of the first generations, as far as they are done."""
    paths = [_path(folder, generation) for generation in range(generations)]
    return [load_json(path) for path in paths if path.exists()]


def _path(folder: RunFolder, generation: int) -> Path:
    return folder.generation(generation) / "confirmation.json"


def _arm(config: Config, folder: RunFolder, result: Row, function: str | None) -> Arm:
    generation = result["generation"]
    plan = generation_plan(
        config,
        result["point"],
        generation=generation,
        seed=0,
        teachers=located(folder, result["teachers"]),
        function=function,
    )
    name, where = f"confirm-{generation}", folder.generation(generation) / "confirm"
    return Arm(name=name, folder=where, plan=plan)


def _baseline_arm(config: Config, folder: RunFolder, first: Row) -> Arm:
    """Return the student's network, trained as generation 0 was."""
    own = config.at(first["point"])
    plan = Plan(config=own, model=own.student or own.model, seed=0)
    return Arm(name="confirm_labels", folder=folder.path / "labels" / "confirm", plan=plan)


def _confirmation(
    config: Config, folder: RunFolder, result: Row, measured: Row, before: Sequence[Row]
) -> Row:
    generation, metric = result["generation"], measured.get("metric", "test_accuracy")
    name, form = f"generation {generation}", _form(metric)
    row = {"generation": generation, **measured, "first": None, "previous": None}
    row["mcnemar"] = result.get("mcnemar")
    if not generation:
        said = tell_mean(measured["mean"], len(measured["seeds"]), form=form)
        return {**row, "verdict": f"{name}: {said}"}
    mode = config.search.mode if "metric" in measured else "max"
    others = {"previous": (f"generation {generation - 1}", before[-1])}
    others["first"] = labels_only(config, folder, before)
    verdicts = {}
    for key, (other, of_other) in others.items():
        row[key], pairs = difference(measured, of_other)
        if row[key] is not None:
            verdicts[other] = compare(name, other, row[key], pairs, mode=mode, form=form)
    said = "; ".join(verdicts.values())
    return {**row, "verdict": said or f"{name} shares no seed with another"}


def _form(metric: str) -> Callable[[float], str]:
    return percent if "accuracy" in metric else plain


def stop_reason(config: Config, confirmations: Sequence[Row]) -> str | None:
    """Return why `rounds: auto` stops after these generations, if it does.

    The choice to stop sees validation only: the test split is for what is reported.
    """
    metric = config.search.metric
    found = []
    for before, row in pairwise(confirmations):
        found.append(difference(row, before, key="validation"))
    last = found[-PATIENCE:]
    if len(last) < PATIENCE or any(is_better(gain, mode=config.search.mode) for gain, _ in last):
        return None
    generation = len(confirmations) - 1
    told = [
        f"generation {number} {tell(gain, form=_form(metric))}"
        for number, (gain, _) in enumerate(last, start=generation - PATIENCE + 1)
        if gain is not None
    ]
    return (
        f"stopped after generation {generation}: {PATIENCE} generations in a row without evidence "
        f"of a gain over the one before ({metric}, {last[-1][1]}: {', '.join(told)})"
    )
