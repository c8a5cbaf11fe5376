"""Documents of text and their splits: Python's own manual, or a folder of the user's."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfkd.analysis.verdicts import count
from selfkd.storage.remote import as_path
from selfkd.tasks.task import Split
from selfkd.tasks.text import arithmetic
from selfkd.tasks.text.example import Example as Example

DATASETS = ("pydoc", "arithmetic", "text")
SHARE = 0.1  # of the characters, for validation and for test
_NAMED: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "test": "test",
}


@dataclass(frozen=True)
class Documents:
    """Documents by split, or examples."""

    splits: Mapping[Split, Sequence[str | Example]]
    note: str
    """Where they come from and how they are divided, in words."""


def load_documents(
    name: str,
    root: str | None,
    seed: int,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
) -> Documents:
    """Return the documents of a dataset, divided into training, validation and test.

    Whole documents are drawn by the seed until validation and test have about a tenth of the
    characters each. Fewer than three documents are divided by position instead: a tenth at the end
    is for test and the tenth before it for validation. What has a split of its own by the name of a
    file or folder (train, val, test) stays in it.

    Args:
        name: `pydoc`, `arithmetic` or `text`.
        root: Folder of `text`.
        seed: Seed of the division, or of the problems.
        train_size: Number of problems of `arithmetic` for training; its default when not given.
        val_size: Number of its problems for validation, and for test.

    Raises:
        ValueError: An unknown name, or files that are not as they must be; says which and where.
    """
    if name == "pydoc":
        from pydoc_data.topics import topics  # half a megabyte of source

        texts = [text for _, text in sorted(topics.items())]
        splits, how = _divide(texts, {}, seed)
        return Documents(splits, f"pydoc of Python {platform.python_version()}: {how}")
    if name == "arithmetic":
        return Documents(*arithmetic.load(train_size, val_size, seed))
    if name != "text":
        known = f"{', '.join(DATASETS[:-1])} or {DATASETS[-1]}"
        raise ValueError(f"data.name must be {known} with task text, got {name!r}")
    root = root or os.environ.get("SELFKD_DATA")
    if root is None:
        raise ValueError("data.root must be a folder of .txt or .jsonl files, got none")
    texts, given = read_folder(as_path(root))
    splits, how = _divide(texts, given, seed)
    return Documents(splits, f"{root}: {how}")


def read_folder(root: Path) -> tuple[list[str], dict[Split, list[str]]]:
    """Return the documents of a folder, and those of splits that its files or folders name.

    A .txt file is one document, a line of a .jsonl file is one: `{"text": …}`.

    Raises:
        ValueError: No documents, a file that is not UTF-8, or a line without text.
    """
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder of .txt or .jsonl files, got {root}")
    files = sorted(path for path in root.rglob("*") if path.suffix in (".txt", ".jsonl"))
    texts, given = list[str](), dict[Split, list[str]]()
    for file in files:
        found = [text for text in _read(file) if text.strip()]
        split = _split_of(file.relative_to(root))
        (texts if split is None else given.setdefault(split, [])).extend(found)
    if given and "train" in given:
        texts.extend(given.pop("train"))
    if not texts:
        what = "training text" if given else "text"
        raise ValueError(f"data.root must have {what} in .txt or .jsonl files, got none in {root}")
    return texts, given


def _split_of(path: Path) -> Split | None:
    """Return the split that the first folder, or the file at the top, is named by."""
    first = path.parts[0] if len(path.parts) > 1 else path.stem
    return _NAMED.get(first.lower())


def _read(file: Path) -> Iterator[str]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} must be UTF-8, got byte 0x{raw[error.start]:02x} at position {error.start:,}"
        ) from None
    if file.suffix == ".txt":
        yield text.replace("\r\n", "\n")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{file}, line {number}: must be JSON, got {line[:60]!r}") from None
        found = row.get("text") if isinstance(row, dict) else None
        if not isinstance(found, str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f'{file}, line {number}: must have "text", got {keys or "no keys"}')
        yield found


def _divide(
    texts: Sequence[str], given: dict[Split, list[str]], seed: int
) -> tuple[dict[Split, list[str]], str]:
    """Return the documents of each split, and how they were divided in words."""
    wanted: list[Split] = [split for split in ("test", "val") if split not in given]
    splits: dict[Split, list[str]] = {"train": [], "val": [], "test": [], **given}
    of = count(len(texts), "document")
    if not wanted:
        return {**splits, "train": list(texts)}, f"{of} for training, splits as the files name them"
    if len(texts) <= len(wanted):
        rest = "\n\n".join(texts)
        share = round(SHARE * len(rest))
        for split in wanted:
            rest, splits[split] = rest[: len(rest) - share], [rest[len(rest) - share :]]
        splits["train"] = [rest]
        shares = "/".join(["90", "10"] if len(wanted) == 1 else ["80", "10", "10"])
        return splits, f"{of} divided by position, {shares} % of its characters"
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    room = dict.fromkeys(wanted, SHARE * sum(map(len, texts)))
    places: dict[Split, list[int]] = {split: [] for split in ("train", "val", "test")}
    for number in order:
        fits = [split for split in wanted if len(texts[number]) <= room[split]]
        places[fits[0] if fits else "train"].append(number)
        if fits:
            room[fits[0]] -= len(texts[number])
    for split in wanted:
        if not places[split]:  # of a few long documents the shortest
            number = min(places["train"], key=lambda each: (len(texts[each]), each))
            places["train"].remove(number)
            places[split].append(number)
    for split in ("train", *wanted):
        splits[split] = [texts[number] for number in sorted(places[split])]
    sizes = ", ".join(f"{len(places[split])} {split}" for split in ("train", *reversed(wanted)))
    return splits, f"{of} divided whole by data seed: {sizes}".replace("data seed", "the seed")
