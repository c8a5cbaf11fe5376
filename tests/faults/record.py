"""What a run has found, without what a clock measured: equal for equal runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json

CLOCK = {"seconds", "train_seconds"}


def record(folder: Path) -> dict[str, Any]:
    """Return the table, each trial, and the hash of each file of weights and predictions.

    The hash is that of names, types, shapes, bytes and facts; reading a file checks it. (Two files
    with the same content may differ in the order of their header.) Of models for other programs,
    and of text that teachers have written, it is that of the whole file.
    """
    generations = sorted(folder.glob("generation_*/result.json"))
    trials = sorted(folder.glob("generation_*/trial_*/result.json"))
    files = [
        *(path for path in folder.glob("generation_*/**/*.safetensors") if not _is_export(path)),
        *folder.glob("predictions/*.safetensors"),
    ]
    others = [*folder.glob("generation_*/pretrained/*"), *folder.glob("written/*/*/shard_*")]
    return {
        "summary": _timeless(load_json(folder / "summary.json")),
        "generations": [_timeless(load_json(path)) for path in generations],
        "trials": {str(path.relative_to(folder)): _timeless(load_json(path)) for path in trials},
        "tensors": {
            str(path.relative_to(folder)): load_tensors(path)[1]["hash"] for path in sorted(files)
        },
        "others": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(others)
        },
    }


def _is_export(path: Path) -> bool:
    return path.parent.name == "pretrained"


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in CLOCK}
    if isinstance(value, list):
        return [_timeless(one) for one in value]
    return value
