"""What a finished run has measured of its costs: times, trainings, and how good its models are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    CapacitySummary,
    EnsembleSummary,
    Facts,
    GenerationResult,
    GenerationsSummary,
    Size,
    TableRow,
    TeacherRow,
    TrialResult,
    find_metric,
)
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row

KINDS: dict[str, type[CapacitySummary | EnsembleSummary | GenerationsSummary]] = {
    "ensemble": EnsembleSummary,
    "capacity": CapacitySummary,
    "generations": GenerationsSummary,
}
STAGES_OF_TEACHERS = ("members", "snapshots", "specialists")
"""Folders of the trials that make the teachers of an ensemble or a capacity run."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run with a student, and which of its models are teacher and student."""

    folder: RunFolder
    config: Config
    facts: Facts
    summary: CapacitySummary | EnsembleSummary | GenerationsSummary
    size: Size | None = None
    """Student of a capacity run."""
    students: tuple[GenerationResult, ...] = ()
    """Generations that had a teacher."""

    @property
    def teacher(self) -> TeacherRow | GenerationResult:
        """Teacher: the ensemble of a run's members, or its generation 0."""
        if isinstance(self.summary, GenerationsSummary):
            return self.summary.generations[0]
        return self.summary.teacher

    @property
    def student(self) -> TableRow | Size | GenerationResult:
        """Student: the distilled one, or the best generation that had a teacher."""
        if self.size is not None:
            return self.size
        if isinstance(self.summary, EnsembleSummary):
            return self.summary.rows[-1]
        best = isinstance(self.summary, GenerationsSummary) and self.summary.best
        return next((row for row in self.students if row.generation == best), self.students[-1])

    @property
    def generations(self) -> int:
        """Number of generations of students, each with the cached logits of its own teacher."""
        return max(1, len(self.students))

    @property
    def scores(self) -> tuple[float, ...]:
        """Test metric of the student, of each seed where it was trained on several."""
        student = self.student
        if isinstance(student, Size):
            return student.distilled.runs or (student.distilled.value,)
        if isinstance(student, TableRow) and student.runs:
            return student.runs
        value = student.metric(self.facts.tested)
        return () if value is None else (value,)

    @property
    def gap(self) -> float | None:
        """Score of the teacher less that of the student in points, or the other way round where
        less is better; None where it was not measured."""
        metric, of = find_metric(self.facts.tested), self.teacher.metric(self.facts.tested)
        if of is None or not self.scores:
            return None
        gap = (of - fmean(self.scores)) * (1 if metric.mode == "max" else -1)
        return 100 * gap if metric.is_fraction else gap

    @property
    def own_trials(self) -> list[TrialResult]:
        """Trials of the student; none of a capacity run, which keeps those of a search alone."""
        folders = [self.folder.generation(row.generation) for row in self.students]
        if isinstance(self.summary, EnsembleSummary):
            folders = [self.folder.path / "student"]
        return [trial for folder in folders for trial in _trials(folder)]

    @property
    def teacher_trials(self) -> list[TrialResult]:
        """Trials that made the teacher; none where it was given."""
        if isinstance(self.summary, GenerationsSummary):
            return _trials(self.folder.generation(0))
        stages = [self.folder.path / stage for stage in STAGES_OF_TEACHERS]
        return [trial for stage in stages for trial in _trials(stage)]

    @property
    def chosen_hash(self) -> str:
        """Hash of the student that was chosen of the trials; empty where it is not known."""
        if isinstance(self.summary, EnsembleSummary):
            return self.summary.chosen.hash
        return self.student.hash if isinstance(self.student, GenerationResult) else ""


def open_finished(run: str, *, value: str | None = None) -> FinishedRun:
    """Return a finished run whose costs are known.

    Args:
        run: Run folder of `selfkd.ensemble`, `selfkd.capacity` or `selfkd.generations`.
        value: Value of the student, in a capacity run.

    Raises:
        ConfigError: It is no finished run, or has no such student.
    """
    folder, config = RunFolder.open(as_path(run).expanduser(), flag="--from")
    try:
        kind, why = KINDS.get(folder.command), ""
    except (ValueError, OSError) as error:
        kind, why = None, f" ({error})"
    if kind is None:
        raise ConfigError(f"--from must be a run of selfkd.{', '.join(KINDS)}, got {run}{why}")
    if not (folder.path / "summary.json").exists():
        raise ConfigError(f"--from must be a finished run (with a summary.json), got {run}")
    facts, summary = folder.facts, load_row(kind, folder.path / "summary.json")
    found = FinishedRun(folder=folder, config=config, facts=facts, summary=summary)
    match summary:
        case EnsembleSummary(rows=()):
            raise ConfigError(
                f"--from must be a run with results, got {run}: its summary.json has none"
            )
        case GenerationsSummary():
            students = summary.generations[1:]
            if not students:
                raise ConfigError(
                    f"--from must be a run with a student, got {run}: it has no generation after "
                    "generation 0, which has no teacher"
                )
            return replace(found, students=students)
        case CapacitySummary():
            sizes = {str(size.value): size for size in summary.sizes}
            if value not in sizes:
                known = ", ".join(sizes) or "it has none"
                raise ConfigError(
                    f"--value must be one of the run's students ({known}), got {value}"
                )
            return replace(found, size=sizes[value])
    return found


def measured(run: str, *, batch: int = 128, value: str | None = None) -> dict[str, float]:
    """Return what a run has measured, as far as it has.

    Args:
        run: Run folder of `selfkd.ensemble`, `selfkd.capacity` or `selfkd.generations`.
        batch: Number of items that are predicted at once.
        value: Value of the student, in a capacity run.

    Returns:
        Some of `items` (of training and the transfer set), `views`, `epochs`, `trials`,
        `train_seconds` (of all trials of the student), `search_seconds` (of those that were not
        chosen), `teacher_seconds` (of the training of the teacher), `teacher_ms` and `student_ms`
        (for an item, on one thread), `gap` (in points).

    Raises:
        ConfigError: It is no finished run, or has no such student.
    """
    return figures_of(open_finished(run, value=value), batch=batch)


def figures_of(found: FinishedRun, *, batch: int) -> dict[str, float]:
    """Return what a finished run has measured, see `measured`."""
    config, facts = found.config, found.facts
    known: dict[str, float | None] = {}
    if not config.steps_by_part:
        known["epochs"] = config.train.epochs
    if "train" in facts.items:
        items = facts.items["train"] + facts.transfer
        known |= {"items": items, "views": facts.views * found.generations}
    known |= _of_training(found)
    known["teacher_seconds"] = sum(t.train_seconds for t in found.teacher_trials) or None
    for name, model in (("teacher", found.teacher), ("student", found.student)):
        ms = getattr(model, f"ms_{batch}", None)
        known[f"{name}_ms"] = None if ms is None else ms / facts.items_an_input
    known["gap"] = found.gap
    return {name: value for name, value in known.items() if value is not None}


def _of_training(found: FinishedRun) -> dict[str, float | None]:
    """Return number and seconds of the trainings of the student."""
    if (size := found.size) is not None:
        rest = (size.trials - 1) / size.trials if size.trials else 0.0
        seconds = size.train_seconds
        return {"trials": size.trials, "train_seconds": seconds, "search_seconds": rest * seconds}
    if found.students:
        trials = sum(row.trials for row in found.students)
        seconds = sum(row.train_seconds for row in found.students)
    else:
        trials = len(found.own_trials)
        seconds = sum(trial.train_seconds for trial in found.own_trials)
    chosen = {row.hash for row in found.students} | {found.chosen_hash}
    taken = [t.train_seconds for t in found.own_trials if t.hash and t.hash in chosen]
    search = max(seconds - sum(taken), 0.0) if taken else None
    return {
        "trials": trials or None,
        "train_seconds": seconds or None,
        "search_seconds": search,
    }


def _trials(folder: Path) -> list[TrialResult]:
    return [load_row(TrialResult, path) for path in sorted(folder.glob("trial_*/result.json"))]


def trained_items(found: FinishedRun) -> tuple[float, float, float]:
    """Return on how many items a run has trained: all its students, the chosen one, its teacher.

    An item counts each time that it was trained on. Of a teacher of several networks it is the
    mean of them.
    """
    config, facts, train = found.config, found.facts, found.config.train
    a_pass, steps = float(facts.items.get("train", 0)), config.steps_by_part
    if steps is not None:
        a_pass = float(steps * train.batch_size * train.accumulate * facts.items_an_input)
    of_students, transfer = a_pass, config.data.transfer
    if transfer is not None and facts.transfer:  # is added to the batches of students
        of_students = a_pass / (1 - transfer.weight)
    teachers = found.teacher_trials
    of_teacher = a_pass * _passes(teachers) / (1 if found.students else max(1, len(teachers)))
    if found.size is not None:
        chosen = of_students * train.epochs
        return chosen * found.size.trials, chosen, of_teacher
    hashes = {row.hash for row in found.students} | {found.chosen_hash}
    own = [trial for trial in found.own_trials if trial.hash and trial.hash in hashes]
    return of_students * _passes(found.own_trials), of_students * _passes(own), of_teacher


def _passes(trials: Sequence[TrialResult]) -> int:
    return sum(len(trial.history) for trial in trials)
