"""The forms of a deployed model: files, their measures and their times, each step kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from selfkd.analysis.deploy import REFERENCE
from selfkd.config import Config, resume_invariant
from selfkd.deployment import processor, versions
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.arms import Run
from selfkd.experiments.stages import trial_seed
from selfkd.results import (
    DeployRow,
    Facts,
    FormMeasures,
    FormTimings,
    Model,
    Point,
    Row,
    ServedFile,
    TaskProgressed,
    TaskStarted,
    from_row,
)
from selfkd.storage.files import load_json, save_json, sha256

T = TypeVar("T")
FOLDER = "deploy"
"""Folder of what is served, in the run folder."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What is deployed of a run."""

    title: str
    """Its name within the run, such as `generation 3`."""
    model: Model
    point: Point = field(default_factory=dict)
    """Settings of its training in which it differs from the config."""
    ensemble: Sequence[Model] = ()
    """Models of the ensemble that is exported beside it, if it is."""
    average: str = "probabilities"
    """What of the ensemble is averaged."""
    make_model: str | None = None
    """Reference of the function that makes a user's network."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that a step wrote, and what its row says of it."""

    path: Path
    row: ServedFile

    def like(self, exported: File) -> File:
        """Return the file, of the same network as an exported one."""
        return replace(self, row=replace(self.row, parameters=exported.row.parameters))


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served: keys of its rows, its model and its files."""

    key: str
    int8_key: str
    model: Model
    exported: File
    int8: File


@dataclass(kw_only=True)
class Work:
    """A deployment at work."""

    run: Run
    source: Deployed
    facts: Facts
    rows: dict[str, DeployRow] = field(default_factory=dict)
    forms: dict[str, Row] = field(default_factory=dict)
    """What is timed, by key."""
    like: dict[str, str] = field(default_factory=dict)
    """Key of the row whose file has the size and the times of another row's, by its key."""
    low_bits: File | None = None
    """File of weights in low bits, if there is one."""
    point: Point = field(default_factory=dict)
    """Settings of a fine-tuning in which it differs from the config."""
    remarks: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Folder of what is served."""
        return self.run.folder.path / FOLDER

    @property
    def steps(self) -> Path:
        """Folder of what each step made."""
        return self.folder / "steps"

    @property
    def reference(self) -> Path:
        """File of the logits of the model that is deployed, with which all are compared."""
        return self.steps / f"{digest(self.source.model)}.safetensors"

    def step(
        self,
        title: str,
        name: str,
        kind: str,
        of: type[T],
        *,
        writes: Path | None = None,
        **more: Any,
    ) -> T:
        """Run a job, unless its row is there, made of the same, and what it writes.

        Args:
            title: Name of the work, for people.
            name: Name of the step's row.
            kind: Kind of the job.
            of: Dataclass of the row.
            writes: File that it writes, which its row has the `sha256` of, or a part of it.
            more: Further arguments of the job.

        Raises:
            ConfigError: It is refused.
            RunError: It failed.
        """
        path, made_of = self.steps / f"{name}.json", self.digest(kind, more)
        if path.exists() and (writes is None or writes.exists()):
            with contextlib.suppress(ValueError):  # a damaged row, which is made again
                found: Row = load_json(path)
                row = from_row(of, found)
                whole = writes is None or found.get("sha256") in (None, sha256(writes))
                if found.get("made_of") == made_of and whole:
                    return row
        self.run.events(TaskStarted(title, 1))
        try:
            found = self.job(kind, **more)
        except RuntimeError as error:
            raise RunError(f"{title} failed: {error}") from None
        save_json(path, {"made_of": made_of, **found})
        self.run.events(TaskProgressed())
        return from_row(of, found)

    def write(self, title: str, path: Path, kind: str, **more: Any) -> File:
        """Run a job that writes a file, unless the file is there, as in `step`.

        Args:
            title: Name of the work, for people.
            path: File to write, whose stem names the step's row.
            kind: Kind of the job.
            more: Further arguments of the job.

        Raises:
            ConfigError: It is refused.
            RunError: It failed.
        """
        return File(
            path=path,
            row=self.step(title, path.stem, kind, ServedFile, writes=path, path=str(path), **more),
        )

    def digest(self, kind: str, arguments: Row) -> str:
        """Return a hash of all that a job depends on, wherever the run folder lies."""
        own = {key: value for key, value in arguments.items() if key != "make_model"}
        text = json.dumps(own, sort_keys=True, ensure_ascii=False)
        text = text.replace(str(self.run.folder.path), "")
        base = made_of(self.run.config, self.source)
        return _hash(json.dumps([kind, text, base, self.facts.fingerprints], sort_keys=True))

    def job(self, kind: str, **more: Any) -> Row:
        """Run a job; return its row.

        Raises:
            ConfigError: It is refused.
        """
        row = self.run.job(kind, **more)
        if "fault" in row:
            raise ConfigError(str(row["fault"]))
        return row

    def of(self, *models: Model) -> Row:
        """Return the arguments by which a worker makes a network, or an average of several."""
        more: Row = {"members": self.run.rows(models)}
        if len(models) > 1:
            more["average"] = self.source.average
        if self.source.make_model is not None:
            more["make_model"] = self.source.make_model
        return more

    def seeds(self) -> list[int]:
        """Return the seeds of a fine-tuning, the same for all of its arms."""
        config = self.run.config
        return [trial_seed(config.seed, FOLDER, n) for n in range(config.deploy.seeds)]


def serve(work: Work, model: Model, key: str, int8_key: str, title: str, int8_title: str) -> Served:
    """Export a model and quantise it, and measure both files.

    Args:
        work: Deployment at work.
        model: Model that is served.
        key: Key of the row of its float file.
        int8_key: Key of the row of its int8 file.
        title: Title of the first row.
        int8_title: Title of the second.
    """
    exported = export(work, key, title, model)
    int8 = quantise(work, int8_key, int8_title, model, exported)
    return Served(key=key, int8_key=int8_key, model=model, exported=exported, int8=int8)


def export(work: Work, key: str, title: str, *models: Model) -> File:
    """Export a model, or the average of several, and measure the file.

    Args:
        work: Deployment at work.
        key: Key of its row.
        title: Title of the row.
        models: Model, or the members of an ensemble.
    """
    file = write_float(work, title, *models)
    measure(work, key, title, *models, file=file)
    return file


def write_float(work: Work, title: str, *models: Model) -> File:
    """Export a model, or the average of several, and return the file, which is not measured.

    Args:
        work: Deployment at work.
        title: Name of the model, for people.
        models: Model, or the members of an ensemble.
    """
    path = work.steps / f"{digest(*models)}.onnx"
    return work.write(f"{title}: exporting", path, "deploy_export", **work.of(*models))


def quantise(work: Work, key: str, title: str, model: Model, exported: File) -> File:
    """Quantise an exported file to int8 by operator, and measure the result.

    Args:
        work: Deployment at work.
        key: Key of its row.
        title: Title of the row.
        model: Model of the file.
        exported: File of float32.
    """
    count = work.run.config.deploy.calibration
    file = work.write(
        f"{title}: quantising",
        work.steps / f"{digest(model)}-int8-{count}.onnx",
        "deploy_quantise",
        exported=str(exported.path),
        calibration=count,
        **work.of(model),
    ).like(exported)
    measure(work, key, title, model, file=file)
    return file


def measure(work: Work, key: str, title: str, *models: Model, file: File | None = None) -> None:
    """Measure a file, or the network of torch, against the network that is deployed.

    Args:
        work: Deployment at work, which the row is put into.
        key: Key of the row.
        title: Title of the row.
        models: Model of the file, or the members of an ensemble.
        file: File that predicts; the network itself when not given.
    """
    reference, more = work.reference, dict[str, Any]()
    if file is None:
        name, more["predictions"] = f"{reference.stem}-torch", str(reference)
    else:
        name, more["reference"] = f"{file.path.stem}-to-{reference.stem}", str(reference)
        more["file"] = str(file.path)
    row = work.step(
        f"{title}: measuring",
        name,
        "deploy_measure",
        FormMeasures,
        writes=None if file else reference,
        **more,
        **work.of(*models),
    )
    work.forms[key] = work.of(*models) if file is None else {"file": str(file.path)}
    work.rows[key] = DeployRow(
        key=key,
        title=title,
        hash="+".join(model.hash for model in models),
        metrics=row.metrics,
        parameters=file.row.parameters if file else None,
        agreement=row.agreement,
        bytes=file.row.bytes if file else None,
        file=work.run.folder.relative(file.path) if file else None,
        mcnemar=row.mcnemar,
        difference=row.difference,
        operators=file.row.operators if file else {},
    )


def time(work: Work) -> FormTimings:
    """Time all forms side by side."""
    more: Row = {"forms": work.forms, "reference": REFERENCE}
    name = f"time-{_hash(work.digest('deploy_time', more) + processor())}"
    row = work.step("timing all side by side", name, "deploy_time", FormTimings, **more)
    for key in work.forms:
        work.rows[key] = replace(work.rows[key], timings=row.timings.get(key, ()))
    for key, other in work.like.items():
        same = work.rows[other]
        work.rows[key] = replace(
            work.rows[key], bytes=same.bytes, parameters=same.parameters, timings=same.timings
        )
    return row


def made_of(config: Config, source: Deployed) -> Row:
    """Return what all steps depend on: the data, a user's code, and versions of the libraries."""
    own = None
    if source.make_model is not None:
        path, _, function = source.make_model.rpartition(":")
        own = [function, sha256(Path(path)) if Path(path).is_file() else path]
    return {"config": resume_invariant(config), "make_model": own, "versions": versions()}


def digest_of(config: Config, source: Deployed) -> str:
    """Return a hash of all that a deployment is made of, and of what it is timed on."""
    own = [asdict(replace(source, make_model=None)), asdict(config.deploy), processor()]
    return _hash(json.dumps([made_of(config, source), own], sort_keys=True))


def digest(*models: Model) -> str:
    """Return the hash that names the files of a model, or of the average of several."""
    return models[0].hash if len(models) == 1 else _hash("+".join(model.hash for model in models))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
