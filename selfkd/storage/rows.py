"""Typed rows of a run folder as JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from selfkd.results import FORMAT, from_row, to_row
from selfkd.storage.files import load_json, save_json

T = TypeVar("T")


def save_row(path: Path, row: object) -> None:
    """Write a row atomically, with the format number of the run folder."""
    save_json(path, {"format": FORMAT, **to_row(row)})


def load_row(kind: type[T], path: Path) -> T:
    """Read a row written by `save_row`.

    Args:
        kind: Row dataclass.
        path: File of the row.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or of another format; the message names it.
    """
    tree = load_json(path)
    if isinstance(tree, dict) and tree.get("format") != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT}, got {tree.get('format')}")
    try:
        return from_row(kind, tree)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
