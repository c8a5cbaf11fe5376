"""Files that are whole or absent: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[str], object]) -> None:
    """Write a file atomically.

    Args:
        path: file to make or replace; its folder is made.
        write: gets the name of a file beside `path` and writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(str(beside))
        beside.chmod(mode)  # tempfile and safetensors make files that only their owner can read
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace(path, lambda beside: Path(beside).write_text(text))


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is damaged; names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
