"""Documents of text, or prompts, and their splits: of Python itself, generated, or the user's."""

from __future__ import annotations

import os
import platform
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfkd.analysis.verdicts import count
from selfkd.data.folder import list_left_out
from selfkd.storage.remote import as_path
from selfkd.tasks.task import Split
from selfkd.tasks.text import arithmetic
from selfkd.tasks.text.docstrings import read_docstrings
from selfkd.tasks.text.example import Example as Example
from selfkd.tasks.text.folder import Found, read_folder
from selfkd.text import one_line

DATASETS = ("pydoc", "docstrings", "arithmetic", "text")
SHARE = 0.1  # of the characters, for validation and for test

Piece = str | Example
"""Document, or prompt and what follows it."""


@dataclass(frozen=True)
class Documents:
    """Documents by split, or examples."""

    splits: Mapping[Split, Sequence[Piece]]
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
    characters each; what has the same text or the same prompt is drawn together. Fewer than three
    documents are divided by position instead: a tenth at the end is for test and the tenth before
    it for validation. What has a split of its own by the name of a file or folder (train, val,
    test) stays in it.

    Args:
        name: `pydoc`, `docstrings`, `arithmetic` or `text`.
        root: Folder of `text`.
        seed: Seed of the division, or of the problems.
        train_size: Number of problems of `arithmetic` for training; its default when not given.
        val_size: Number of its problems for validation, and for test.

    Raises:
        ValueError: An unknown name, files that are not as they must be, or a prompt that stands in
            two splits; says which and where.
    """
    if name in ("pydoc", "docstrings"):
        texts = _read_pydoc() if name == "pydoc" else read_docstrings()
        splits, how = _divide(texts, {}, seed, range(len(texts)))
        return Documents(splits, f"{name} of Python {platform.python_version()}: {how}")
    if name == "arithmetic":
        return Documents(*arithmetic.load(train_size, val_size, seed))
    if name != "text":
        known = f"{', '.join(DATASETS[:-1])} or {DATASETS[-1]}"
        raise ValueError(f"data.name must be {known} with task text, got {name!r}")
    root = root or os.environ.get("SELFKD_DATA")
    if not root:
        raise ValueError("data.root must be a folder of .txt or .jsonl files, got none")
    return _load_root(as_path(root).expanduser(), seed)


def load_pool(name: str, root: str | None, seed: int) -> tuple[list[Piece], str]:
    """Return the documents of a dataset that have no split of validation or test of their own.

    Args:
        name: `pydoc`, `docstrings`, `arithmetic` or `text`.
        root: Folder of `text`.
        seed: Seed of the problems of `arithmetic`.

    Returns:
        The documents or prompts, and where they come from.

    Raises:
        ValueError: An unknown name, or files that are not as they must be.
    """
    if name in ("pydoc", "docstrings"):
        return list(_read_pydoc() if name == "pydoc" else read_docstrings()), name
    if name == "arithmetic":
        return list(arithmetic.load(None, None, seed)[0]["train"]), name
    if name != "text":
        known = f"{', '.join(DATASETS[:-1])} or {DATASETS[-1]}"
        raise ValueError(f"data.transfer.name must be {known} with task text, got {name!r}")
    path = as_path(root).expanduser() if root else None
    if path is None or not path.is_dir():
        raise ValueError(
            f"data.transfer.root must be a folder of .txt or .jsonl files, got {root or 'none'}"
        )
    try:
        pieces, _ = _collect(read_folder(path, left_out := Counter[str]()), left_out)
    except ValueError as error:
        raise ValueError(str(error).replace("data.root must", "data.transfer.root must")) from None
    if not pieces:
        raise ValueError(f"data.transfer.root must have text, got none in {path}")
    without = f"; left out: {list_left_out(left_out)}" if left_out else ""
    return pieces, one_line(f"{path}{without}")


def _read_pydoc() -> list[str]:
    from pydoc_data.topics import topics  # half a megabyte of source

    return [text for _, text in sorted(topics.items())]


def _load_root(root: Path, seed: int) -> Documents:
    """Return the documents of a folder."""
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder of .txt or .jsonl files, got {root}")
    left_out = Counter[str]()
    pieces, given = _collect(read_folder(root, left_out), left_out)
    if not pieces:
        what = "training text" if given else "text"
        raise ValueError(f"data.root must have {what}, got none in {root}")
    for split, own in given.items():
        if not own:
            raise ValueError(
                f"data.root must have text for {split}, got empty files of it in {root}"
            )
    splits, how = _divide(pieces, given, seed, [piece_key(piece) for piece in pieces])
    repeated = _check_apart(splits)
    without = f"; left out: {list_left_out(left_out)}" if left_out else ""
    return Documents(splits, one_line(f"{root}: {how}{repeated}{without}"))


def _collect(
    found: Iterable[Found], left_out: Counter[str]
) -> tuple[list[Piece], dict[Split, list[Piece]]]:
    """Return what is to be divided, and what has a split of its own besides training.

    Args:
        found: Pieces, and where they stand.
        left_out: Number of what is not read, by type; empty documents are counted here.
    """
    pieces, given = list[Piece](), dict[Split, list[Piece]]()
    first: tuple[str, Piece] | None = None
    for split, place, piece in found:
        own = pieces if split in (None, "train") else given.setdefault(split, [])
        if isinstance(piece, str) and not piece.strip():
            left_out["empty document"] += 1
            continue
        first = first or (place, piece)
        if type(first[1]) is not type(piece):
            kinds = ("a document", "a prompt")[:: 1 if isinstance(piece, Example) else -1]
            raise ValueError(
                f"data.root must have documents or prompts, not both, got {kinds[0]} in {first[0]} "
                f"and {kinds[1]} in {place}"
            )
        own.append(piece)
    return pieces, given


def piece_key(piece: Piece) -> str:
    """Return what pieces of one split share: the text of a document, or the prompt."""
    return piece.prompt if isinstance(piece, Example) else piece


def _check_apart(splits: Mapping[Split, Sequence[Piece]]) -> str:
    """Check that no prompt stands in two splits; return the number of documents that do, in words.

    Raises:
        ValueError: A prompt that stands in two splits; says where.
    """
    known, twice = dict[str, tuple[Split, Piece]](), 0
    for split, pieces in splits.items():
        for piece in pieces:
            other, first = known.setdefault(piece_key(piece), (split, piece))
            if other == split:
                continue
            twice += 1
            if isinstance(piece, Example) and isinstance(first, Example):
                raise ValueError(
                    f"a prompt must stand in one split only, got {piece.prompt[:60]!r} in {other} "
                    f"({first.place}) and in {split} ({piece.place})"
                )
    return f"; {count(twice, 'document')} also in another split" if twice else ""


def _divide(
    pieces: Sequence[Piece],
    given: Mapping[Split, list[Piece]],
    seed: int,
    keys: Sequence[Hashable],
) -> tuple[dict[Split, list[Piece]], str]:
    """Return the pieces of each split, and how they were divided in words.

    Args:
        pieces: Pieces that are divided.
        given: Pieces of splits that are not drawn.
        seed: Seed of the draws.
        keys: Key of each piece; those of one key are drawn together.
    """
    wanted: list[Split] = [split for split in ("test", "val") if split not in given]
    splits: dict[Split, list[Piece]] = {"train": [], "val": [], "test": [], **given}
    prompted = isinstance(pieces[0], Example)
    of = count(len(pieces), "prompt" if prompted else "document")
    if not wanted:
        splits["train"] = list(pieces)
        return splits, f"{of} for training, splits as the files name them"
    groups = dict[Hashable, list[int]]()
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    if prompted and len(groups) <= len(wanted):
        raise ValueError(
            f"data.root must have at least {len(wanted) + 1} different prompts, to draw "
            f"{' and '.join(reversed(wanted))} from, got {len(groups)}"
        )
    if len(groups) <= len(wanted):
        rest = "\n\n".join(str(piece) for piece in pieces)
        share = round(SHARE * len(rest))
        for split in wanted:
            rest, splits[split] = rest[: len(rest) - share], [rest[len(rest) - share :]]
        splits["train"] = [rest]
        shares = "/".join(["90", "10"] if len(wanted) == 1 else ["80", "10", "10"])
        return splits, f"{of} divided by position, {shares} % of its characters"
    places = _draw(list(groups.values()), [len(str(piece)) for piece in pieces], wanted, seed)
    for split in ("train", *wanted):
        splits[split] = [pieces[number] for number in sorted(places[split])]
    sizes = ", ".join(f"{len(places[split])} {split}" for split in ("train", *reversed(wanted)))
    return splits, f"{of} divided whole by the seed: {sizes}"


def _draw(
    groups: Sequence[list[int]], sizes: Sequence[int], wanted: Sequence[Split], seed: int
) -> dict[Split, list[int]]:
    """Return the numbers of the pieces of each split, whose groups are drawn whole.

    Args:
        groups: Numbers of the pieces of each group, more groups than splits that are drawn.
        sizes: Number of characters of each piece.
        wanted: Splits that are drawn beside training.
        seed: Seed of the draws.
    """
    lengths = [sum(sizes[number] for number in group) for group in groups]
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    room = dict.fromkeys(wanted, SHARE * sum(lengths))
    places: dict[Split, list[int]] = {split: [] for split in ("train", "val", "test")}
    for number in order:
        fits = [split for split in wanted if lengths[number] <= room[split]]
        places[fits[0] if fits else "train"].append(number)
        if fits:
            room[fits[0]] -= lengths[number]
    for split in wanted:
        if not places[split]:  # of a few long documents the shortest
            number = min(places["train"], key=lambda each: (lengths[each], each))
            places["train"].remove(number)
            places[split].append(number)
    return {split: [n for own in numbers for n in groups[own]] for split, numbers in places.items()}
