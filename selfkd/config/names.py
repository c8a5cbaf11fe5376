"""Lists of class names, as text whatever they look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.config.load import parse_names
from selfkd.errors import ConfigError
from selfkd.storage.files import read_text

SHOWN = 10
"""Names of a long list in a message."""


def load_class_names(path: Path) -> list[str]:
    """Read class names, in the order of a network's logits; `no`, `01` and `1e3` stay as written.

    Args:
        path: YAML or JSON file with a list, or with a mapping of names to indices or of indices to
            names; or text with one name a line.

    Raises:
        OSError: The file cannot be read.
        ConfigError: It has no list of names.
    """
    try:
        text = read_text(path).removeprefix("\ufeff")
    except ValueError:
        raise ConfigError(f"{path} must be text in UTF-8: save it as such") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".txt":
        found: Any = lines
    elif path.suffix.lower() == ".json":
        try:
            found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} must be JSON, and is damaged") from None
    else:
        found = parse_names(text, str(path))
        found = lines if isinstance(found, str) and len(lines) > 1 else found
    names = _in_order(found) if isinstance(found, Mapping) else found
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f"{path} must be a list of class names (or a mapping between them and 0, 1, …) in YAML "
            f"or JSON, or text with one a line, got {str(found)[:200]}"
        )
    return names


def _in_order(found: Mapping[Any, Any]) -> Any:
    """Return the names of a mapping between names and indices, or of its key for them."""
    for key in ("names", "id2label"):  # as YOLO's data.yaml, and config.json of transformers
        if isinstance(inner := found.get(key), list | dict):
            return _in_order(inner) if isinstance(inner, Mapping) else inner
    wanted = [str(number) for number in range(len(found))]
    by_number = {str(key): value for key, value in found.items()}
    by_name = {value: key for key, value in found.items() if isinstance(value, str)}
    sides = [side for side in (by_number, by_name) if sorted(side) == sorted(wanted)]
    return [sides[0][number] for number in wanted] if len(sides) == 1 else None


def describe_classes(theirs: Sequence[str | int], ours: Sequence[str | int]) -> str:
    """Return two lists of classes side by side, in order; long ones are cut.

    >>> describe_classes(["cat", "dog"], ["cat", "cow", "dog"])
    "2 classes ('cat', 'dog') instead of 3 ('cat', 'cow', 'dog'); not among them: 'cow'"
    """
    first, second = list(map(str, theirs)), list(map(str, ours))
    noun = "class" if len(first) == 1 else "classes"
    text = f"{_cut(first, f'{noun} ')} instead of {_cut(second, '')}"
    for name, own, others in (("not among them", second, first), ("unknown", first, second)):
        rest = [each for each in own if each not in set(others)]
        if rest and len(rest) < len(own):
            text += f"; {name}: {_few(rest)}"
    return text


def _cut(names: Sequence[str], noun: str) -> str:
    return f"{len(names):,} {noun}({_few(names)})"


def _few(names: Sequence[str]) -> str:
    more = f", … and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN]))}{more}"
