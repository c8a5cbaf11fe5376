"""Documents and prompts of a folder: .txt, .jsonl with one a line, or a saved data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from selfkd.data.folder import list_left_out, walk
from selfkd.data.saved import is_saved, load_saved
from selfkd.tasks.task import Split
from selfkd.tasks.text.example import KEYS, ROW_KEYS, Example, read_row

KINDS = (".txt", ".jsonl")
NAMED: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "test": "test",
}
"""Splits by the names of files, folders and parts of saved data sets."""

Found = tuple[Split | None, str, str | Example]
"""Split that a piece stands in by its file's name, if any; its place, for messages; the piece."""


def read_folder(root: Path, left_out: Counter[str]) -> Iterator[Found]:
    """Yield the documents and prompts of a folder, in the order of the paths of their files.

    A data set of the library `datasets`, saved by `save_to_disk`, has one of them a row. Elsewhere
    a .txt file is one document, and a line of a .jsonl file one document or one prompt. Links are
    followed; hidden files and files of other types are left out.

    Args:
        root: Folder.
        left_out: Number of files that are not read, by type; counted here.

    Raises:
        ValueError: No such files, one that is not UTF-8, or a line or row without its keys.
    """
    if is_saved(root):
        yield from _read_saved(root, left_out)
        return
    names = [name.removeprefix("./") for name in walk(root, ".", frozenset(), left_out, KINDS)]
    if not names:
        others = f" (left out: {list_left_out(left_out)})" if left_out else ""
        raise ValueError(f"data.root must have .txt or .jsonl files, got none in {root}{others}")
    read = dict[Path, Split | None]()
    for name in names:
        file, split = root / name, _split_of(Path(name))
        real = file.resolve()
        if real in read and read[real] != split:
            raise ValueError(
                f"data.root must hold each file in one split, got a link in another one: {file}"
            )
        if real in read:
            left_out["link to a file that is read"] += 1
            continue
        read[real] = split
        yield from ((split, place, piece) for place, piece in _read(file))


def _split_of(path: Path) -> Split | None:
    """Return the split that the first folder, or the file at the top, is named by."""
    first = path.parts[0] if len(path.parts) > 1 else path.stem
    return NAMED.get(first.lower())


def _read(file: Path) -> Iterator[tuple[str, str | Example]]:
    """Yield what a file holds, and where each stands."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} must be readable, got {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} must be UTF-8, got byte 0x{raw[error.start]:02x} at position {error.start:,}"
        ) from None
    if (position := raw.find(0)) >= 0:
        raise ValueError(
            f"{file} must be text in UTF-8, got byte 0x00 at position {position:,}, as UTF-16 and "
            "binary files have"
        )
    if file.suffix.lower() == ".txt":
        yield str(file), text.replace("\r\n", "\n")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{place}: must be JSON, got {line[:60]!r}") from None
        yield place, read_row(row, place)


def _read_saved(root: Path, left_out: Counter[str]) -> Iterator[Found]:
    """Yield what the rows of a saved data set hold; one without splits is divided."""
    splits = load_saved(root)
    for name, dataset in splits.items():
        split = NAMED.get(name.lower()) if len(splits) > 1 else None
        if split is None and len(splits) > 1:
            left_out[f"of split {name}"] += len(dataset)
            continue
        columns = [key for key in ROW_KEYS if key in dataset.column_names]
        if not columns:
            raise ValueError(
                f"{root} (split {name}): must have columns {KEYS}, got "
                f"{', '.join(dataset.column_names) or 'none'}"
            )
        rows = dataset.with_format(None).select_columns(columns)
        for number, row in enumerate(rows):
            place = f"{root} (split {name}), row {number}"
            yield split, place, read_row(row, place)
