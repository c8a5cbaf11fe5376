"""Files that are whole or absent: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
import tempfile
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
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
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
