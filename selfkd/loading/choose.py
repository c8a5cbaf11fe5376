"""Which files of a run folder are its models: the one that is taken, an ensemble, all by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfkd import __version__
from selfkd.config import Config, DistillConfig, from_tree, load_yaml
from selfkd.errors import ConfigError
from selfkd.experiments.confirm import load_confirmations
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    FORMAT,
    CapacitySummary,
    EnsembleSummary,
    Facts,
    Members,
    Model,
    Point,
    SourceResult,
    StudySummary,
    best_generation,
)
from selfkd.storage.rows import load_row

LISTED = 8  # files in a message


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The model of a run, or the models of an ensemble."""

    title: str
    models: Sequence[Model]
    average: str | None = None
    """What of the models is averaged; None of a single model."""
    point: Point | None = None
    """Values of the search space that its trial had; None where nothing was searched for it."""
    generation: int | None = None
    given: bool = False
    """Whether it is a generation 0 that the run was given."""


def open_run(path: Path) -> tuple[RunFolder, Config, Facts | None]:
    """Return a run folder with its config and, once they are known, the facts of its data.

    Raises:
        ConfigError: It is no run folder, or one of another format.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"run must be a run folder (with a config.yaml), a folder that `save` has written or "
            f"a .safetensors file, got {path}"
        )
    tree = load_yaml(file)
    found = tree.pop("format", None) if isinstance(tree, dict) else None
    if found != FORMAT:
        raise ConfigError(
            f"{path} is of format {found}, and selfkd {__version__} reads format {FORMAT}: load it "
            "with the version that made it"
        )
    folder, facts = RunFolder(path), path / "data.json"
    config = from_tree(tree, dict.fromkeys(tree, str(file)))
    return folder, config, load_row(Facts, facts) if facts.exists() else None


def choose(
    folder: RunFolder,
    config: Config,
    *,
    generation: int | None = None,
    ensemble: bool = False,
    way: str = "load one by its file",
) -> Chosen:
    """Return which models of a run are loaded.

    Args:
        folder: Run folder.
        config: Its config.
        generation: Number of a generation; the best on validation when not given.
        ensemble: Whether all generations are averaged, or the teachers of an ensemble run's
            student.
        way: What to do with a run that has files of models, and chooses none of them.

    Raises:
        ConfigError: There is no such model, or not yet.
    """
    if generation is not None and ensemble:
        raise ConfigError(
            f"generation must not be given with ensemble=True, which is of all, got {generation}"
        )
    command = folder.command
    if command == "generations":
        return _of_generations(folder, config, generation, ensemble)
    if generation is not None:
        raise ConfigError(
            f"generation must be left out for {folder.path}, a run of selfkd.{command}, "
            f"got {generation}"
        )
    if command == "ensemble":
        return _teachers(folder, config) if ensemble else _student(folder, config)
    files = [f"\n  {path}  ({name})" for name, path in model_files(folder).items()]
    left = f"\n  and {len(files) - LISTED} more" if len(files) > LISTED else ""
    way = f"{way}:" if files else "its files are named once it is finished"
    raise ConfigError(
        f"{folder.path} is a run of selfkd.{command}, which chooses no model: {way}"
        f"{''.join(files[:LISTED])}{left}"
    )


def model_files(folder: RunFolder) -> dict[str, Path]:
    """Return the files of a run's models by their names, as far as they are done."""
    command, names = folder.command, dict[str, str]()
    if command == "generations":
        rows = (row for row in folder.results() if row.models)
        names = {f"generation {row.generation}": row.models[0].checkpoint for row in rows}
    elif command == "ensemble":
        members = folder.path / "members" / "result.json"
        names = {"student": "student.safetensors", "labels": "labels.safetensors"}
        if members.exists():
            trained = load_row(Members, members).members
            names |= {f"member {number}": row.checkpoint for number, row in enumerate(trained)}
    elif command == "capacity":
        if (curve := folder.summary(CapacitySummary)) is not None:
            names = {f"{curve.key} {size.value}": size.checkpoint for size in curve.sizes}
    elif command == "deploy":
        path = folder.path / "deploy" / "model.safetensors"
        names = {"model": folder.relative(path)}
    elif (study := folder.summary(StudySummary)) is not None:
        names = {
            f"{arm.name}, seed {row.number}": row.checkpoint
            for arm in study.arms
            for row in arm.runs
            if row.checkpoint
        }
    found = {name: folder.file(file) for name, file in names.items() if file}
    return {name: path for name, path in found.items() if path.exists()}


def _of_generations(
    folder: RunFolder, config: Config, generation: int | None, ensemble: bool
) -> Chosen:
    results = folder.results()
    if not results:
        raise ConfigError(
            f"{folder.path} must have a finished generation, got none yet: wait, or continue it "
            f"with python -m selfkd.generations --resume {folder.path}"
        )
    if empty := [result.generation for result in results if not result.models]:
        raise ConfigError(f"generation {empty[0]} of {folder.path} must have a model, got none")
    if ensemble:
        models = [result.models[0] for result in results]
        title = f"the ensemble of generations 0 to {len(results) - 1}"
        return Chosen(title=title, models=models, average="probabilities")
    if generation is None:
        confirmed = load_confirmations(config, folder, len(results))
        search = config.search
        generation = best_generation(
            results, confirmed, metric=search.metric, mode=search.mode
        ).generation
    if generation not in range(len(results)):
        raise ConfigError(
            f"generation must be one of the {len(results)} that are finished in {folder.path}, "
            f"0 to {len(results) - 1}, got {generation}"
        )
    result = results[generation]
    return Chosen(
        title=f"generation {generation}",
        models=result.models[:1],
        point=result.point if generation else None,
        generation=generation,
        given=result.origin is not None,
    )


def _student(folder: RunFolder, config: Config) -> Chosen:
    path = folder.path / "student.safetensors"
    if not path.exists():
        raise ConfigError(
            f"{folder.path} must have a student, got none yet: wait, continue it with python -m "
            f"selfkd.ensemble --resume {folder.path}, or load its teachers with ensemble=True"
        )
    summary = folder.summary(EnsembleSummary)
    point = None if summary is None else summary.chosen.point
    return Chosen(
        title="the student",
        models=[Model("" if summary is None else summary.chosen.hash, path.name)],
        point=point,
    )


def _teachers(folder: RunFolder, config: Config) -> Chosen:
    summary = folder.summary(EnsembleSummary)
    return choose_teachers(folder, config if summary is None else config.at(summary.chosen.point))


def choose_teachers(folder: RunFolder, config: Config) -> Chosen:
    """Return the teachers of a run of members: of `selfkd.ensemble` or `selfkd.capacity`.

    Args:
        folder: Run folder.
        config: Config of the students.

    Raises:
        ConfigError: There are none yet.
    """
    source, path = config.members.source, folder.path / "members" / "result.json"
    if source != "members":
        path = folder.path / "sources" / f"{source}.json"
    if not path.exists():
        raise ConfigError(
            f"{folder.path} must have its teachers ({source}), got none yet: wait, or continue it "
            f"with python -m selfkd.{folder.command} --resume {folder.path}"
        )
    models: Sequence[Model]
    if source == "members":
        rows = load_row(Members, path).members[: config.members.use]
        models = [Model(row.hash, row.checkpoint) for row in rows]
    else:
        models = load_row(SourceResult, path).teachers
    title = f"the ensemble of its teachers ({source})"
    return Chosen(title=title, models=models, average=config.distill.average)


def distill_of(config: Config, chosen: Chosen) -> DistillConfig | None:
    """Return how a chosen model was distilled; None of one trained on labels."""
    return None if chosen.point is None else config.at(chosen.point).distill
