"""The born-again loop.

Generation 0 learns from labels; generation k from a teacher made of the generations before
(Furlanello et al., Born-Again Neural Networks, 2018, https://arxiv.org/abs/1805.04770).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from selfkd.config import Config, to_tree
from selfkd.config.space import Point
from selfkd.errors import ConfigError
from selfkd.execution.jobs import Executor, run_one
from selfkd.experiments.confirm import (
    ConfirmListener,
    baseline_row,
    confirm_generations,
    load_confirmations,
    stop_reason,
)
from selfkd.experiments.controls import run_controls
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import (
    Plan,
    Stage,
    generation_plan,
    label,
    located,
    make_proposer,
    ranked,
    run_stage,
    trial_seed,
)
from selfkd.results import OWN, Row
from selfkd.storage.files import link, load_json, save_json


class LineageListener(ConfirmListener, Protocol):
    """Whoever wants to follow a lineage as well as its stages."""

    def generation_finished(self, result: Row) -> None:
        """A generation has been chosen and measured; also told of those done before a resume."""


def born_again(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: LineageListener,
    *,
    function: str | None = None,
) -> list[Row]:
    """Train generation 0 and `config.rounds` born-again generations; finished ones are kept.

    With `rounds: auto` each is confirmed at once, and the last is the one after which
    `selfkd.experiments.confirm.stop_reason` gives a reason to stop.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.
        function: reference of a training function of the user's own, `path/file.py:name`.

    Returns:
        The result of each generation.

    Raises:
        ConfigError: the data or the models are not as the config says.
        RunError: all trials of a generation failed.
    """
    if function is None:
        checked = run_one(executor, "check", config=to_tree(config))
    else:
        checked = run_one(executor, "check_function", function=function)
    if "fault" in checked:
        raise ConfigError(checked["fault"])
    folder.keep(config, checked["facts"])
    results = folder.results()[: config.most_rounds + 1]
    for result in results:
        _prune(folder, result)  # a start that was killed may not have come to it
        listener.generation_finished(result)
    for confirmation in load_confirmations(folder, len(results)):
        listener.generation_confirmed(confirmation)
    auto = config.rounds == "auto"
    while not _is_last(config, folder, results):
        if not auto or not _is_unconfirmed(folder, results):
            result = _generation(config, folder, executor, listener, function, results)
            results.append(result)
            listener.generation_finished(result)
        if auto:
            confirm_generations(config, folder, executor, listener, results, function=function)
    return results


def complete(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: LineageListener,
    results: Sequence[Row],
    *,
    function: str | None = None,
) -> Row:
    """Do what is done once all generations are there: confirm them, measure the ensemble, controls.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.
        results: of the generations.
        function: reference of a training function of the user's own.

    Returns:
        The summary, which is saved as `summary.json`: `generations`, each with its `confirmation`,
        their `ensemble`, `controls`, and why `rounds: auto` `stopped`.

    Raises:
        RunError: all trials of a stage failed.
    """
    confirmations = confirm_generations(
        config, folder, executor, listener, results, function=function
    )
    ensemble = measure_ensemble(config, folder, executor, results)
    baseline = baseline_row(config, folder, confirmations)
    controls = run_controls(config, folder, executor, listener, results, confirmations)
    summary = {
        "generations": _rows(results, confirmations),
        "ensemble": ensemble,
        "controls": [*([baseline] if baseline else []), *controls],
        "stopped": stop_reason(config, confirmations) if config.rounds == "auto" else None,
    }
    save_json(folder.path / "summary.json", summary)
    return summary


def measure_ensemble(
    config: Config, folder: RunFolder, executor: Executor, results: Sequence[Row]
) -> Row | None:
    """Measure the ensemble of all generations, the average of their probabilities.

    Generations of a training function of the user's own have no predictions, and no ensemble.
    """
    if any("predictions" not in result for result in results):
        return None
    members = [
        {"hash": result["hash"], "predictions": str(folder.path / result["predictions"])}
        for result in results
    ]
    ensembles = [{"members": members}]
    row: Row = run_one(executor, "measure", config=to_tree(config), ensembles=ensembles)["rows"][0]
    return row


def finished(config: Config, folder: RunFolder) -> Row | None:
    """Return the summary of a run that has nothing left to do, else None."""
    results = folder.results()
    path = folder.path / "summary.json"
    if not path.exists() or not _is_last(config, folder, results):
        return None
    summary: Row = load_json(path)
    rows = summary["generations"]
    wanted = dict.fromkeys(config.controls)
    done = {row["name"] for row in summary["controls"]}
    confirmed = all(row["confirmation"] for row in rows) or not config.confirm.seeds
    same = [row["hash"] for row in rows] == [row["hash"] for row in results]
    return summary if same and confirmed and done >= set(wanted) else None


def _is_last(config: Config, folder: RunFolder, results: Sequence[Row]) -> bool:
    """Say whether no generation is to follow those that are done."""
    if len(results) > config.most_rounds:
        return True
    if config.rounds != "auto" or _is_unconfirmed(folder, results):
        return False
    return stop_reason(config, load_confirmations(folder, len(results))) is not None


def _is_unconfirmed(folder: RunFolder, results: Sequence[Row]) -> bool:
    return len(load_confirmations(folder, len(results))) < len(results)


def _rows(results: Sequence[Row], confirmations: Sequence[Row]) -> list[Row]:
    """Return what a program would want of the generations."""
    hidden = ("history", "models", "teachers", "diagnostics", "mcnemar")
    confirmed = {row["generation"]: row for row in confirmations}
    return [
        {k: v for k, v in result.items() if k not in hidden}
        | {"confirmation": confirmed.get(result["generation"])}
        for result in results
    ]


def _generation(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: LineageListener,
    function: str | None,
    results: Sequence[Row],
) -> Row:
    generation = len(results)
    start = time.perf_counter()
    teachers = _teachers(config, results)
    found = located(folder, teachers)
    if teachers and function is None and not config.distill.live:
        title = f"generation {generation}: labelling by its teacher"
        label(config, folder, executor, listener, title=title, teachers=found)
    last: Point = results[-1]["point"] if results else {}

    def plan(number: int, point: Point) -> Plan:
        return generation_plan(
            config,
            point,
            generation=generation,
            seed=trial_seed(config.seed, generation, number),
            teachers=found,
            function=function,
        )

    stage = Stage(
        name=f"generation-{generation}",
        title=f"generation {generation} of {config.most_rounds}",
        folder=folder.generation(generation),
        trials=config.search.trials,
        plan=plan,
        proposer=make_proposer(
            config,
            config.space(taught=generation > 0),
            seed=trial_seed(config.seed, generation, -1),
            last=last,
        ),
        early_stopping=True,
        metric=config.search.metric,
        mode=config.search.mode,
    )
    trials = run_stage(config, folder, executor, listener, stage)
    best_first = ranked(trials, stage)
    result = _chosen(config, folder, stage, generation, teachers, best_first)
    if function is None:
        result |= _measure(config, folder, executor, generation, found)
    else:
        result |= {k: v for k, v in best_first[0]["history"][-1].items() if k not in OWN}
    result |= {
        "trials": len(trials),
        "failed": sum(trial["status"] == "failed" for trial in trials.values()),
        "train_seconds": sum(trial["train_seconds"] for trial in trials.values()),
        "seconds": time.perf_counter() - start,
    }
    save_json(folder.generation(generation) / "result.json", result)
    _prune(folder, result)
    return result


def _teachers(config: Config, results: Sequence[Row]) -> list[Row]:
    """Return `hash` and `checkpoint` (within the run folder) of a generation's teachers."""
    if not results:
        return []
    if config.distill.teacher == "lineage":
        return [result["models"][0] for result in results]
    models: list[Row] = results[-1]["models"]
    return models


def _chosen(
    config: Config,
    folder: RunFolder,
    stage: Stage,
    generation: int,
    teachers: Sequence[Row],
    best_first: Sequence[Row],
) -> Row:
    """Put the best trial's student in its place; return what is known of it."""
    chosen = best_first[0]
    best = folder.generation(generation) / "student.safetensors"
    source = stage.trial(chosen["trial"]) / "student.safetensors"
    if source.exists():
        link(source, best)
    distill = config.at(chosen["point"]).distill
    kept = int(config.distill.teacher[4:]) if config.distill.teacher.startswith("top:") else 1
    models = [{"hash": chosen["hash"], "checkpoint": folder.relative(best)}] + [
        {
            "hash": trial["hash"],
            "checkpoint": folder.relative(stage.trial(trial["trial"]) / "student.safetensors"),
        }
        for trial in best_first[1:kept]
    ]
    metrics = (config.search.metric, "val_accuracy", "val_nll")
    return {
        "generation": generation,
        "trial": chosen["trial"],
        "point": chosen["point"],
        "temperature": distill.temperature if generation else None,
        "alpha": distill.alpha if generation else None,
        **{name: chosen[name] for name in metrics if name in chosen},
        "hash": chosen["hash"],
        "teachers": list(teachers),
        "models": models,
        "wanted_models": kept,
        "history": chosen["history"],
    }


def _measure(
    config: Config, folder: RunFolder, executor: Executor, generation: int, teachers: Sequence[Row]
) -> Row:
    """Measure the chosen student on the test split, once."""
    predictions = folder.generation(generation) / "predictions.safetensors"
    measured = run_one(
        executor,
        "score",
        config=to_tree(config),
        student=str(folder.generation(generation) / "student.safetensors"),
        predictions=str(predictions),
        teachers=teachers,
        diagnose=True,
    )
    return {**measured, "predictions": folder.relative(predictions)}


def _prune(folder: RunFolder, result: Row) -> None:
    """Remove the students that teach no one: the ledger keeps their results."""
    kept = {model["checkpoint"] for model in result["models"]}
    trials = folder.generation(result["generation"])
    for number in range(result["trials"]):
        student = trials / f"trial_{number:03d}" / "student.safetensors"
        if folder.relative(student) not in kept:
            student.unlink(missing_ok=True)
