"""Confirmation of generations: each one's chosen setting, replicated on the same fresh seeds.

Teachers stay those of the run: what is confirmed is the setting, given its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from selfkd.analysis.verdicts import (
    format_difference,
    format_mean,
    is_better,
    metric_format,
)
from selfkd.config import Config
from selfkd.experiments.arms import Arm, Run, contrast, remove_students
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    Confirmation,
    ControlResult,
    GenerationConfirmed,
    GenerationResult,
    Replicated,
)
from selfkd.storage.rows import load_row, save_row

PATIENCE = 2  # generations in a row without evidence of a gain, after which `rounds: auto` stops


def confirm_generations(run: Run, results: Sequence[GenerationResult]) -> list[Confirmation]:
    """Confirm the generations that are not confirmed yet; return the confirmations of all.

    Each is kept as `confirmation.json` in its generation's folder. Where `student` differs from
    `model`, the difference to generation 0 is that to the student's own network from labels only.

    Raises:
        RunError: All trials of a generation's confirmation failed.
    """
    config, folder = run.config, run.folder
    if not config.confirm.seeds:
        return []
    waiting = [row for row in results if not _path(folder, row.generation).exists()]
    arms = [_arm(run, row) for row in waiting]
    own_network = config.student is not None and run.function is None and len(results) > 1
    baseline = _baseline_path(folder)
    if own_network and not baseline.exists():
        where, point = baseline.parent / "confirm", results[0].point
        arms.append(Arm(name="confirm_labels", folder=where, point=point))
    measured: list[Replicated] = []
    if arms:
        trials = run.replicate(arms)
        measured = run.measure(arms, trials, title="testing what was confirmed")
    if len(measured) > len(waiting):
        save_row(baseline, measured[-1])
    remove_students(baseline.parent / "confirm")
    by_generation = {row.generation: own for row, own in zip(waiting, measured, strict=False)}
    confirmations: list[Confirmation] = []
    for result in results:
        path = _path(folder, result.generation)
        if not path.exists():
            own = by_generation[result.generation]
            confirmation = _confirmation(run, result, own, confirmations)
            save_row(path, confirmation)
            run.events(GenerationConfirmed(confirmation))
        remove_students(path.parent / "confirm")  # here, as a kill may have come between
        confirmations.append(load_row(Confirmation, path))
    return confirmations


def labels_only(folder: RunFolder, confirmations: Sequence[Confirmation]) -> tuple[str, Replicated]:
    """Return what born-again generations are compared with: its name, and its measured arm."""
    path = _baseline_path(folder)
    if path.exists():
        return "the same network from labels only", load_row(Replicated, path)
    return "generation 0", confirmations[0]


def baseline_row(run: Run, confirmations: Sequence[Confirmation]) -> ControlResult | None:
    """Return the row of the student's own network from labels only, where it is another."""
    path = _baseline_path(run.folder)
    if not path.exists():
        return None
    measured = load_row(Replicated, path)
    title = f"{(run.config.student or run.config.model).name}, labels only"
    first, _ = contrast(measured, confirmations[0])
    verdict = f"{title}: {format_mean(measured.mean, len(measured.seeds))}"
    return ControlResult(
        **vars(measured), name="labels", title=title, first=first, verdicts=(verdict,)
    )


def load_confirmations(folder: RunFolder, generations: int) -> list[Confirmation]:
    """Return the confirmations of the first generations, as far as they are done."""
    paths = [_path(folder, generation) for generation in range(generations)]
    return [load_row(Confirmation, path) for path in paths if path.exists()]


def _path(folder: RunFolder, generation: int) -> Path:
    return folder.generation(generation) / "confirmation.json"


def _baseline_path(folder: RunFolder) -> Path:
    return folder.path / "labels" / "confirmation.json"


def _arm(run: Run, result: GenerationResult) -> Arm:
    generation = result.generation
    return Arm(
        name=f"confirm-{generation}",
        folder=run.folder.generation(generation) / "confirm",
        point=result.point,
        teachers=lambda own, number: result.teachers,
        network=lambda own, number: (own.student if generation else None) or own.model,
    )


def _confirmation(
    run: Run, result: GenerationResult, measured: Replicated, before: Sequence[Confirmation]
) -> Confirmation:
    generation = result.generation
    name, form = f"generation {generation}", metric_format(measured.metric)
    own = {**vars(measured), "generation": generation, "mcnemar": result.mcnemar}
    if not generation:
        verdict = f"{name}: {format_mean(measured.mean, len(measured.seeds), form=form)}"
        return Confirmation(**own, verdicts=(verdict,))
    previous, pairs = contrast(measured, before[-1])
    other, baseline = labels_only(run.folder, before)
    first, pairs_of_first = contrast(measured, baseline)
    verdicts = {}
    for what, found, of in (
        (f"generation {generation - 1}", previous, pairs),
        (other, first, pairs_of_first),
    ):
        if found is not None:
            verdicts[what] = run.compare(name, what, found, of)
    said = tuple(verdicts.values()) or (f"{name} shares no seed with another",)
    return Confirmation(**own, first=first, previous=previous, verdicts=said)


def stop_reason(config: Config, confirmations: Sequence[Confirmation]) -> str | None:
    """Return why `rounds: auto` stops after these generations, if it does.

    The choice to stop sees validation only: the test split is for what is reported.
    """
    metric, mode = config.search.metric, config.search.mode
    found = [contrast(row, before, key="validation") for before, row in pairwise(confirmations)]
    last = found[-PATIENCE:]
    if len(last) < PATIENCE or any(is_better(gain, mode=mode) for gain, _ in last):
        return None
    generation = len(confirmations) - 1
    gains = [
        f"generation {number} {format_difference(gain, form=metric_format(metric))}"
        for number, (gain, _) in enumerate(last, start=generation - PATIENCE + 1)
        if gain is not None
    ]
    return (
        f"stopped after generation {generation}: {PATIENCE} generations in a row without evidence "
        f"of a gain over the previous one ({metric}, {last[-1][1]}: {', '.join(gains)})"
    )
