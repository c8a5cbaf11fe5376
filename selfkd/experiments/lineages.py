"""Whole lineages: the chosen settings repeated from generation 0 on, with teachers of their own.

On fresh seeds alone every student has the run's own teacher: an interval then leaves out what
another teacher would have done. That of whole lineages covers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from selfkd.experiments.arms import Arm, Run
from selfkd.experiments.replicas import remove_students
from selfkd.experiments.run_folder import student_file, trial_folder
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import GenerationResult, Model, TrialResult
from selfkd.storage.rows import load_row


def in_lineages(run: Run, arm: Arm, result: GenerationResult) -> Arm:
    """Return a generation's setting with the teachers of each lineage, their logits cached.

    A lineage whose teacher could not be trained is left out.

    Args:
        run: Run at work.
        arm: Setting to replicate.
        result: The generation.
    """
    if not run.config.confirm.lineages or not result.generation:
        return arm
    done = _completed(run, arm.folder)
    models = {
        number: own
        for number, own in _models(run, result.generation).items()
        if number in done or all(run.folder.file(model.checkpoint).exists() for model in own)
    }
    waiting = [model for n, own in models.items() if n not in done for model in own]
    if waiting and run.function is None and run.config.reads_cache:
        prepare_teachers(run, waiting, of=arm.name.replace("-", " "))
    return replace(
        arm,
        teachers=lambda own, number: models[number],
        without=[n for n in range(len(run.seeds(arm))) if n not in models],
    )


def remove_teachers(run: Run, generation: int) -> None:
    """Remove the students of a generation whose successors are trained.

    Those of generation 0 stay, for controls that are added later; with `distill.teacher: lineage`
    all of them teach those that may follow.
    """
    if generation > 0 and run.config.distill.teacher == "previous":
        remove_students(replicas_folder(run, generation))


def replicas_folder(run: Run, generation: int) -> Path:
    """Return the folder of a generation's replicas."""
    return run.folder.generation(generation) / "confirm"


def _models(run: Run, generation: int) -> Mapping[int, Sequence[Model]]:
    """Return the teachers of a generation's students by the number of their lineage."""
    lineage = run.config.distill.teacher == "lineage"
    earlier = range(generation) if lineage else [generation - 1]
    each = [_completed(run, replicas_folder(run, number)) for number in earlier]
    return {
        number: [of_generation[number] for of_generation in each]
        for number in each[0]
        if all(number in of_generation for of_generation in each)
    }


def _completed(run: Run, folder: Path) -> Mapping[int, Model]:
    """Return the students of an arm's completed trials by their number."""
    found = {}
    for number in range(run.config.confirm.lineages):
        path = trial_folder(folder, number) / "result.json"
        trial = load_row(TrialResult, path) if path.exists() else None
        if trial is not None and trial.status == "completed":
            file = run.folder.relative(student_file(folder, number))
            found[number] = Model(trial.hash, file)
    return found
