"""A run folder as typed rows: what is there, what is damaged, what is still to come."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfkd.config import from_tree, load_yaml
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import COMMANDS, EXAMPLES, TEACHER
from selfkd.reporting.rows import RowReader
from selfkd.results import (
    DEPLOYED,
    FORMAT,
    CapacitySummary,
    Confirmation,
    ControlResult,
    DeploySummary,
    Diagnostics,
    EnsembleSummary,
    Evaluation,
    Examples,
    Facts,
    GenerationResult,
    GenerationsSummary,
    Member,
    Members,
    StudySummary,
    TeacherTargets,
    TrialResult,
    Verdict,
    best_generation,
)
from selfkd.storage.files import read_text

Tree = Mapping[str, Any]
REPORT = "report.html"
ENVIRONMENT = "environment.json"
TRIALS = "trial_*/result.json"
SIDE_BY_SIDE: Mapping[str, tuple[str, type[Any]]] = {
    "capacity": ("capacity_summary", CapacitySummary),
    "study": ("study_summary", StudySummary),
}
STUDENTS = {"labels": "from labels only", "student": "from its teacher"}
DISTILL = "distill.temperature", "distill.alpha"


@dataclass(frozen=True)
class Generation:
    """A generation: its trials, and its result once it has one."""

    number: int
    trials: tuple[TrialResult, ...]
    result: GenerationResult | None = None
    diagnostics: Mapping[str, Diagnostics] = field(default_factory=dict)
    """Diagnostics by split, `val` and `test`."""
    confirmation: Confirmation | None = None
    name: str = ""
    """Name of a student of an ensemble, which is no generation."""

    @property
    def title(self) -> str:
        """Name in a text."""
        return self.name or f"generation {self.number}"

    @property
    def short(self) -> str:
        """Name in a column of generations."""
        return self.name or f"{self.number}"


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it.

    Args:
        path: Run folder.
        command: Name of the command that started it, one of `COMMANDS`.
        config: Content of its config.yaml.
        facts: Facts of its data, if they are known.
        starts: Environment of each start, the latest last.
        generations: Generations in order; the last may have no result yet.
        stages: Trials of a run of `ensemble`, by stage.
        further: Trials on fresh seeds and of controls.
        students: Students of a run of `ensemble`, with their diagnostics.
        members: Teachers of a run of `ensemble`, the best first.
        ensemble: Ensemble of all generations.
        controls: Controls of equal cost.
        stopped: Why it ended before its last round.
        verdict: Verdict on its generations.
        examples: Test items that tell generation 0 and the best later generation apart.
        teacher: What the soft targets of its teacher hold.
        ensemble_summary: Summary of a run of `ensemble`.
        capacity_summary: Summary of a run of `capacity`.
        study_summary: Summary of a run of `study`.
        deploy_summary: Summary of what was deployed of it.
        problems: Damaged files, each with what is wrong with it.
        missing: What it has not done yet; None of a finished run.
        label: Name where that of its folder is not enough.
    """

    path: Path
    command: str
    config: Tree
    facts: Facts | None
    starts: tuple[Tree, ...] = ()
    generations: tuple[Generation, ...] = ()
    stages: Mapping[str, tuple[TrialResult, ...]] = field(default_factory=dict)
    further: tuple[TrialResult, ...] = ()
    students: tuple[Generation, ...] = ()
    members: tuple[Member, ...] = ()
    ensemble: Evaluation | None = None
    controls: tuple[ControlResult, ...] = ()
    verdict: Verdict | None = None
    stopped: str | None = None
    examples: Examples | None = None
    teacher: TeacherTargets | None = None
    ensemble_summary: EnsembleSummary | None = None
    capacity_summary: CapacitySummary | None = None
    study_summary: StudySummary | None = None
    deploy_summary: DeploySummary | None = None
    problems: tuple[str, ...] = ()
    missing: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Name: that of its folder, or its label where others have the same."""
        return self.label or self.path.name

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.missing is None

    @property
    def results(self) -> tuple[GenerationResult, ...]:
        """The results of the finished generations."""
        return tuple(g.result for g in self.generations if g.result is not None)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more of the metric is better, or less."""
        return "min" if self.get("search.mode") == "min" else "max"

    @property
    def best(self) -> GenerationResult | None:
        """The generation that is best on validation."""
        return self._best(self.results)

    @property
    def pair(self) -> list[Generation]:
        """The first finished generation, and the best later one on validation."""
        done = [generation for generation in self.generations if generation.result is not None]
        best = self._best(self.results[1:])
        return [g for place, g in enumerate(done) if not place or g.result is best]

    def _best(self, results: Sequence[GenerationResult]) -> GenerationResult | None:
        rows = [g.confirmation for g in self.generations if g.confirmation is not None]
        if not results:
            return None
        return best_generation(results, rows, metric=self.metric, mode=self.mode)

    @property
    def metric(self) -> str:
        """Name of the metric that the best trial is chosen by."""
        return str(self.get("search.metric", "val_accuracy"))

    @property
    def data(self) -> Facts:
        """Facts of its data; of images, where they are not known."""
        return self.facts or Facts()

    @property
    def trained(self) -> int:
        """Number of models that were trained, in whole or in part."""
        of_stages = sum(len(trials) for trials in self.stages.values())
        of_generations = sum(len(generation.trials) for generation in self.generations)
        return of_stages + of_generations + len(self.further)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the config by its dotted key."""
        value: Any = self.config
        for word in key.split("."):
            if not isinstance(value, Mapping) or word not in value:
                return default
            value = value[word]
        return value

    @property
    def student_names(self) -> list[str]:
        """Names of the students' networks that are given, in the order of their generations."""
        given = self.get("student")
        each = given if isinstance(given, list) else [given]
        return [str(model.get("name", "")) for model in each if isinstance(model, Mapping)]

    def setting(self, trial: TrialResult) -> tuple[float, float] | None:
        """Return T and alpha of a trial; None where they are damaged, or have no meaning."""
        values = [trial.point.get(key, self.get(key)) for key in DISTILL]
        known = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if not known or values[0] <= 0 or self.get("distill.mode") == "traces":
            return None
        return float(values[0]), float(values[1])

    def searched(self, key: str) -> list[float]:
        """Return the ends of the range that a key was searched in, or its choices."""
        try:
            domain = from_tree(dict(self.config)).space(with_teacher=True).get(key)
        except ConfigError:  # damaged, or of another format
            return []
        values = () if domain is None else domain.values
        return [float(value) for value in values if isinstance(value, int | float)]

    def class_name(self, label: int | str) -> str:
        """Return the name of a class, its number where it has none."""
        if isinstance(label, str):
            return label
        names = self.facts.names if self.facts is not None else ()
        if 0 <= label < len(names):
            return names[label]
        return str(label)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Args:
        path: Run folder; the run may be finished, stopped or going on.

    Returns:
        What is there; what is damaged is named in `problems` and omitted.

    Raises:
        ConfigError: It is no run folder, or has no result yet.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"RUN must be a run folder (with a config.yaml), got {path}")
    started = _started(path)
    if started not in COMMANDS:
        names = ", ".join(COMMANDS)
        raise ConfigError(f"RUN must be of selfkd.{names}, got {path / 'command'}: {started!r}")
    run = _Reader(path.absolute()).run()
    found = (run.generations, run.stages, run.capacity_summary, run.study_summary)
    if not (any(found) or run.deploy_summary):
        damaged = "".join(f"\n  {problem}" for problem in run.problems)
        raise ConfigError(
            f"RUN must have a result, got {path}, where no trial has ended yet{damaged}"
        )
    return run


def _started(path: Path) -> str:
    """Return the name of the command that started a run."""
    command = path / "command"
    return read_text(command).strip()[:20] if command.is_file() else "generations"


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = RowReader(path)
        self._problems = self._rows.problems

    def run(self) -> Run:
        path = self._path
        started = _started(path)
        config = self._config()
        facts = self._rows.row(Facts, "data.json")
        starts = self._rows.load(path / ENVIRONMENT)
        if started in SIDE_BY_SIDE:
            own = self._side_by_side(*SIDE_BY_SIDE[started])
        elif started == "deploy":
            own = {"further": tuple(self._all_trials())}
        else:
            own = self._ensemble() if started == "ensemble" else self._born_again(config)
        deployed = self._deployed()
        if started == "deploy":
            own["missing"] = None if deployed else "nothing is deployed yet"
        return Run(
            path=path,
            command=started,
            config=config,
            facts=facts,
            starts=tuple(row for row in starts if isinstance(row, dict))
            if isinstance(starts, list)
            else (),
            deploy_summary=deployed,
            teacher=self._rows.row(TeacherTargets, TEACHER),
            problems=tuple(self._problems),
            **own,
        )

    def _deployed(self) -> DeploySummary | None:
        found = self._rows.row(DeploySummary, DEPLOYED)
        if found is None or found.rows:
            return found
        self._problems.append(f"{self._path / DEPLOYED} is damaged: rows must not be empty")
        return None

    def _config(self) -> Tree:
        path = self._path / "config.yaml"
        try:
            tree: Any = load_yaml(path)
        except (ValueError, OSError) as error:
            self._problems.append(f"{path} is damaged: {error}")
            return {}
        if not isinstance(tree, dict):
            self._problems.append(f"{path} is damaged: it must be a mapping")
            return {}
        found = tree.get("format")
        if found != FORMAT:
            self._problems.append(f"{path} must be of format {FORMAT}, got {found}")
        return {key: value for key, value in tree.items() if key != "format"}

    # --- born-again generations ---

    def _born_again(self, config: Tree) -> dict[str, Any]:
        generations = tuple(self._generations())
        summary = self._rows.row(GenerationsSummary, "summary.json")
        done = sum(generation.result is not None for generation in generations)
        whole = summary is not None and 0 < done == len(summary.generations)
        found = summary if summary is not None and whole else GenerationsSummary(generations=())
        missing = _missing(config, generations, done=done, whole=whole, stopped=found.stopped)
        return {
            "generations": generations,
            "further": tuple(self._further()),
            "ensemble": found.ensemble,
            "controls": found.controls,
            "verdict": found.verdict,
            "stopped": found.stopped,
            "examples": self._rows.row(Examples, EXAMPLES),
            "missing": missing,
        }

    def _generations(self) -> Iterator[Generation]:
        for folder in sorted(self._path.glob("generation_*")):
            number = re.fullmatch(r"generation_(\d+)", folder.name)
            if number is None:
                continue
            result = self._rows.row(GenerationResult, f"{folder.name}/result.json")
            trials = tuple(self._trials(folder))
            if result is None and not trials:
                continue
            yield Generation(
                number=int(number[1]),
                trials=trials,
                result=result,
                diagnostics={} if result is None else result.diagnostics,
                confirmation=self._confirmation(f"{folder.name}/confirmation.json"),
            )

    def _confirmation(self, name: str) -> Confirmation | None:
        found = self._rows.row(Confirmation, name)
        if found is not None and len(found.values) != len(found.seeds):
            counts = f"{len(found.values)} and {len(found.seeds)}"
            path = self._path / name
            self._problems.append(
                f"{path} is damaged: values must be as many as seeds, got {counts}"
            )
            return None
        return found

    def _further(self) -> Iterator[TrialResult]:
        """Yield the trials that no generation chose among."""
        places = sorted(self._path.glob("generation_*/confirm/"))
        for root in ("labels", "controls", "deploy"):
            places += sorted({path.parent.parent for path in (self._path / root).rglob(TRIALS)})
        for place in places:
            yield from self._trials(place)

    def _trials(self, folder: Path) -> Iterator[TrialResult]:
        for path in sorted(folder.glob(TRIALS)):
            trial = self._rows.row(TrialResult, str(path.relative_to(self._path)))
            if trial is not None:
                yield trial

    # --- many teachers, one student ---

    def _ensemble(self) -> dict[str, Any]:
        stages = {
            folder.name: trials
            for folder in sorted(self._path.iterdir())
            if folder.is_dir() and (trials := tuple(self._trials(folder)))
        }
        members = self._rows.row(Members, "members/result.json")
        summary = self._rows.row(EnsembleSummary, "summary.json")
        if summary is not None and not summary.rows:
            self._problems.append(
                f"{self._path / 'summary.json'} is damaged: rows must not be empty"
            )
            summary = None
        return {
            "stages": stages,
            "further": tuple(self._all_trials(*(self._path / name for name in stages))),
            "students": tuple(self._students(summary)),
            "members": members.members if members is not None else (),
            "ensemble_summary": summary,
            "missing": None if summary else f"no summary yet, {self._count(stages)}",
        }

    def _side_by_side(self, name: str, kind: type[Any]) -> dict[str, Any]:
        """Return the summary of sizes or arms, and all trials."""
        found = self._rows.row(kind, "summary.json")
        trials = tuple(self._all_trials())
        missing = None if found else f"no summary yet, {len(trials)} trials done"
        return {name: found, "further": trials, "missing": missing}

    def _all_trials(self, *known: Path) -> Iterator[TrialResult]:
        """Yield the trials of all folders but those that are known."""
        places = {place.parent.parent for place in self._path.glob(f"**/{TRIALS}")}
        for place in sorted(places - set(known)):
            yield from self._trials(place)

    def _students(self, summary: EnsembleSummary | None) -> Iterator[Generation]:
        for number, (key, title) in enumerate(STUDENTS.items()):
            known = summary.diagnostics.get(key) if summary is not None else None
            if known:
                yield Generation(number=number, trials=(), diagnostics=known, name=title)

    def _count(self, stages: Mapping[str, tuple[TrialResult, ...]]) -> str:
        counts = ", ".join(f"{len(rows)} of {name}" for name, rows in stages.items())
        return f"trials done: {counts or 'none'}"


def _missing(
    config: Tree, generations: tuple[Generation, ...], *, done: int, whole: bool, stopped: Any
) -> str | None:
    """Return what a lineage has not done yet; None where nothing is left."""
    rounds = config.get("rounds")
    wanted = rounds + 1 if type(rounds) is int else None
    if whole and (stopped or wanted is None or done >= wanted):
        return None
    search = config.get("search")
    trials = search.get("trials") if isinstance(search, dict) else None
    text = f"{done}{f' of {wanted}' if wanted else ''} generations done"
    if unmade := [generation for generation in generations if generation.result is None]:
        last = unmade[-1]
        of = f" of {trials}" if isinstance(trials, int) else ""
        return f"{text}, {len(last.trials)}{of} trials of generation {last.number}"
    return text
