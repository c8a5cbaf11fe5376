"""From a trained model to what is served: prune, fine-tune, export, quantise, measure, choose.

What is done is kept in `deploy/steps`, by the hash of the model and the settings of the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from selfkd.analysis.deploy import deploy_sentences
from selfkd.analysis.statistics import mean_interval
from selfkd.config import Config, ModelConfig
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import trial_seed
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import (
    DeployRow,
    DeploySummary,
    Facts,
    Interval,
    McNemar,
    Model,
    Point,
    Row,
    RunFinished,
    TaskProgressed,
    TaskStarted,
    Timing,
    find_metric,
    from_row,
)
from selfkd.storage.files import fetch, link, load_json, remove_file, save_json
from selfkd.storage.rows import load_row, save_row

FOLDER = "deploy"
"""Folder of what is served, in the run folder."""
SUMMARY = "deploy.json"
_TUNED = ("distill.", "train.")
"""Beginnings of the keys of a model's own setting that its fine-tuning keeps."""


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
class _File:
    """A file that a step wrote, and the step's row."""

    path: Path
    row: Row


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What is served: keys of its rows, its model and its files."""

    key: str
    int8_key: str
    model: Model
    exported: _File
    int8: _File


@dataclass(kw_only=True)
class Work:
    """A deployment at work."""

    run: Run
    source: Deployed
    facts: Facts
    rows: dict[str, DeployRow] = field(default_factory=dict)
    forms: dict[str, Row] = field(default_factory=dict)
    """What is timed, by key."""
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
        return self.steps / f"{_digest(self.source.model)}.safetensors"

    def step(
        self, title: str, name: str, kind: str, *, writes: Path | None = None, **more: Any
    ) -> Row:
        """Run a job, unless its row is there, and what it writes.

        Args:
            title: Name of the work, for people.
            name: Name of the step, which says all that it depends on.
            kind: Kind of the job.
            writes: File that it writes, which its row has the `sha256` of, or a part of it.
            more: Further arguments of the job.

        Raises:
            ConfigError: It is refused.
            RunError: It failed.
        """
        path = self.steps / f"{name}.json"
        if path.exists() and (writes is None or writes.exists()):
            row: Row = load_json(path)
            if writes is None or row.get("sha256") in (None, _sha256(writes)):
                return row
        self.run.events(TaskStarted(title, 1))
        try:
            row = self.run.job(kind, **more)
        except RuntimeError as error:
            raise RunError(f"{title} failed: {error}") from None
        if "fault" in row:
            raise ConfigError(str(row["fault"]))
        save_json(path, row)
        self.run.events(TaskProgressed())
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


def deploy(run: Run, source: Deployed) -> DeploySummary:
    """Make what is served of a model, and measure all forms of it; what is done is kept.

    Args:
        run: Run of the model.
        source: What is deployed.

    Returns:
        The summary, which is saved as `deploy/deploy.json`.

    Raises:
        ConfigError: The model or a setting is refused.
        RunError: A step failed, or all trials of a fine-tuning.
    """
    facts = run.check()
    if source.make_model is None:
        run.folder.keep(run.config, facts)
    work = Work(run=run, source=source, facts=facts)
    options = run.config.deploy
    _measure(work, "torch", "torch", source.model)
    served = _serve(work, source.model, "float", "int8", "ONNX float", "ONNX int8")
    if options.prune is not None:
        served = _prune(work, options.prune)
    if options.ensemble:
        _export(work, "ensemble", f"ensemble of {len(source.ensemble)}", *source.ensemble)
    return _finish(work, served, _time(work))


def finished(config: Config, folder: RunFolder, source: Deployed) -> DeploySummary | None:
    """Return the summary of a deployment that has nothing left to do, else None."""
    path = folder.path / FOLDER / SUMMARY
    if not path.exists():
        return None
    summary = load_row(DeploySummary, path)
    same = (summary.model, summary.options) == (source.model.hash, asdict(config.deploy))
    there = all(folder.file(name).exists() for name in summary.files.values())
    return summary if same and there else None


# --- forms of a model ---


def _serve(
    work: Work, model: Model, key: str, int8_key: str, title: str, int8_title: str
) -> _Served:
    """Export a model and quantise it, and measure both files."""
    exported = _export(work, key, title, model)
    int8 = _quantise(work, int8_key, int8_title, model, exported)
    return _Served(key=key, int8_key=int8_key, model=model, exported=exported, int8=int8)


def _export(work: Work, key: str, title: str, *models: Model) -> _File:
    """Export a model, or the average of several, and measure the file."""
    name = _digest(*models)
    path = work.steps / f"{name}.onnx"
    row = work.step(
        f"{title}: exporting",
        name,
        "deploy_export",
        writes=path,
        path=str(path),
        **work.of(*models),
    )
    _measure(work, key, title, *models, file=_File(path=path, row=row))
    return _File(path=path, row=row)


def _quantise(work: Work, key: str, title: str, model: Model, exported: _File) -> _File:
    """Quantise an exported file to int8 by operator, and measure the result."""
    count = work.run.config.deploy.calibration
    name = f"{_digest(model)}-int8-{count}"
    path = work.steps / f"{name}.onnx"
    row = work.step(
        f"{title}: quantising",
        name,
        "deploy_quantise",
        writes=path,
        exported=str(exported.path),
        path=str(path),
        calibration=count,
        **work.of(model),
    )
    row = {**row, "parameters": exported.row["parameters"]}
    _measure(work, key, title, model, file=_File(path=path, row=row))
    return _File(path=path, row=row)


def _measure(work: Work, key: str, title: str, *models: Model, file: _File | None = None) -> None:
    """Measure a file, or the network of torch, against the network that is deployed."""
    reference, more = work.reference, dict[str, Any]()
    if file is None:
        name, more["predictions"] = f"{reference.stem}-torch", str(reference)
    else:
        name, more["reference"] = f"{file.path.stem}-measured", str(reference)
        more["file"] = str(file.path)
    row = work.step(
        f"{title}: measuring",
        name,
        "deploy_measure",
        writes=None if file else reference,
        **more,
        **work.of(*models),
    )
    work.forms[key] = work.of(*models) if file is None else {"file": str(file.path)}
    own = {} if file is None else file.row
    work.rows[key] = DeployRow(
        key=key,
        title=title,
        hash="+".join(model.hash for model in models),
        metrics=row["metrics"],
        parameters=own.get("parameters"),
        agreement=row.get("agreement"),
        bytes=own.get("bytes"),
        file=work.run.folder.relative(file.path) if file else None,
        mcnemar=from_row(McNemar, row["mcnemar"]) if "mcnemar" in row else None,
        difference=from_row(Interval, row["difference"]) if "difference" in row else None,
        operators=own.get("operators", {}),
    )


def _time(work: Work) -> Row:
    """Time all forms side by side; return the row, with the processor and versions."""
    name = _hash("\n".join(sorted(map(str, work.forms.items()))))
    row = work.step(
        "timing all side by side",
        f"time-{name}",
        "deploy_time",
        forms=work.forms,
        reference="float",
    )
    for key, timings in row["timings"].items():
        own = tuple(from_row(Timing, timing) for timing in timings)
        work.rows[key] = replace(work.rows[key], timings=own)
    return row


# --- models that are fine-tuned ---


def _prune(work: Work, fraction: float) -> _Served:
    """Prune the model and fine-tune it, beside the same from labels and a fresh student."""
    run, base = work.run, work.source.model
    name = f"{_digest(base)}-pruned-{fraction:g}"
    start = work.steps / f"{name}.safetensors"
    (row,) = run.rows([base])
    pruned = work.step(
        f"pruning by {fraction:.0%}",
        name,
        "prune",
        writes=start,
        checkpoint=row["checkpoint"],
        fraction=fraction,
        save=str(start),
    )
    work.remarks += pruned["remarks"]
    model = ModelConfig(**pruned["model"])
    share = f"pruned by {fraction:.0%}"
    arms = {
        "pruned_labels": (f"{share}, from labels", {"checkpoint": str(start)}, ()),
        "pruned_distilled": (f"{share}, distilled", {"checkpoint": str(start)}, (base,)),
        "fresh": ("fresh of that size, distilled", pruned.get("fresh", {}), (base,)),
    }
    found = _tune(work, name, arms, model)
    best = _best(
        run, [pair for key in ("pruned_labels", "pruned_distilled") for pair in found[key]]
    )
    served = _serve(work, best, "pruned_float", "pruned_int8", share, f"{share}, int8")
    exported = work.rows.pop("pruned_float")
    for key in arms:
        work.rows[key] = replace(
            work.rows[key], bytes=exported.bytes, parameters=exported.parameters
        )
    return served


def _tune(
    work: Work,
    name: str,
    arms: Mapping[str, tuple[str, Row, Sequence[Model]]],
    model: ModelConfig,
    **options: Any,
) -> dict[str, list[tuple[Model, float]]]:
    """Train arms on the same seeds, and put a row of each; return their models with the metric.

    Args:
        work: Deployment at work.
        name: Name of their folder.
        arms: Title, start and teachers by key.
        model: Their network.
        options: Further arguments of the training.
    """
    run, base = work.run, work.source.model
    point = {k: v for k, v in work.source.point.items() if k.startswith(_TUNED)}
    if not run.config.distill.live:
        prepare_teachers(run, [base], of="deploy", config=run.config.at(point))

    def arm(key: str, start: Row, teachers: Sequence[Model]) -> Arm:
        return Arm(
            name=f"deploy_{key}",
            folder=work.folder / name / key,
            point=point,
            teachers=lambda config, number: teachers,
            network=lambda config, number: model,
            options=lambda number: {"start": start, **options},
            seeds=work.seeds(),
        )

    own = [arm(key, start, teachers) for key, (_, start, teachers) in arms.items()]
    trials = run.replicate(own, title="fine-tuning")
    models = [
        [arm.model(run, trial) for trial in rows] for arm, rows in zip(own, trials, strict=True)
    ]
    requests = [Request(each, (base,)) for rows in models for each in rows]
    measured = iter(run.evaluate(requests, title="measuring what was fine-tuned"))
    found = {}
    for (key, (title, _, _)), rows, own_models in zip(arms.items(), trials, models, strict=True):
        tested = [next(measured) for _ in rows]
        values = [row.metrics[run.metric] for row in tested]
        names = [n for n in tested[0].metrics if n != "agreement"]
        work.rows[key] = DeployRow(
            key=key,
            title=title,
            metrics={n: _mean([row.metrics[n] for row in tested]) for n in names},
            agreement=_mean([row.metrics["agreement"] for row in tested]),
            seeds=tuple(trial.seed for trial in rows),
            values=tuple(values),
        )
        chosen_by = run.config.search.metric
        found[key] = [
            (each, trial.metrics[chosen_by]) for each, trial in zip(own_models, rows, strict=True)
        ]
    return found


def _best(run: Run, models: Sequence[tuple[Model, float]]) -> Model:
    """Return the model that is best on validation."""
    choose = max if run.config.search.mode == "max" else min
    return choose(models, key=lambda pair: pair[1])[0]


def _mean(values: Sequence[float]) -> float:
    return mean_interval(values).value


# --- what is served ---


def _finish(work: Work, served: _Served, machine: Row) -> DeploySummary:
    """Put what is served into place, and write the summary."""
    run, options = work.run, work.run.config.deploy
    folder, facts = run.folder, work.facts
    rows = [_with_remarks(row, work.rows["float"]) for row in work.rows.values()]
    by_key = {row.key: row for row in rows}
    metric = facts.metric if f"val_{facts.metric}" in by_key["torch"].metrics else "nll"
    drop = _drop(f"val_{metric}", facts, by_key["torch"], by_key[served.int8_key])
    exceeded = options.max_drop is not None and drop > options.max_drop
    files = {"float.onnx": served.exported.path, "int8.onnx": served.int8.path}
    if "ensemble" in by_key:
        files["ensemble.onnx"] = folder.file(str(by_key["ensemble"].file))
    if work.source.make_model is None:
        files["model.safetensors"] = folder.file(served.model.checkpoint)
    if exceeded:
        del files["int8.onnx"]
    for name in ("float.onnx", "int8.onnx", "ensemble.onnx", "model.safetensors"):
        if name in files:
            link(files[name], work.folder / name)
        else:
            remove_file(work.folder / name)
    summary = DeploySummary(
        model=work.source.model.hash,
        title=work.source.title,
        metric=metric,
        options=asdict(options),
        rows=tuple(rows),
        served=served.key if exceeded else served.int8_key,
        files={name: f"{FOLDER}/{name}" for name in files},
        drop=drop,
        exceeded=exceeded,
        point=work.source.point,
        cpu=machine["cpu"],
        versions=machine["versions"],
        remarks=tuple(work.remarks),
    )
    summary = replace(summary, sentences=tuple(deploy_sentences(summary, facts)))
    save_row(work.folder / SUMMARY, summary)
    run.events(RunFinished(summary))
    return summary


def _with_remarks(row: DeployRow, exported: DeployRow) -> DeployRow:
    """Return a row that says whether it is no smaller or no faster than the exported model."""
    if row.key in ("torch", exported.key):
        return row
    said = list(row.remarks)
    if row.bytes is not None and exported.bytes is not None and row.bytes >= exported.bytes:
        said.append("not smaller")
    slow = [t.items for t in row.timings if t.speed_up is not None and t.speed_up.value <= 1]
    if slow:
        at = "" if len(slow) == len(row.timings) else f" at {' and '.join(map(str, slow))}"
        said.append(f"not faster{at}")
    return replace(row, remarks=tuple(said))


def _drop(key: str, facts: Facts, before: DeployRow, after: DeployRow) -> float:
    """Return how much worse a row is on validation, in points of a fraction or in nats."""
    difference = before.metrics[key] - after.metrics[key]
    metric = find_metric(key)
    return (100 if metric.is_fraction else 1) * (
        difference if metric.mode == "max" else -difference
    )


def _digest(*models: Model) -> str:
    """Return the hash that names the files of a model, or of the average of several."""
    return models[0].hash if len(models) == 1 else _hash("+".join(model.hash for model in models))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with fetch(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
