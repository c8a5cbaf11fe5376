"""What a run keeps of its teacher's soft targets, for its report."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.config import Config, to_tree
from selfkd.execution.jobs import Beside, Job, Outcome, run_all
from selfkd.experiments.arms import Run
from selfkd.experiments.run_folder import TEACHER
from selfkd.results import Message, Model, TeacherTargets, from_row
from selfkd.storage.rows import load_row, save_row


def name_generation_teacher(kind: str, generation: int, models: int) -> str:
    """Return the name of the teacher of a generation.

    Args:
        kind: `distill.teacher`.
        generation: Number of the generation, at least 1.
        models: Number of its models.

    >>> name_generation_teacher("previous", 2, 1), name_generation_teacher("lineage", 2, 2)
    ('generation 1', 'generations 0 to 1')
    """
    before = generation - 1
    if models == 1:
        return f"generation {before}"
    if kind == "lineage":
        return f"generations 0 to {before}"
    return f"the best {models} models of generation {before}"


def name_members(source: str, models: int) -> str:
    """Return the name of a teacher that is made of members.

    Args:
        source: `members.source`.
        models: Number of its models.

    >>> name_members("members", 5), name_members("greedy_soup", 1)
    ('the ensemble of 5 members', 'the greedy soup of the members')
    """
    kind = source.replace("_", " ")
    if source == "members":
        return f"the ensemble of {models} members"
    return f"the {kind} ensemble of {models}" if models > 1 else f"the {kind} of the members"


def keep_teacher(
    run: Run, models: Sequence[Model], *, config: Config, teacher: str, students: str
) -> None:
    """Save what the soft targets of a teacher hold, unless it is known, or no logits are cached.

    Args:
        run: Run at work.
        models: Models of the teacher.
        config: Config of the students.
        teacher: Name of the teacher.
        students: Name of what is distilled from it.
    """
    found = teacher_beside(run, models, config=config, teacher=teacher, students=students)
    run_all(run.executor, [], beside=found)


def teacher_beside(
    run: Run, models: Sequence[Model], *, config: Config, teacher: str, students: str
) -> list[Beside]:
    """Return the job of `keep_teacher`, to be run beside others; none where there is none to do."""
    cached = run.function is None and config.reads_cache and config.distill.mode == "tokens"
    path, hashes = run.folder.path / TEACHER, tuple(model.hash for model in models)
    if not (models and cached):
        return []
    if path.exists():
        known = load_row(TeacherTargets, path)
        if (known.hashes, known.students) == (hashes, students):
            return []

    def take(outcome: Outcome) -> None:
        if outcome.error is not None:  # no reason to lose what was trained
            why = str(outcome.error).removeprefix("ValueError: ")
            run.events(Message(f"no soft targets for the report: {why}"))
            return
        row = {**outcome.row, "teacher": teacher, "students": students, "hashes": hashes}
        save_row(path, from_row(TeacherTargets, row))

    place = {"targets": str(run.folder.targets(config)), "teachers": run.rows(models)}
    return [Beside(Job("teacher_targets", {"config": to_tree(config), **place}), take)]


def keep_members(run: Run, models: Sequence[Model], *, config: Config, students: str) -> None:
    """Save what the soft targets of a teacher made of members hold; see `keep_teacher`."""
    run_all(run.executor, [], beside=members_beside(run, models, config=config, students=students))


def members_beside(
    run: Run, models: Sequence[Model], *, config: Config, students: str
) -> list[Beside]:
    """Return the job of `keep_members`, to be run beside others; none where there is none to do."""
    teacher = name_members(config.members.source, len(models))
    return teacher_beside(run, models, config=config, teacher=teacher, students=students)
