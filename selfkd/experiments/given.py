"""A generation 0 that is given: a file of weights, or the model of an earlier run.

It is one model. Where its training is known it is repeated on fresh seeds as that of any
generation; else nothing is known of other seeds, and nothing is said of them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfkd.analysis.verdicts import describe_other_data
from selfkd.config import SOURCE_ARGS, Config, ModelConfig, flat
from selfkd.errors import ConfigError
from selfkd.experiments.arms import Request, Run
from selfkd.experiments.confirm import load_confirmations
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import (
    STUDENT,
    EnsembleSummary,
    Facts,
    GenerationResult,
    Message,
    Model,
    Origin,
    Point,
    Row,
    best_generation,
    find_metric,
)
from selfkd.storage.files import fetch, link, retry_io
from selfkd.storage.remote import RemotePath, as_path
from selfkd.storage.rows import save_row
from selfkd.text import shell_quote

_TRAINING = ("data.", "train.", "distill.", "targets.top_k", "targets.samples", "write.")
"""Beginnings of the keys that decide how a model is trained."""
_ELSEWHERE = (
    *("data.root", "data.download", "data.in_memory", "data.workers", "distill.teacher"),
    *("data.transfer.root", "train.compile"),
)
"""Those among them that do not decide it."""
_OF_FILES = ("weights", "classes", "mean", "std")
SHOWN = 3  # keys in a message
LISTED = 8  # files in a message
CHANCE = 0.1  # of the way from chance to 1, below which an accuracy is said to be about as by it


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is to be generation 0."""

    title: str
    """Name of the model, such as `generation 2 of runs/a`."""
    file: Path
    point: Point
    """Settings of its training in which it differs from the config of its run."""
    teachers: Sequence[Path] = ()
    """Files of its own teachers."""
    unknown: str | None = None
    """Why its training cannot be repeated, if it cannot."""
    config: Config | None = None
    """Config of its run."""
    facts: Facts | None = None
    """Facts of the data of its run."""
    distilled: bool = False
    temperature: float | None = None
    alpha: float | None = None


def check_given(config: Config) -> None:
    """Check what can be known of a given generation 0 before anything starts.

    Raises:
        ConfigError: It is not there, or cannot be one.
    """
    given = config.generation_0
    if given.path is None:
        if named := [name for name in _OF_FILES if getattr(given, name) is not None]:
            raise ConfigError(f"generation_0.path must be given with generation_0.{named[0]}")
        return
    source = _find(config)
    if source.config is not None:
        if named := [name for name in _OF_FILES if getattr(given, name) is not None]:
            raise ConfigError(
                f"generation_0.{named[0]} must be of a file of weights, got the run {given.path}"
            )
    elif given.classes is not None and not Path(given.classes).is_file():
        raise ConfigError(f"generation_0.classes must be a file, got {given.classes}")
    if config.confirm.lineages and source.unknown is not None:
        raise ConfigError(_no_lineages(config, source.unknown))


def has_known_training(config: Config) -> bool:
    """Say whether the training of generation 0 can be repeated, as far as its config tells."""
    return config.generation_0.path is None or _find(config).unknown is None


def import_generation(run: Run) -> GenerationResult:
    """Import, evaluate and write down the model that is generation 0.

    Raises:
        ConfigError: It is not of these classes or of this network.
    """
    start, config, folder = time.perf_counter(), run.config, run.folder.generation(0)
    source = _find(config)
    save = folder / STUDENT
    files = [source.file, *source.teachers]
    saves = [save, *(folder / "teachers" / f"{n:03d}.safetensors" for n in range(len(files) - 1))]
    parts: list[Row] = [{"save": str(path)} for path in saves]
    if source.config is None:
        parts[0]["source"] = _checkpoint(config)
    else:
        for file, path in zip(files, saves, strict=True):
            link(file, path)
    rows = run.jobs("importing generation 0", "import_checkpoint", parts)
    for row, path, file in zip(rows, saves, files, strict=True):
        if "fault" in row:
            fault = row["fault"].replace(str(path), str(file))
            flag = "--checkpoint" if run.folder.command == "deploy" else "--from"
            raise ConfigError(f"{flag}: {fault}{_way_out(run, source)}")
    source = _with_facts(run, source, rows[0])
    for said in filter(None, _remarks(run, source, rows[0])):
        run.events(Message(said))
    if config.confirm.lineages and source.unknown is not None:
        raise ConfigError(_no_lineages(config, source.unknown))
    model, *teachers = (
        Model(row["hash"], run.folder.relative(path)) for row, path in zip(rows, saves, strict=True)
    )
    if teachers and config.reads_cache:
        prepare_teachers(run, teachers, of="generation 0")
    request = Request(model, teachers=teachers, diagnose=True)
    (found,) = run.evaluate([request], title="testing generation 0")
    result = GenerationResult(
        generation=0,
        trial=0,
        point=source.point,
        temperature=source.temperature,
        alpha=source.alpha,
        metrics=found.metrics,
        hash=model.hash,
        teachers=tuple(teachers),
        models=(model,),
        parameters=found.parameters,
        mcnemar=found.mcnemar,
        diagnostics=found.diagnostics,
        seconds=time.perf_counter() - start,
        origin=Origin(
            name=source.title,
            digest=_digest(source),
            unknown=source.unknown,
            other_data=not rows[0]["same_data"],
        ),
    )
    save_row(folder / "result.json", result)
    return result


def say_changes(run: Run, result: GenerationResult) -> None:
    """Say where what generation 0 was made of has changed since: the run keeps its copy."""
    if result.origin is None:
        return
    with suppress(OSError, ValueError):  # it may be gone
        source = _find(run.config)
        if (source.title, _digest(source)) != (result.origin.name, result.origin.digest):
            run.events(
                Message(
                    f"{run.config.generation_0.path} has changed since this run began, which keeps "
                    f"generation 0 as it was: {result.origin.name}"
                )
            )


# --- where it is from ---


def _find(config: Config) -> _Source:
    """Return what is given.

    Raises:
        ConfigError: It is no file of weights and no run with a model.
    """
    place = as_path(config.generation_0.path or "")
    if retry_io(place, (place / "config.yaml").is_file):
        source = _of_run(place, config)
        if not retry_io(source.file, source.file.exists):
            raise ConfigError(f"--from must be a run with its model, got none at {source.file}")
        return source
    if isinstance(place, RemotePath) or not place.is_file():
        raise ConfigError(
            "--from must be a file of weights or a run folder (with a config.yaml), got "
            f"{place}{_what_is_there(place)}"
        )
    unknown = "a file of weights says nothing of its training"
    return _Source(title=place.name, file=place, point={}, unknown=unknown)


def _what_is_there(place: Path | RemotePath) -> str:
    if isinstance(place, RemotePath):
        return ": a file in a bucket must be fetched first"
    if not place.is_dir():
        return ", which is not there"
    names = sorted(entry.name for entry in place.iterdir())
    more = f", … and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f", a folder of {', '.join(names[:LISTED])}{more}" if names else ", an empty folder"


def _of_run(place: Path, config: Config) -> _Source:
    folder, own = RunFolder.open(place, flag="--from")
    command, name = folder.command, place.name
    facts = folder.facts if (folder.path / "data.json").exists() else None
    if facts is not None and facts.function is not None:
        raise ConfigError(
            f"--from must be a run of networks that are made by name, got {place}, trained by a "
            "function of your own: give a file of its weights, whose network is model"
        )
    if command == "ensemble" and (summary := folder.summary(EnsembleSummary)) is not None:
        return _Source(
            title=f"the student of {name}",
            file=folder.path / STUDENT,
            point=summary.chosen.point,
            unknown="it is distilled from an ensemble",
            config=own,
            facts=facts,
            distilled=True,
            temperature=summary.chosen.temperature,
            alpha=summary.chosen.alpha,
        )
    results = folder.results() if command == "generations" else []
    if not results:
        why = "which has none yet" if command in ("generations", "ensemble") else f"of {command}"
        raise ConfigError(
            f"--from must be a run of generations or of an ensemble with a finished model, got "
            f"{place}, {why}: give a file of weights"
        )
    confirmed = load_confirmations(own, folder, len(results))
    search = own.search
    best = best_generation(results, confirmed, metric=search.metric, mode=search.mode)
    teachers = [folder.file(model.checkpoint) for model in best.teachers]
    source = _Source(
        title=f"generation {best.generation} of {name}",
        file=folder.file(best.models[0].checkpoint),
        point=best.point,
        teachers=teachers,
        config=own,
        facts=facts,
        distilled=bool(teachers),
        temperature=best.temperature,
        alpha=best.alpha,
    )
    unknown = best.origin.unknown if best.origin is not None else None
    unknown = unknown or next(_differences(source, config), None)
    if unknown is not None:  # nothing of its training is needed then
        return replace(source, unknown=unknown, teachers=[])
    return source


def _differences(source: _Source, config: Config) -> Iterator[str]:
    """Yield why a training cannot be repeated with another config."""
    assert source.config is not None  # noqa: S101 - of a run
    try:
        theirs, ours = (flat(each.at(source.point)) for each in (source.config, config))
    except ConfigError:
        yield "its settings are none of this run's"
        return
    other = [
        f"{key} {_short(theirs.get(key))}, here {_short(ours.get(key))}"
        for key in theirs
        if key.startswith(_TRAINING if source.distilled else _TRAINING[:2])
        and not key.startswith(_ELSEWHERE)
        and theirs.get(key) != ours.get(key)
    ]
    if other:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        yield f"its training differs: {'; '.join(other[:SHOWN])}{more}"
    if not all(file.exists() for file in source.teachers):
        yield "its own teacher is not in its run folder any more"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:40]}…"


def _checkpoint(config: Config) -> Mapping[str, Any]:
    """Return a file of weights as a `CheckpointConfig`."""
    given = config.generation_0
    return {
        "path": given.path,
        "model": config.model.name,
        "args": _own_args(config.model),
        **{name: getattr(given, name) for name in _OF_FILES},
    }


def _own_args(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of a network without those that say where weights come from."""
    return {key: value for key, value in model.args.items() if key not in SOURCE_ARGS}


def _with_facts(run: Run, source: _Source, row: Row) -> _Source:
    """Return a source with what is known once it is imported.

    Raises:
        ConfigError: Its network is not the config's.
    """
    if source.config is None:
        return source
    config, model = run.config, ModelConfig.of_checkpoint(row["model"])
    own = (config if source.unknown else config.at(source.point)).model
    if (own.name, _own_args(own)) != (model.name, model.args):
        wanted = json.dumps({"name": model.name, "args": model.args})
        raise ConfigError(
            f"model must be the network of {source.title}, got {own.name!r} with "
            f"{_own_args(own)}: --set {shell_quote(f'model={wanted}')}, and student for another "
            f"network of the later generations{_way_out(run, source)}"
        )
    here, there = run.folder.facts, source.facts
    same = there is not None and all(
        there.fingerprints.get(name) == here.fingerprints.get(name) for name in ("train", "val")
    )
    if source.unknown is None and not same:
        unknown = "it was trained on other images than this run's training split"
        return replace(source, unknown=unknown, point={}, teachers=[])
    return source if source.unknown is None else replace(source, point={})


def _way_out(run: Run, source: _Source) -> str:
    """Return the end of a message on a run that does not fit this run's config."""
    if source.config is None:
        return ""
    file = shell_quote(f"{run.config.generation_0.path}/config.yaml")
    return f"; --config {file} takes all its settings"


def _remarks(run: Run, source: _Source, row: Row) -> Iterator[str | None]:
    yield row["said"]
    alone = run.folder.command == "deploy"  # no generation follows
    name = source.title if alone else f"generation 0 ({source.title})"
    metric, classes = f"val_{run.folder.facts.metric}", run.folder.facts.outputs
    value = row["metrics"].get(metric)
    chance = 1 / classes if classes > 1 else 0.0
    low = find_metric(metric).is_fraction and value is not None
    if source.config is None and low and value < chance + CHANCE * (1 - chance):
        yield (
            f"{name} is right on {value:.1%} of validation, about as by "
            "chance: the order of its classes (generation_0.classes) or the normalisation of its "
            "inputs (generation_0.mean and std) may be another"
        )
    if not row["same_data"]:
        yield describe_other_data(name)
    if source.unknown is not None and not alone:
        yield f"{name} has one seed, as {source.unknown}"


def _no_lineages(config: Config, unknown: str) -> str:
    return (
        f"confirm.lineages must be 0 with --from {config.generation_0.path}, as {unknown}, so that "
        f"no lineage can begin with it, got {config.confirm.lineages}: --set confirm.lineages=0 "
        "replicates on confirm.seeds"
    )


def _digest(source: _Source) -> str:
    """Return a digest of the content of its file."""
    digest = hashlib.sha256()
    with fetch(source.file).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
