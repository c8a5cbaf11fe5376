"""Which models of a run folder are the teachers of which students, and where their logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfkd.config import Config
from selfkd.config.validate import MEMBERS
from selfkd.errors import ConfigError
from selfkd.experiments.confirm import load_confirmations
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.teacher_row import name_generation_teacher, name_members
from selfkd.loading.choose import choose_teachers
from selfkd.results import EnsembleSummary, Model, StudySummary, best_generation


@dataclass(frozen=True, kw_only=True)
class RunTeacher:
    """The teacher of some students of a run: a model, or the average of several."""

    title: str
    students: str
    models: Sequence[Model]
    config: Config
    """Config of the students."""


def find_teacher(
    folder: RunFolder, config: Config, *, generation: int | None = None, arm: str | None = None
) -> RunTeacher:
    """Return a teacher of a run.

    Args:
        folder: Run folder.
        config: Its config.
        generation: Generation whose teacher it is; the best born-again one on validation when not
            given.
        arm: Arm of a study whose teacher it is; the first that has one whose logits are cached when
            not given.

    Raises:
        ConfigError: There is no such teacher, or not yet, or its logits are never cached.
    """
    command = folder.command
    for flag, value, of in (("--generation", generation, "generations"), ("--arm", arm, "study")):
        if value is not None and command != of:
            raise ConfigError(
                f"{flag} is of runs of selfkd.{of}, got {value} and {folder.path}, a run of "
                f"selfkd.{command}"
            )
    if command == "generations":
        found = _of_generations(folder, config, generation)
    elif command in ("ensemble", "capacity"):
        found = _of_members(folder, config)
    elif command == "study":
        found = _of_study(folder, config, arm)
    else:
        raise ConfigError(
            f"RUN must have a teacher, got {folder.path}, a run of selfkd.{command}: give the run "
            "that its model is from"
        )
    distill, function = found.config.distill, folder.facts.function
    if function is not None:
        raise ConfigError(
            f"the teacher logits of {folder.path} are not cached: its training function, "
            f"{function}, runs its teachers itself"
        )
    if not found.config.reads_cache:
        why = "distill.live is true" if distill.live else "distill.terms compares layers"
        raise ConfigError(
            f"the teacher logits of {folder.path} are not cached: {why}, so that its teachers run "
            "at each step"
        )
    if distill.mode != "tokens":
        raise ConfigError(
            f"the teacher logits of {folder.path} are not cached: with distill.mode "
            f"{distill.mode} students read the text that teachers write"
        )
    return found


def _of_generations(folder: RunFolder, config: Config, generation: int | None) -> RunTeacher:
    results = folder.results()
    later = results[1:]
    if not later:
        raise ConfigError(
            f"{folder.path} must have a finished generation 1, got none yet: wait, or continue it "
            f"with python -m selfkd.generations --resume {folder.path}"
        )
    if generation is None:
        confirmed = load_confirmations(config, folder, len(results))
        metric, mode = config.search.metric, config.search.mode
        generation = best_generation(later, confirmed, metric=metric, mode=mode).generation
    if not 1 <= generation < len(results):
        none = "which has no teacher" if generation == 0 else f"of {len(later)}"
        raise ConfigError(f"--generation must be from 1 to {len(later)}, got {generation}, {none}")
    result = results[generation]
    kind, models = config.distill.teacher, len(result.teachers)
    return RunTeacher(
        title=name_generation_teacher(kind, generation, models),
        students=f"generation {generation}",
        models=result.teachers,
        config=config.at(result.point),
    )


def _of_members(folder: RunFolder, config: Config) -> RunTeacher:
    own, students = config, "the students"
    if folder.command == "ensemble":
        students = "the student"
        if (summary := folder.summary(EnsembleSummary)) is not None:
            own = config.at(summary.chosen.point)
    models = choose_teachers(folder, own).models
    title = name_members(own.members.source, len(models))
    return RunTeacher(title=title, students=students, models=models, config=own)


def _of_study(folder: RunFolder, config: Config, name: str | None) -> RunTeacher:
    arms = config.study.arms
    with_teachers = [each for each, arm in arms.items() if arm.teachers]
    if not with_teachers:
        raise ConfigError(f"{folder.path} must have an arm with a teacher, got none")
    if name is None:
        cached = (each for each in with_teachers if config.at(arms[each].set).reads_cache)
        name = next(cached, with_teachers[0])
    if name not in with_teachers:
        raise ConfigError(f"--arm must be one of {', '.join(with_teachers)}, got {name}")
    summary = folder.summary(StudySummary)
    if summary is None:
        raise ConfigError(
            f"{folder.path} must be finished, and is not yet: wait, or continue it with "
            f"python -m selfkd.study --resume {folder.path}"
        )
    arm, models = arms[name], list[Model]()
    runs = {row.name: row.runs for row in summary.arms}
    for teacher in arm.teachers:
        if teacher == MEMBERS:
            models += choose_teachers(folder, config).models
            continue
        first = next(iter(runs.get(teacher, ())), None)
        if first is None or first.checkpoint is None:
            raise ConfigError(f"arm {teacher} of {folder.path} must have a model, got none")
        models.append(Model(first.hash, first.checkpoint))
    return RunTeacher(
        title=" and ".join(arm.teachers),
        students=f"arm {name}",
        models=models,
        config=config.at(arm.set),
    )
