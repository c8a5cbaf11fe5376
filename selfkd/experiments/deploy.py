"""From a trained model to what is served: prune, fine-tune, export, quantise, measure, choose."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, replace

from selfkd.analysis.deploy import REFERENCE, deploy_sentences, drop_of, shortfalls
from selfkd.config import Config
from selfkd.experiments.arms import Run
from selfkd.experiments.deploy_forms import (
    FOLDER,
    Deployed,
    Served,
    Work,
    digest_of,
    export,
    measure,
    serve,
    time,
)
from selfkd.experiments.deploy_tuning import lower_bits, prune
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    DEPLOYED,
    WRITTEN_BITS,
    DeployRow,
    DeploySummary,
    Facts,
    FormTimings,
    RunFinished,
)
from selfkd.storage.files import link, remove_file
from selfkd.storage.rows import load_row, save_row

FILES = (
    *("float.onnx", "int8.onnx", *(f"int{bits}.onnx" for bits in WRITTEN_BITS)),
    *("ensemble.onnx", "model.safetensors"),
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
    work.rows["torch"] = replace(work.rows["torch"], bytes=_size(work))
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
    path = folder.path / DEPLOYED
    if not path.exists():
        return None
    summary = load_row(DeploySummary, path)
    same = summary.made_of == digest_of(config, source)
    sizes = {row.bytes for row in summary.rows}
    files = [folder.file(name) for name in summary.files.values()]
    whole = all(
        file.exists() and (file.suffix != ".onnx" or file.stat().st_size in sizes) for file in files
    )
    return summary if same and whole else None


def _size(work: Work) -> int:
    return work.run.folder.file(work.source.model.checkpoint).stat().st_size


# --- what is served ---


def _finish(work: Work, served: Served, machine: FormTimings) -> DeploySummary:
    """Put what is served into place, and write the summary."""
    facts, rows, options = work.facts, work.rows, work.run.config.deploy
    for key, row in rows.items():
        rows[key] = _with_speed(row, facts)
    metric = facts.metric if f"val_{facts.metric}" in rows["torch"].metrics else "nll"
    judged = {"int8.onnx": rows[served.int8_key]}
    if work.low_bits is not None:
        judged[f"int{options.bits}.onnx"] = rows[f"bits{options.bits}"]
    drops = {name: drop_of(row, rows[REFERENCE], metric) for name, row in judged.items()}
    most = math.inf if options.max_drop is None else options.max_drop
    worse = [name for name, drop in drops.items() if drop is not None and not drop <= most]
    files = _place(work, served, leave_out=worse)
    summary = DeploySummary(
        model=work.source.model.hash,
        title=work.source.title,
        metric=metric,
        options=asdict(options),
        made_of=digest_of(work.run.config, work.source),
        rows=tuple(rows.values()),
        network=served.exported.row.model,
        served=served.key if "int8.onnx" in worse else served.int8_key,
        files={name: f"{FOLDER}/{name}" for name in files},
        drop=drops["int8.onnx"],
        exceeded=bool(worse),
        point=work.point,
        cpu=machine.cpu,
        versions=machine.versions,
        remarks=tuple(work.remarks),
    )
    said = [(row, shortfalls(row, summary)) for row in summary.rows]
    told = [replace(row, remarks=(*row.remarks, text)) if text else row for row, text in said]
    summary = replace(summary, rows=tuple(told))
    summary = replace(summary, sentences=tuple(deploy_sentences(summary, facts)))
    save_row(work.run.folder.path / DEPLOYED, summary)
    work.run.events(RunFinished(summary))
    return summary


def _place(work: Work, served: Served, *, leave_out: Collection[str]) -> list[str]:
    """Put the files of what is served into place, and what predicts with them; return their names.

    Args:
        work: Deployment at work.
        served: What is served.
        leave_out: Names of files that are removed where an earlier deployment left them.
    """
    folder, options = work.run.folder, work.run.config.deploy
    remove_file(work.run.folder.path / DEPLOYED)  # which is of the files of before
    files = {"float.onnx": served.exported.path, "int8.onnx": served.int8.path}
    if work.low_bits is not None:
        files[f"int{options.bits}.onnx"] = work.low_bits.path
    if "ensemble" in work.rows:
        files["ensemble.onnx"] = folder.file(str(work.rows["ensemble"].file))
    if work.source.make_model is None:
        files["model.safetensors"] = folder.file(served.model.checkpoint)
    for name in FILES:
        if name in files and name not in leave_out:
            link(files[name], work.folder / name)
        else:
            files.pop(name, None)
            remove_file(work.folder / name)
    if work.source.make_model is not None:
        work.remarks.append(
            "predict.py is not written, as only you know how the inputs of your network are made"
        )
        return [*files]
    row = work.job(
        "deploy_predictor",
        checkpoint=str(files["model.safetensors"]),
        folder=str(work.folder),
        file="int8.onnx" if "int8.onnx" in files else "float.onnx",
    )
    return [*files, *row["files"]]


def _with_speed(row: DeployRow, facts: Facts) -> DeployRow:
    """Return a row with its tokens a second, where an input is of several items."""
    if facts.items_an_input == 1 or not row.timings:
        return row
    most = max(row.timings, key=lambda timing: timing.items)
    return replace(row, tokens_a_second=1000 * most.items * facts.items_an_input / most.ms)
