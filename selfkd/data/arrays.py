"""Loading of arrays: features and labels in .npz, .npy, CSV or Parquet files, never unpickled."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch

from selfkd.errors import cut_text
from selfkd.text import one_line

from .batches import Split
from .folder import PARTS, default_val_size
from .sources import Source, Statistics
from .tables import LABELS, check_memory, read_features, read_table

Array = np.ndarray[Any, Any]

FEATURES = ("x", "features", "data", "inputs", "embeddings", "images")
"""Names of features, in lower case, in the order of preference."""
TABLES = (".csv", ".tsv", ".parquet")
SUFFIXES = (".npz", ".npy", *TABLES)
_FIRST_TWO = {"arr_0": "x", "arr_1": "y"}  # by np.savez without names


@dataclass(frozen=True, eq=False)
class Rows:
    """Features and labels of a file, or of one of its splits."""

    place: str
    """File, and what of it, for messages."""
    features: Array
    """Finite numbers `[N, F]`, float32 or float64."""
    labels: Array
    """Labels `[N]`: whole numbers or words."""
    names: tuple[str, ...]
    """Names of the features."""
    note: str = ""
    """What is to be said of how it was read."""
    label: str | None = None
    """Column of the labels, of a table."""


def open_arrays(root: Path, label_column: str | None = None) -> Source:
    """Open a file of arrays, or a folder of them, as a source of features.

    Args:
        root: A .npz, .csv, .tsv or .parquet file; or a folder with one of these, with one for each
            split by the names train, val and test, or with .npy files such as X_train and y_train.
        label_column: Column of a table that has the labels; by name, else the last, if not given.

    Returns:
        The source. Where there is no test split, val is the test split; where there is neither,
        both are taken from the training rows, stratified.

    Raises:
        FileNotFoundError: No file of arrays.
        ValueError: Features that are no finite numbers `[N, F]`, labels that are no classes, or
            splits that do not fit each other; the message names the first value and its row.
    """
    parts = _read(root, label_column)
    if "train" not in parts:
        found = ", ".join(rows.place for rows in parts.values())
        raise ValueError(f"data.root must hold a training split, got {found} alone in {root}")
    train = parts["train"]
    wanted, classes = _class_indices(train)
    splits = {}
    for part, rows in parts.items():
        features = _like(rows, train)
        labels = [wanted.get(label) for label in _plain(rows)]
        if None in labels:
            row = labels.index(None)
            raise ValueError(
                f"every class must have a training row, got none of {rows.labels[row]!s:.100}, "
                f"which is in row {row + 1} of {rows.place}"
            )
        splits[part] = Split(torch.from_numpy(features), torch.tensor(labels))
    pool = splits["train"]
    val = splits.get("val") if "test" in splits else None
    held_out = default_val_size(len(pool), len(classes))
    return Source(
        pool,
        classes,
        val_size=held_out if val is None else len(val),
        test=splits.get("test", splits.get("val")),
        val=val,
        test_size=held_out if len(splits) == 1 else 0,
        statistics=None,
        features=train.names,
        note=train.note
        and one_line(
            f"{root}: {sum(map(len, splits.values())):,} rows of {len(train.names):,} features, "
            f"{len(classes)} classes; {train.note}"
        ),
    )


def open_features(root: Path, names: Sequence[str]) -> Split:
    """Open arrays without labels, or whose labels do not count, as a split of features.

    Args:
        root: A .npz, .npy, .csv, .tsv or .parquet file, or a folder with one of these, with one
            array of features.
        names: Names of the features.

    Raises:
        FileNotFoundError: No file of arrays.
        ValueError: Several arrays of features or none, or other features than those of `names`.
    """
    files = _files(root)
    if {file.suffix.lower() for file in files} <= set(TABLES) and len(files) == 1:
        place, features = str(files[0]), read_features(files[0], names)
    else:
        loaded = [(file, _loaded(file)) for file in files]
        arrays = {
            (f"{file} ({name})" if name else str(file)): array
            for file, found in loaded
            for name, array in (found.items() if isinstance(found, dict) else [("", found)])
        }
        kept = {place: array for place, array in arrays.items() if array.ndim > 1} or arrays
        if len(kept) != 1:
            raise ValueError(
                f"{root} must hold one array of features [N, F], got {len(kept)}: "
                f"{', '.join(kept)[:200]}"
            )
        ((place, features),) = kept.items()
    rows = _checked_rows(features, np.zeros(len(features)), place, "")
    if len(rows.names) != len(names):
        raise ValueError(
            f"{place} must have the {len(names):,} features of the data, got {len(rows.names):,}"
        )
    return Split(torch.from_numpy(rows.features), torch.zeros(len(features), dtype=torch.int64))


def standardisation(features: torch.Tensor) -> Statistics:
    """Return mean and standard deviation of each feature; 1 for the std of a constant one.

    Args:
        features: Features of the training split `[N, F]`.

    Raises:
        ValueError: A standard deviation that is not finite.

    >>> standardisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    ((2.0, 5.0), (1.0, 1.0))
    """
    values = features.double()
    mean, std = values.mean(dim=0), values.std(dim=0, correction=0)
    constant = (values == values[0]).all(dim=0)  # else rounding errors would be scaled up
    mean, std = torch.where(constant, values[0], mean), torch.where(constant, 1.0, std)
    if not bool(std.isfinite().all()):
        number = int((~std.isfinite()).nonzero()[0])
        raise ValueError(
            f"features must have a finite standard deviation, got {std[number].item()} of feature "
            f"{number + 1}, whose largest value is {values[:, number].max().item():.4g}"
        )
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


# --- files ---


def _read(root: Path, label_column: str | None) -> dict[str, Rows]:
    """Return the rows of each split that there is, the checks of each done."""
    files = _files(root)
    kinds = {file.suffix.lower() for file in files}
    if label_column is not None and not kinds <= set(TABLES):
        raise ValueError(
            f"data.label_column must be left out where {root} holds no table, got {label_column!r}"
        )
    if kinds == {".npy"}:
        if root.is_file():
            raise ValueError(
                f"data.root must be the folder of .npy files, as of X.npy and y.npy, got {root}"
            )
        return _arrays({file.stem: _loaded(file) for file in files}, str(root))
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds))
        raise ValueError(f"data.root must hold arrays in files of one kind, got {names} in {root}")
    if len(files) == 1:
        if kinds == {".npz"}:
            return _arrays(_loaded(files[0]), str(files[0]))
        return {"train": _table(files[0], label_column)}
    found = dict[str, Rows]()
    for file in sorted(files, key=lambda file: list(PARTS.values()).index(_part(file) or "test")):
        part = _part(file)
        if part is None or part in found:
            raise ValueError(
                "data.root must hold one file, or one each of train, val and test, got "
                f"{', '.join(each.name for each in files[:8])} in {root}"
            )
        if file.suffix.lower() == ".npz":
            found[part] = _arrays(_loaded(file), str(file))["train"]
            continue
        like = found.get("train")
        found[part] = _table(file, label_column, like)
    return found


def _files(root: Path) -> list[Path]:
    files = [root]
    if root.exists() and not (root.is_file() or root.is_dir()):  # which would be waited for
        raise ValueError(f"data.root must be a file or folder, got {root}, a pipe or device")
    if root.is_dir():
        files = [f for f in sorted(root.iterdir()) if f.is_file() and not f.name.startswith(".")]
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        names = ", ".join(file.name for file in files[:8]) or "no file"
        raise FileNotFoundError(
            f"data.root must be or hold a file {', '.join(SUFFIXES)}, got {names}"
            + (f" in {root}" if root.is_dir() else "")
        )
    return found


def _part(file: Path) -> str | None:
    """Return the split that a file's name has a word for."""
    found = {PARTS[word] for word in _words(file.stem) if word in PARTS}
    return found.pop() if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _loaded(file: Path) -> Any:
    """Return the array of a .npy file, or those of a .npz file by name; nothing is unpickled."""
    with suppress(OSError, BadZipFile), ZipFile(file) as archive:
        check_memory(file, sum(part.file_size for part in archive.infolist()))
    try:
        found = np.load(file, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else dict(found)
    except MemoryError as error:  # by the shape that its header has
        raise ValueError(f"{file} must fit into memory: {error}") from None
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) and not _may_hold_arrays(file):
            raise ValueError(
                f"{file} must be a file of NumPy's own, by np.save or np.savez, got other content"
            ) from None
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{file} must have arrays of numbers or words, got objects, which are never "
                "unpickled: save them by array.astype(float), labels by array.astype(str)"
            ) from None
        raise ValueError(f"{file} must be an intact file of NumPy arrays: {error}") from None


def _may_hold_arrays(file: Path) -> bool:
    """Return whether a file begins as an array of NumPy, an archive of them, or a pickle."""
    with file.open("rb") as opened:
        return opened.read(6).startswith((b"\x93NUMPY", b"PK", b"\x80"))


def _arrays(arrays: Mapping[str, Array], place: str) -> dict[str, Rows]:
    """Return the rows of each split, whose arrays have names such as x_train and y_train."""
    found, left_out = dict[tuple[str, str], str](), list[str]()
    for name in arrays:
        words = _words(_FIRST_TWO.get(name, name))
        kinds = ["x" if w in FEATURES else "y" for w in words if w in (*FEATURES, *LABELS)]
        parts = [PARTS[word] for word in words if word in PARTS]
        if len(kinds) != 1 or len(parts) > 1 or len(words) > len(kinds) + len(parts):
            left_out.append(name)
            continue
        key = (parts[0] if parts else "train", kinds[0])
        if key in found:
            raise ValueError(
                f"{place} must have one array of {'features' if key[1] == 'x' else 'labels'} for "
                f"{key[0]}, got {found[key]} and {name}"
            )
        found[key] = name
    note = f"left out: {cut_text(', '.join(left_out), 200)}" if left_out else ""
    rows = dict[str, Rows]()
    for part in dict.fromkeys(part for part, _ in found):
        x, y = found.get((part, "x")), found.get((part, "y"))
        if x is None or y is None:
            raise ValueError(
                f"{place} must have features and labels of {part}, got {x or y} alone "
                f"(arrays: {cut_text(', '.join(arrays), 200)}): name them x_{part} and y_{part}"
            )
        rows[part] = _checked_rows(arrays[x], arrays[y], f"{place} ({x}, {y})", note)
    if "train" not in rows:
        names = cut_text(", ".join(arrays), 200) or "none"
        raise ValueError(f"{place} must have arrays x and y, or x_train and y_train, got {names}")
    return rows


def _checked_rows(x: Array, y: Array, place: str, note: str) -> Rows:
    """Return features `[N, ...]` and labels of NumPy as rows."""
    if x.dtype.kind not in "fiub":
        raise ValueError(f"features must be numbers, got dtype {x.dtype} in {place}")
    if x.ndim < 2:
        raise ValueError(f"features must be [N, F], got {list(x.shape)} in {place}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        way = ": of one-hot labels take .argmax(axis=1)" if y.ndim == 2 else ""
        raise ValueError(f"labels must be [N], got {list(y.shape)} in {place}{way}")
    if len(x) != len(y):
        raise ValueError(
            f"features and labels must have as many rows, got {len(x):,} and {len(y):,} in {place}"
        )
    if x.ndim > 2:
        flat = f"flattened from {' x '.join(map(str, x.shape[1:]))}"
        note = f"{flat}; {note}" if note else flat
        x = x.reshape(len(x), -1)
    if x.dtype.itemsize > 4 and x.dtype.kind != "b":
        x = x.astype(np.float64)
    else:
        x = x.astype(np.float32)
    names = tuple(f"x{number}" for number in range(x.shape[1]))
    return _finite(Rows(place, x, y, names, note))


def _table(file: Path, label_column: str | None, like: Rows | None = None) -> Rows:
    table = read_table(
        file, label_column if like is None else like.label, None if like is None else like.names
    )
    note = f"labels are column {table.label}"
    if table.unnamed:
        note += "; left out: a column without a name" + f" ({table.unnamed})" * (table.unnamed > 1)
    return _finite(Rows(str(file), table.features, table.labels, table.names, note, table.label))


# --- checks ---


def _finite(rows: Rows) -> Rows:
    features = rows.features
    if not features.size:
        raise ValueError(
            f"data.root must have rows with features, got {len(features)} rows of "
            f"{features.shape[1]} features in {rows.place}"
        )
    finite = np.isfinite(features)
    if not finite.all():
        row, column = (int(n) for n in np.argwhere(~finite)[0])
        many = int((~finite).any(axis=1).sum())
        raise ValueError(
            f"features must be finite, got {features[row, column]} in row {row + 1}, column "
            f"{rows.names[column]} of {rows.place} ({many:,} of {len(features):,} rows have such "
            "values): fill them in or leave these rows out"
        )
    return rows


def _like(rows: Rows, train: Rows) -> Array:
    if rows.names != train.names:
        raise ValueError(
            f"{rows.place} must have the {len(train.names)} features of {train.place}, got "
            f"{len(rows.names)}"
        )
    return rows.features.astype(train.features.dtype, copy=False)


def _plain(rows: Rows) -> Sequence[int | str]:
    """Return labels as whole numbers or words.

    Raises:
        ValueError: A label is neither.
    """
    labels = rows.labels
    if labels.dtype.kind == "f":
        bad = np.flatnonzero(~(np.isfinite(labels) & (labels == np.round(labels))))
        if len(bad):
            _refuse(rows, int(bad[0]))
        labels = labels.astype(np.int64)
    elif labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    elif labels.dtype.kind == "b":
        labels = labels.astype(str)
    elif labels.dtype.kind not in "iuU":
        raise ValueError(
            f"labels must be whole numbers or words, got dtype {labels.dtype} in {rows.place}"
        )
    found: list[int | str] = labels.tolist()
    if "" in found:
        _refuse(rows, found.index(""))
    return found


def _refuse(rows: Rows, row: int) -> None:
    raise ValueError(
        "labels must be classes, whole numbers or words, got "
        f"{cut_text(repr(rows.labels[row].item()), 100)} in row {row + 1} of {rows.place}"
    )


def _class_indices(train: Rows) -> tuple[dict[int | str, int], tuple[str, ...]]:
    """Return the index of each label, and the names of the classes."""
    found = sorted(set(_plain(train)))
    rows, count = len(train.labels), len(found)
    if count < 2:
        raise ValueError(
            f"labels must be of at least 2 classes, got {found[0]!s:.100} alone in {train.place}"
        )
    if count > max(2, rows / 2):
        raise ValueError(
            f"labels must be classes with several rows each, got {count:,} different ones in "
            f"{rows:,} rows of {train.place}: numbers to be predicted are not supported"
        )
    return {label: index for index, label in enumerate(found)}, tuple(map(str, found))
