"""Rows of a run folder whose damage is named: what is damaged is omitted, and becomes a problem."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selfkd.results import from_row
from selfkd.storage.files import load_json

T = TypeVar("T")


class RowReader:
    """Reads the rows of a folder.

    Args:
        path: Run folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.problems: list[str] = []
        """Damaged files, each with what is wrong with it."""

    def load(self, path: Path) -> Any:
        """Return what a JSON file holds; None where it is absent or damaged."""
        return self._try(lambda: load_json(path) if path.is_file() else None, path)

    def _try(self, read: Callable[[], Any], path: Path) -> Any:
        try:
            return read()
        except ValueError as error:
            self.problems.append(str(error).removesuffix(": remove it and resume"))
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror}")
        return None

    def row(self, kind: type[T], name: str) -> T | None:
        """Return a row without its damaged fields; None where there is none, or none without them.

        Each damaged field becomes a problem.
        """
        path = self._path / name
        raw, whole = self.load(path), True
        while raw is not None:
            try:
                return from_row(kind, raw)
            except ValueError as error:
                field = re.split(r"[.:]", str(error), maxsplit=1)[0]
                absent = not isinstance(raw, dict) or field not in raw
                if whole or not absent:
                    self.problems.append(f"{path} is damaged: {error}")
                if absent:  # a required field, in vain dropped or not there at all
                    return None
                raw, whole = {key: value for key, value in raw.items() if key != field}, False
        return None
