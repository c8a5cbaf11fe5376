"""From a trained model to what is served: prune, fine-tune, export, quantise, measure, choose."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from selfkd.analysis.deploy import deploy_sentences
from selfkd.config import Config
from selfkd.experiments.arms import Run
from selfkd.experiments.deploy_forms import (
    FOLDER,
    Deployed,
    Served,
    Work,
    export,
    measure,
    serve,
    time,
)
from selfkd.experiments.deploy_tuning import lower_bits, prune
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    DeployRow,
    DeploySummary,
    Facts,
    Row,
    RunFinished,
    find_metric,
)
from selfkd.storage.files import link, remove_file
from selfkd.storage.rows import load_row, save_row

SUMMARY = "deploy.json"
FILES = (
    *("float.onnx", "int8.onnx", "int4.onnx", "int2.onnx", "ensemble.onnx", "model.safetensors"),
)
"""Files of what is served, which may be there."""


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
        run.folder.keep_facts("data.json", facts)
    work = Work(run=run, source=source, facts=facts)
    options = run.config.deploy
    measure(work, "torch", "torch", source.model)
    served = serve(work, source.model, "float", "int8", "ONNX float", "ONNX int8")
    if options.prune is not None:
        served = prune(work, options.prune)
    if options.bits is not None:
        work.low_bits = lower_bits(work, served, options.bits)
    if options.ensemble:
        export(work, "ensemble", f"ensemble of {len(source.ensemble)}", *source.ensemble)
    return _finish(work, served, time(work))


def finished(config: Config, folder: RunFolder, source: Deployed) -> DeploySummary | None:
    """Return the summary of a deployment that has nothing left to do, else None."""
    path = folder.path / FOLDER / SUMMARY
    if not path.exists():
        return None
    summary = load_row(DeploySummary, path)
    same = (summary.model, summary.options) == (source.model.hash, asdict(config.deploy))
    there = all(folder.file(name).exists() for name in summary.files.values())
    return summary if same and there else None


# --- what is served ---


def _finish(work: Work, served: Served, machine: Row) -> DeploySummary:
    """Put what is served into place, and write the summary."""
    run, options = work.run, work.run.config.deploy
    folder, facts = run.folder, work.facts
    rows = [_with_remarks(row, work.rows["float"]) for row in work.rows.values()]
    by_key = {row.key: row for row in rows}
    metric = facts.metric if f"val_{facts.metric}" in by_key["torch"].metrics else "nll"
    key = f"val_{metric}"
    drop = _drop(key, facts, by_key["torch"], by_key[served.int8_key])
    files = {"float.onnx": served.exported.path, "int8.onnx": served.int8.path}
    drops = {"int8.onnx": drop}
    if work.low_bits is not None:
        name, row = f"int{options.bits}.onnx", by_key[f"bits{options.bits}"]
        files[name], drops[name] = work.low_bits.path, _drop(key, facts, by_key["torch"], row)
    if "ensemble" in by_key:
        files["ensemble.onnx"] = folder.file(str(by_key["ensemble"].file))
    if work.source.make_model is None:
        files["model.safetensors"] = folder.file(served.model.checkpoint)
    most = math.inf if options.max_drop is None else options.max_drop
    worse = [name for name, value in drops.items() if value > most]
    for name in FILES:
        if name in files and name not in worse:
            link(files[name], work.folder / name)
        else:
            files.pop(name, None)
            remove_file(work.folder / name)
    names = [*files]
    if work.source.make_model is None:
        checkpoint = str(folder.file(served.model.checkpoint))
        best = next(name for name in ("int8.onnx", "float.onnx") if name in files)
        place = str(work.folder)
        names += work.job("deploy_predictor", checkpoint=checkpoint, folder=place, file=best)[
            "files"
        ]
    else:
        work.remarks.append(
            "predict.py is not written: how the inputs of a network of your own are made is yours"
        )
    summary = DeploySummary(
        model=work.source.model.hash,
        title=work.source.title,
        metric=metric,
        options=asdict(options),
        rows=tuple(rows),
        network=served.exported.row["model"],
        served=served.key if "int8.onnx" in worse else served.int8_key,
        files={name: f"{FOLDER}/{name}" for name in names},
        drop=drop,
        exceeded=bool(worse),
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
