"""Paths of a config: made absolute, and checked for Ray jobs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from selfkd.config.schema import HF, TRAINED_TOKENIZER, Config, ModelConfig, leaves
from selfkd.storage.remote import as_path

_TRANSFER = "data.transfer"


def with_absolute_paths(config: Config) -> Config:
    """Return a config with absolute paths, as workers have other working directories."""
    root = config.data.root or os.environ.get("SELFKD_DATA")
    members = dataclasses.replace(
        config.members,
        models=[_with_absolute_path(model) for model in config.members.models],
        runs=[absolute(run) for run in config.members.runs],
        checkpoints=[
            dataclasses.replace(
                file, path=absolute(file.path), classes=file.classes and absolute(file.classes)
            )
            for file in config.members.checkpoints
        ],
    )
    given = config.generation_0
    given = dataclasses.replace(
        given,
        path=given.path and absolute(given.path),
        classes=given.classes and absolute(given.classes),
    )
    tokenizer = config.data.tokenizer
    if not TRAINED_TOKENIZER.fullmatch(tokenizer):
        tokenizer = absolute(tokenizer)
    transfer = config.data.transfer
    if transfer is not None:
        transfer = dataclasses.replace(transfer, root=transfer.root and absolute(transfer.root))
    data = dataclasses.replace(
        config.data, root=root and absolute(root), tokenizer=tokenizer, transfer=transfer
    )
    arms = {
        name: dataclasses.replace(arm, set=_with_absolute_root(arm.set))
        for name, arm in config.study.arms.items()
    }
    student = config.student
    if isinstance(student, list):
        student = [_with_absolute_path(model) for model in student]
    elif student is not None:
        student = _with_absolute_path(student)
    return dataclasses.replace(
        config,
        data=data,
        model=_with_absolute_path(config.model),
        student=student,
        members=members,
        generation_0=given,
        study=dataclasses.replace(config.study, arms=arms),
    )


def transfer_places(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield names and folders of the transfer sets of a config and its arms, by dotted key.

    >>> from selfkd.config import load_config
    >>> arms = "study.arms={a: {set: {data.transfer: {name: folder, root: b}}}}"
    >>> dict(transfer_places(load_config(settings=[arms])))["study.arms.a.set.data.transfer.root"]
    'b'
    """
    if (own := config.data.transfer) is not None:
        yield f"{_TRANSFER}.name", own.name
        yield f"{_TRANSFER}.root", own.root
    for name, arm in config.study.arms.items():
        for key, value in leaves(arm.set, ""):
            if key in (f"{_TRANSFER}.name", f"{_TRANSFER}.root"):
                yield f"study.arms.{name}.set.{key}", value


def _with_absolute_root(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an arm with an absolute folder of its transfer set."""
    found, whole = dict(settings), settings.get(_TRANSFER)
    if isinstance(whole, dict) and isinstance(root := whole.get("root"), str):
        found[_TRANSFER] = whole | {"root": absolute(root)}
    if isinstance(root := settings.get(f"{_TRANSFER}.root"), str):
        found[f"{_TRANSFER}.root"] = absolute(root)
    return found


def _with_absolute_path(model: ModelConfig) -> ModelConfig:
    if model.name != HF or "path" not in model.args:
        return model
    args = model.args | {"path": absolute(model.args["path"])}
    return dataclasses.replace(model, args=args)


def absolute(path: str) -> str:
    """Return a path as an absolute one; a URI stays as it is."""
    return str(as_path(path).expanduser().absolute())


def relative_paths(config: Config | None, *named: tuple[str, str | None]) -> list[str]:
    """Return faults of relative paths in a Ray job, whose working directory is removed at its end.

    Args:
        config: Config of the run; None where it is not known.
        named: Further paths, each as its name and the path.
    """
    paths = list(named)
    if config is not None:
        paths += [("data.root", config.data.root), ("targets.root", config.targets.root)]
        paths += [
            (key, str(value))
            for key, value in transfer_places(config)
            if key.endswith("root") and value
        ]
        paths += [("--from", run) for run in config.members.runs]
        paths += [("--from", config.generation_0.path)]
        paths += [
            ("model.args.path", model.args.get("path"))
            for model in (config.model, *config.students, *config.members.models)
            if model.name == HF
        ]
        paths += [("members.checkpoints", file.path) for file in config.members.checkpoints]
    return [
        f"{name}: must be absolute (or a URI) in a Ray job, whose own folder is removed with it, "
        f"got {path!r}" + (": --set storage=/shared/runs" if name == "storage" else "")
        for name, path in paths
        if path and "://" not in path and not as_path(path).expanduser().is_absolute()
    ]
