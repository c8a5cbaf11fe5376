"""The paths of a config: where this process sees them, and which a Ray job would lose."""

from __future__ import annotations

import dataclasses
import os

from selfkd.config.schema import Config
from selfkd.storage.remote import as_path


def with_absolute_paths(config: Config) -> Config:
    """Return a config whose files lie where this process sees them: workers have other folders."""
    root = config.data.root or os.environ.get("SELFKD_DATA")
    members = dataclasses.replace(
        config.members,
        runs=[absolute(run) for run in config.members.runs],
        checkpoints=[
            dataclasses.replace(
                file, path=absolute(file.path), classes=file.classes and absolute(file.classes)
            )
            for file in config.members.checkpoints
        ],
    )
    data = dataclasses.replace(config.data, root=root and absolute(root))
    return dataclasses.replace(config, data=data, members=members)


def absolute(path: str) -> str:
    """Return a path, or a URI, from the root on."""
    return str(as_path(path).expanduser().absolute())


def relative_paths(config: Config | None, *named: tuple[str, str | None]) -> list[str]:
    """Return what is wrong with the relative paths of a Ray job: its own folder ends with it.

    Args:
        config: Config of the run, where it is known.
        named: Further paths, each after what gives it.
    """
    paths = list(named)
    if config is not None:
        paths += [("data.root", config.data.root), ("targets.root", config.targets.root)]
        paths += [("--from", run) for run in config.members.runs]
        paths += [("members.checkpoints", file.path) for file in config.members.checkpoints]
    return [
        f"{name}: must be absolute (or a URI) in a Ray job, whose own folder is removed with it, "
        f"got {path!r}" + (": --set storage=/shared/runs" if name == "storage" else "")
        for name, path in paths
        if path and "://" not in path and not as_path(path).expanduser().is_absolute()
    ]
