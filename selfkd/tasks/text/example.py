"""A prompt and what is to follow it, and what a row of a file or data set holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEYS = '"text", or "prompt" and "completion"'
ROW_KEYS = ("text", "prompt", "completion", "rationale")
_IN_WORD = re.compile(r"[^\W_]\Z")
_IN_NUMBER = re.compile(r"(?:[^\W_]|[-−.]|\d,)\Z")


@dataclass(frozen=True)
class Example:
    """A prompt and what is to follow it.

    >>> example = Example("1 + 2 =", " 3")
    >>> str(example), example.is_right(" 1, 3"), example.is_right(" 13"), example.is_right(" -3")
    ('1 + 2 = 3', True, False, False)
    """

    prompt: str
    completion: str
    rationale: str = ""
    """Text between the two, such as the steps of a calculation."""
    place: str = field(default="", compare=False, repr=False)
    """File and line that it stands in, for messages."""

    def __str__(self) -> str:
        return self.prompt + self.rationale + self.completion

    def is_right(self, written: str) -> bool:
        """Say whether a text after the prompt ends in the completion, a whole word or number."""
        wanted, found = self.completion.strip(), written.strip()
        before = found[: len(found) - len(wanted)]
        glued = _IN_NUMBER if wanted[:1].isdigit() else _IN_WORD
        return found.endswith(wanted) and not glued.search(before)


def read_row(row: Any, place: str) -> str | Example:
    """Return the text of a row, or its prompt and what follows it.

    Args:
        row: Mapping with `text`, or with `prompt`, `completion` and perhaps `rationale`.
        place: Where the row stands, for messages.

    Raises:
        ValueError: Other keys, both kinds of them, or values that are no text.

    >>> read_row({"prompt": "1+1=", "completion": " 2"}, "a.jsonl, line 1")
    Example(prompt='1+1=', completion=' 2', rationale='')
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: must have {KEYS}, got {type(row).__name__}")
    prompted = [key for key in ("prompt", "completion") if key in row]
    if "text" in row and prompted:
        raise ValueError(f"{place}: must have {KEYS}, got both")
    if "text" in row:
        return _text(row, "text", place)
    if len(prompted) < 2:
        raise ValueError(f"{place}: must have {KEYS}, got {', '.join(map(str, row)) or 'no keys'}")
    prompt, completion = (_text(row, key, place) for key in ("prompt", "completion"))
    for key, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise ValueError(f'{place}: "{key}" must not be empty, got {text!r}')
    rationale = "" if row.get("rationale") is None else _text(row, "rationale", place)
    return Example(prompt, completion, rationale, place)


def _text(row: Mapping[Any, Any], key: str, place: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f'{place}: "{key}" must be text, got {type(text).__name__}')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(
                f'{place}: "{key}" must be Unicode, got half a character, {half!r}'
            ) from None
    return text
