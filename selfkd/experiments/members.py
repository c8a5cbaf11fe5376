"""Members: models that are trained on labels or come from elsewhere, and what they make to teach.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from selfkd.config import Config, ModelConfig, Source
from selfkd.config.space import Distribution
from selfkd.config.tasks import tries_teachers
from selfkd.config.validate import no_generations
from selfkd.errors import ConfigError
from selfkd.experiments.arms import Arm, Run
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import trial_seed
from selfkd.experiments.teachers import prepare_teachers, sum_written
from selfkd.results import (
    TIE,
    Evaluation,
    Facts,
    Member,
    Members,
    Message,
    Model,
    Parts,
    Row,
    SourceResult,
    TeacherRow,
    Written,
)
from selfkd.storage.files import link
from selfkd.storage.remote import RemotePath, as_path
from selfkd.storage.rows import load_row, save_row

SPECIALISTS_CLASSES = 20  # fewer are too few to make groups that are worth a network each
T = TypeVar("T")


@dataclass(frozen=True)
class Teachers:
    """The teachers of a run."""

    members: Sequence[Member]
    """The best on validation first."""
    sources: Mapping[Source, Sequence[Model]]
    """What is made of them."""
    written: Mapping[str, Written] = field(default_factory=dict)
    """By the hash of a teacher what it has written, where students are trained on text."""

    def of(self, config: Config, number: int = 0) -> Sequence[Model]:
        """Return the teachers of a student's config."""
        models = self.sources[config.members.source]
        return models[: config.members.use] if config.members.source == "members" else models

    def row(self, config: Config, evaluation: Evaluation, cost: Row) -> TeacherRow:
        """Return the summary's row of the teachers of a student's config."""
        source, models = config.members.source, self.of(config)
        written = [self.written[model.hash] for model in models if model.hash in self.written]
        return TeacherRow(
            source=source,
            members=len(models),
            written=sum_written(written) if written else None,
            metrics=evaluation.metrics,
            **cost,
        )


def make_teachers(run: Run) -> Teachers:
    """Make the teachers of a run and cache their logits; what is done is kept.

    Raises:
        ConfigError: The data, the models or the members are not as the config says.
        RunError: All trials of a stage failed.
    """
    facts = run.check(teachers=trained_networks(run.config))
    run.folder.keep(run.config, facts)
    imported = _imported(run)
    if imported and tries_teachers(run.config):
        run.check(run.config, teachers=[Model(row.hash, row.checkpoint) for row in imported])
    check_sources(run.config, facts, len(imported))
    members = _once(run, Members, "members/result", lambda: _members(run, imported)).members
    teachers = Teachers(members, _sources(run, members, facts))
    if not run.config.reads_cache:
        return teachers
    return replace(teachers, written=prepare_teachers(run, _may_teach(run.config, teachers)))


def trained_networks(config: Config) -> list[ModelConfig]:
    """Return the networks of the members that a run trains."""
    return (config.members.models or [config.model]) if config.members.trained() else []


def check_members(config: Config) -> None:
    """Check what can be known of members from elsewhere before anything starts.

    Raises:
        ConfigError: One is not there, or a run is given twice.
    """
    for fault in no_generations(config):
        raise ConfigError(fault)
    given: dict[str, str] = {}
    for run in config.members.runs:
        find_members(run)
        folder = as_path(run)
        place = str(folder if isinstance(folder, RemotePath) else folder.resolve())
        if place in given:
            raise ConfigError(f"--from must be different runs, got {given[place]} again as {run}")
        given[place] = run
    for file in config.members.checkpoints:
        for path in (file.path, file.classes):
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"members.checkpoints must be files, got {path}")


def find_members(run: str) -> list[Path]:
    """Return the checkpoints of an earlier run's models: its generations', or its members'.

    Raises:
        ConfigError: It has none.
    """
    folder, _ = RunFolder.open(as_path(run), flag="--from")
    made = folder.path / "members" / "result.json"
    if made.exists():
        names = [row.checkpoint for row in load_row(Members, made).members]
    else:
        names = [model.checkpoint for result in folder.results() for model in result.models[:1]]
    found = [folder.file(name) for name in names]
    if not found or not all(path.exists() for path in found):
        raise ConfigError(f"--from must be a run with a finished generation or members, got {run}")
    return found


def _once(run: Run, kind: type[T], name: str, make: Callable[[], T]) -> T:
    """Return what an earlier start has made, else make it and write it down."""
    path = run.folder.path / f"{name}.json"
    if not path.exists():
        save_row(path, make())
    return load_row(kind, path)


# --- the members ---


def _imported(run: Run) -> list[Member]:
    """Import the models that were trained elsewhere."""
    members, folder = run.config.members, run.folder.path / "members"
    parts: list[dict[str, Any]] = []
    found = [path for name in members.runs for path in find_members(name)]
    for number, source in enumerate(found):
        save = folder / f"run_{number:03d}.safetensors"
        if not save.exists():
            link(source, save)
        parts.append({"save": str(save)})
    for number, checkpoint in enumerate(members.checkpoints):
        save = folder / f"file_{number:03d}.safetensors"
        parts.append({"save": str(save), "source": asdict(checkpoint)})
    if not parts:
        return []
    rows = run.jobs("importing members", "import_checkpoint", parts)
    places = [*map(str, found), *(file.path for file in members.checkpoints)]
    faults = [
        row["fault"].replace(part["save"], place)
        for row, part, place in zip(rows, parts, places, strict=True)
        if "fault" in row
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    for row in rows:
        if row["said"]:
            run.events(Message(row["said"]))
    other = sum(not row["same_data"] for row in rows)
    if other:
        run.events(
            Message(
                f"{other} of the {len(rows)} members from elsewhere were trained on other data "
                "than this run's training split: where it was in this run's validation or test "
                "split, their metrics are optimistic"
            )
        )
    return [
        Member(
            hash=row["hash"],
            checkpoint=run.folder.relative(as_path(part["save"])),
            model=row["model"],
            metrics=row["metrics"],
        )
        for row, part in zip(rows, parts, strict=True)
    ]


def _members(run: Run, imported: Sequence[Member]) -> Members:
    """Train the members; return all, the best on validation first."""
    config, trained = run.config, list[Member]()
    wanted = config.members.trained()
    if wanted:
        models = config.members.models or [config.model]
        starts = [trial_seed(config.seed, "members/start", n) for n in range(len(models))]
        same = config.members.same_init
        arm = Arm(
            name="members",
            folder=run.folder.path / "members",
            network=lambda own, number: models[number % len(models)],
            options=lambda n: {"start": {"seed": starts[n % len(models)]}} if same else {},
            seeds=[trial_seed(config.seed, "members", number) for number in range(wanted)],
        )
        (trials,) = run.replicate([arm], title="members on labels")
        for trial in trials:
            model = models[trial.trial % len(models)]
            network = {"name": model.name, "args": model.args}
            metrics = {k: v for k, v in trial.metrics.items() if k.startswith("val_")}
            own = arm.model(run, trial)
            trained.append(
                Member(hash=own.hash, checkpoint=own.checkpoint, model=network, metrics=metrics)
            )
    sign = -1 if config.search.mode == "max" else 1

    def rank(member: Member) -> tuple[float, float]:
        value, nll = sign * member.metrics[config.search.metric], member.metrics.get(TIE, 0.0)
        return math.inf if math.isnan(value) else value, math.inf if math.isnan(nll) else nll

    return Members(members=tuple(sorted([*trained, *imported], key=rank)))


def check_sources(config: Config, facts: Facts, imported: int) -> None:
    """Check that what is to teach can be made of the members on this data.

    Args:
        config: Config of the run.
        facts: Facts of the data.
        imported: Number of members that were trained elsewhere.

    Raises:
        ConfigError: There are too few members, epochs or classes.
    """
    members = config.members
    found = imported + members.trained()
    most = max([members.use or 0, *_choices(config, "members.use")])
    cycles, wanted = max(2, found), _wanted(config)
    if most > found:
        raise ConfigError(f"members.use must be at most {found}, the members, got {most}")
    if "snapshots" in wanted and cycles > config.train.epochs:
        raise ConfigError(
            f"train.epochs must be at least {cycles} for as many snapshots as members, "
            f"got {config.train.epochs}"
        )
    if "specialists" in wanted and facts.outputs < SPECIALISTS_CLASSES:
        raise ConfigError(
            f"members.source must not be specialists with fewer than {SPECIALISTS_CLASSES} "
            f"classes, got {facts.outputs}: data.name digit_pairs has 100"
        )


def _choices(config: Config, key: str) -> Sequence[Any]:
    """Return the values that the search space has for a key; of a range its ends."""
    spec = config.search.space.get(key)
    return Distribution.parse(spec).values if spec else ()


def _wanted(config: Config) -> list[Source]:
    searched = _choices(config, "members.source")
    return list(dict.fromkeys([*config.members.sources(), *searched]))


def _may_teach(config: Config, teachers: Teachers) -> list[Model]:
    """Return every model that some student may be distilled from."""
    found: dict[str, Model] = {}
    for source in _choices(config, "members.source") or [config.members.source]:
        models = teachers.sources[source]
        if source == "members" and not _choices(config, "members.use"):
            models = models[: config.members.use]
        found |= {model.hash: model for model in models}
    return list(found.values())


# --- what teaches ---


def _sources(run: Run, members: Sequence[Member], facts: Facts) -> dict[Source, Sequence[Model]]:
    models = [Model(member.hash, member.checkpoint) for member in members]
    make: dict[Source, Callable[[], Sequence[Model]]] = {
        "snapshots": partial(_snapshots, run, len(members)),
        "soup": partial(_soup, run, models, greedy=False),
        "greedy_soup": partial(_soup, run, models, greedy=True),
        "weighted": partial(_weighted, run, models),
        "specialists": partial(_specialists, run, members[0], facts),
    }
    sources: dict[Source, Sequence[Model]] = {"members": models}
    for source in _wanted(run.config):
        if source != "members":
            made = lambda source=source: SourceResult(teachers=tuple(make[source]()))  # noqa: E731
            sources[source] = _once(run, SourceResult, f"sources/{source}", made).teachers
    return sources


def _snapshots(run: Run, members: int) -> list[Model]:
    """Return the models at the ends of the cycles of one run's learning rate."""
    arm = Arm(
        name="snapshots",
        folder=run.folder.path / "snapshots",
        network=lambda own, number: own.model,
        options=lambda number: {"cycles": max(2, members)},
        seeds=[trial_seed(run.config.seed, "snapshots", 0)],
    )
    ((trial,),) = run.replicate([arm], title="one run of snapshots")
    place = as_path(arm.model(run, trial).checkpoint).parent
    return [
        Model(epoch.hash, str(place / epoch.checkpoint))
        for epoch in trial.history
        if epoch.hash is not None and epoch.checkpoint is not None
    ]


def _soup(run: Run, models: Sequence[Model], *, greedy: bool) -> list[Model]:
    """Return the mean of the weights of all members, or of those that make it no worse."""
    save = run.folder.path / "sources" / f"{'greedy_' if greedy else ''}soup.safetensors"
    paths = [row["checkpoint"] for row in run.rows(models)]
    made = run.job("average_checkpoints", checkpoints=paths, save=str(save), greedy=greedy)
    return [Model(made["hash"], run.folder.relative(save))]


def _weighted(run: Run, models: Sequence[Model]) -> list[Model]:
    """Return the members with weights that were fitted on validation."""
    paths = [row["checkpoint"] for row in run.rows(models)]
    weights = run.job("fit_ensemble_weights", checkpoints=paths)["weights"]
    return [replace(m, weight=weight) for m, weight in zip(models, weights, strict=True)]


def _specialists(run: Run, best: Member, facts: Facts) -> list[Model]:
    """Return the best member with specialists in the classes that it confuses."""
    config, folder = run.config, run.folder.path
    generalist = str(run.folder.file(best.checkpoint))
    clusters = run.job(
        "cluster_outputs", checkpoint=generalist, clusters=max(2, facts.outputs // 10)
    )["clusters"]
    arm = Arm(
        name="specialists",
        folder=folder / "specialists",
        network=lambda own, number: ModelConfig.of_checkpoint(best.model),
        options=lambda number: {
            "specialist": clusters[number],
            "start": {"checkpoint": generalist},
        },
        seeds=[trial_seed(config.seed, "specialists", n) for n in range(len(clusters))],
    )
    (trials,) = run.replicate([arm], title="specialists")
    models = [arm.model(run, trial) for trial in trials]
    hashes = [best.hash, *(model.hash for model in models)]
    digest = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
    save = folder / "sources" / "specialists_parts.json"
    parts = [f"../{name}" for name in (best.checkpoint, *(model.checkpoint for model in models))]
    save_row(save, Parts(hash=digest, parts=tuple(parts)))
    return [Model(digest, run.folder.relative(save))]
