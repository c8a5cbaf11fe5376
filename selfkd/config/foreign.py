"""What a config that somebody else wrote may not do unasked: fetch, send, write elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfkd.config.load import resume_invariant
from selfkd.config.paths import transfer_places
from selfkd.config.schema import Config, Tree, flat, to_tree
from selfkd.errors import ConfigError
from selfkd.storage.files import cache_folder

_FETCHED = ("hfds", "hfids", "tfds", "wds")  # timm's data sets that may be fetched, or run programs


def config_hash(config: Config, *, of: Collection[str] | None = None) -> str:
    """Return a hash of what may not change when a run is resumed.

    Args:
        config: Config of the run.
        of: Dotted keys that the version had by which the run was started; all when None.
    """
    values = resume_invariant(config)
    return _hash({key: value for key, value in values.items() if of is None or key in of})


def reaches_out(config: Config) -> dict[str, Any]:
    """Return the settings by which a run fetches, sends, or writes outside its folder.

    >>> from selfkd.config import load_config
    >>> reaches_out(load_config(settings=["targets.root=s3://bucket/a"]))
    {'targets.root': 's3://bucket/a'}
    """
    values, found = flat(config), {}
    for key in ("data.download", "targets.root", "tracking.entity"):
        if values[key]:
            found[key] = values[key]
    places: dict[str, list[Any]] = {
        "data.root": [config.data.root],
        "generation_0.path": [config.generation_0.path],
        "members.runs": list(config.members.runs),
        "members.checkpoints": [file.path for file in config.members.checkpoints],
    }
    for key, named in places.items():
        if any("://" in str(place) for place in named):
            found[key] = named if key.startswith("members.") else named[0]
    for key, place in (("data.name", config.data.name), *transfer_places(config)):
        if "://" in str(place) or str(place).partition("/")[0] in _FETCHED:
            found[key] = place
    return found | dict(_pretrained(to_tree(config), ""))


def uses_pretrained(config: Config) -> bool:
    """Return whether some network of a config may start from timm's pretrained weights.

    >>> uses_pretrained(Config())
    False
    """
    return any(True for _ in _pretrained(to_tree(config), ""))


def _pretrained(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings by which timm's weights are fetched, wherever they stand."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in pairs:
        key = f"{prefix}{name}"
        if key.endswith("pretrained") and value:
            yield key, value
        elif isinstance(value, dict | list):
            yield from _pretrained(value, f"{key}.")


def refuse_foreign(config: Config, source: Path, *, confirmed: Collection[str]) -> None:
    """Check that a stored config reaches out only as this user has asked for.

    Args:
        config: Config of a run folder.
        source: File of the config.
        confirmed: Dotted keys, or sections, that the user has given again.

    Raises:
        ConfigError: It does otherwise; names each setting.
    """
    asked = {
        key: value
        for key, value in reaches_out(config).items()
        if not any(key == given or key.startswith(f"{given}.") for given in confirmed)
        and not _is_known(config, key, value)
    }
    if asked:
        raise ConfigError(
            f"{source} was not written by a run of yours on this machine, and has settings by "
            "which a run fetches, sends or writes outside its folder; give those that you want "
            "again:\n  " + "\n  ".join(f"--set {key}={value}" for key, value in asked.items())
        )


def remember(config: Config) -> None:
    """Remember that this user has started a run that reaches out as it does."""
    for key, value in reaches_out(config).items():
        with suppress(OSError):
            path = _record(config, key, value)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            path.touch()


def _is_known(config: Config, key: str, value: Any) -> bool:
    with suppress(OSError):  # a home that cannot be written to
        return _record(config, key, value).exists()
    return False


def _record(config: Config, key: str, value: Any) -> Path:
    about = [key, value, config.data.name, config.data.root, config.model.name]
    return cache_folder() / "started" / _hash(about)


def _hash(value: Tree | list[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
