"""Tables in CSV and Parquet files, as features and labels."""

from __future__ import annotations

import csv
import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfkd.errors import cut_text

Array = np.ndarray[Any, Any]

LABELS = ("label", "labels", "target", "targets", "class", "y")
"""Names of labels, in lower case, in the order of preference."""
_PANDAS_INDEX, _PARQUET_INDEX = "unnamed: 0", "__index_level_0__"  # row numbers


@dataclass(frozen=True, eq=False)
class Table:
    """Features and labels of a table."""

    features: Array
    """Numbers `[N, F]`, float32 where all columns are, else float64."""
    labels: Array
    """Labels `[N]`, whole numbers, numbers or words."""
    names: tuple[str, ...]
    """Names of the features; NAME[i] for the elements of a column of lists."""
    label: str
    """Name of the column of labels."""
    unnamed: int
    """Number of columns without a name, which are left out."""


def read_table(file: Path, label: str | None, like: Sequence[str] | None = None) -> Table:
    """Read a CSV or Parquet file.

    A column without a name, such as the row numbers that pandas writes, is left out.

    Args:
        file: File .csv, .tsv or .parquet.
        label: Column of the labels; else the first of `LABELS` by name, else the last.
        like: Names and order of the features; all columns but that of the labels if not given.

    Raises:
        ValueError: A file that is no such table, or a column that is no number; the message names
            the first such value and its row.
    """
    table = _open(file, label, whole=like is None)
    columns = {name: n for n, name in enumerate(table.column_names) if not _is_index(n, name)}
    if len(columns) < 2:
        raise ValueError(
            f"{file} must have columns of features and one of labels, got "
            f"{', '.join(columns) or 'none'}"
        )
    own = _label_of(file, list(columns), label, whole=like is None)
    labels = _labels(file, own, table.column(columns.pop(own)))
    features, names = _features(file, table, columns, like)
    unnamed = table.num_columns - len(columns) - 1
    return Table(features, labels, names, own, unnamed)


def read_features(file: Path, like: Sequence[str]) -> Array:
    """Read features of a CSV or Parquet file without labels, `[N, F]`.

    Args:
        file: File .csv, .tsv or .parquet.
        like: Names and order of the features; other columns are left out.

    Raises:
        ValueError: A file that is no such table, without one of the features, or a value that is no
            number; the message names it.
    """
    table = _open(file, None, whole=True)
    columns = {name: number for number, name in enumerate(table.column_names)}
    return _features(file, table, columns, like)[0]


def check_memory(file: Path, size: int) -> None:
    """Check that what a file holds fits into memory, before it is read.

    A few kilobytes of a compressed file can stand for more than any machine has.

    Args:
        file: File, for the message.
        size: Size of its content in bytes.

    Raises:
        ValueError: The machine has less.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"{file} must fit into memory, got {size / 1e9:,.0f} GB of data for "
            f"{memory / 1e9:,.0f} GB: keep fewer rows or features"
        )


def _features(
    file: Path, table: Any, columns: Mapping[str, int], like: Sequence[str] | None
) -> tuple[Array, tuple[str, ...]]:
    """Return features `[N, F]` and their names: of all columns, or those that are wanted."""
    parts, wanted = dict[str, Array](), set(like or ())
    for name, number in columns.items():
        if like is not None and not wanted & {name, f"{name}[0]"}:
            continue
        values = _numbers(file, name, table.column(number))
        if values.ndim == 1:
            parts[name] = values
        else:
            parts |= {f"{name}[{i}]": column for i, column in enumerate(values.T)}
    names = tuple(parts) if like is None else tuple(like)
    if missing := [name for name in names if name not in parts]:
        raise ValueError(
            f"{file} must have the features of the data, got none named {missing[0]!r}"
        )
    found = [parts[name] for name in names]
    return np.column_stack(found) if found else np.zeros((table.num_rows, 0)), names


def _open(file: Path, label: str | None, *, whole: bool) -> Any:
    """Return a table of pyarrow, its labels in CSV as text."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"data.root holds a table, for which pyarrow is not installed: {file}: pip install "
            "pyarrow"
        ) from None
    try:
        if file.suffix.lower() == ".parquet":
            from pyarrow import parquet

            opened = parquet.ParquetFile(file)
            facts = opened.metadata  # a column of one value takes no room in the file
            check_memory(file, facts.num_rows * facts.num_columns * 8)
            table = opened.read()
        else:
            table = _open_csv(file, label, whole=whole)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        reason = cut_text(" ".join(str(error).split()), 300)
        raise ValueError(f"{file} must be an intact table: {reason}") from None
    names = table.column_names
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"{file} must have columns of different names, got {twice!r} twice")
    return table


def _open_csv(file: Path, label: str | None, *, whole: bool) -> Any:
    import pyarrow
    from pyarrow import csv as reader

    with file.open(encoding="utf-8-sig", newline="") as text:
        first = text.readline()
        marks = {mark: first.count(mark) for mark in ",;\t"}
        delimiter = "\t" if file.suffix.lower() == ".tsv" else max(marks, key=marks.__getitem__)
        names = next(csv.reader([first], delimiter=delimiter), [])
    if not names:
        raise ValueError(f"{file} must have a header and rows, got an empty first line")
    headed = not _is_data(names)
    if not headed:
        names = [f"column {number}" for number in range(1, len(names) + 1)]
    own = _label_of(file, [name for name in names if name] or names, label, whole=whole)
    table = reader.read_csv(
        file,
        read_options=reader.ReadOptions(column_names=None if headed else names),
        parse_options=reader.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=reader.ConvertOptions(column_types={own: pyarrow.string()}),
    )
    return table.rename_columns([name.strip() for name in table.column_names])


def _is_data(names: Sequence[str]) -> bool:
    """Say whether the first line of a CSV file is no header: all but its last field are numbers.

    >>> _is_data(["5.1", "3.5", "setosa"]), _is_data(["0", "1", "label"]), _is_data(["x", "y"])
    (True, False, False)
    """
    numbered = [str(number) for number in range(len(names) - 1)]  # the header of a DataFrame
    has_label = any(name.strip().lower() in LABELS for name in names)
    return not has_label and names[:-1] != numbered and all(map(_is_number, names[:-1]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_index(number: int, name: str) -> bool:
    name = name.strip().lower()
    return name in ("", _PARQUET_INDEX) or (number == 0 and name == _PANDAS_INDEX)


def _label_of(file: Path, names: Sequence[str], label: str | None, *, whole: bool) -> str:
    """Return the column of the labels.

    Args:
        file: File, for messages.
        names: Names of the columns.
        label: Column of the labels, where it is given.
        whole: Whether the file is no split beside that of training.
    """
    if label is not None:
        label = next((name for name in names if name.strip() == label.strip()), label)
        if label not in names and not whole:
            raise ValueError(
                f"{file} must have the column of labels of the training split, {label!r}, got none:"
                " leave the file out, and a part of the training rows is held out"
            )
        if label not in names:
            close = difflib.get_close_matches(label, names, n=1)
            known = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
            raise ValueError(
                f"data.label_column must be a column of {file}, got {label!r}"
                + (f": did you mean {close[0]!r}?" if close else f", which has {known}")
            )
        return label
    found = {name.strip().lower(): name for name in reversed(names)}
    return next((found[name] for name in LABELS if name in found), names[-1])


def _labels(file: Path, name: str, column: Any) -> Array:
    """Return labels; whole numbers where all of a text column are."""
    if column.null_count:
        raise ValueError(
            f"column {name!r} of {file} must have a label in each row, got none in row "
            f"{_first(column.is_null()) + 1}"
        )
    values = column.to_pylist()
    if all(isinstance(value, str) for value in values):
        values = [value.strip() for value in values]
        with_numbers = _as_numbers(values)
        return np.array(values if with_numbers is None else with_numbers)
    if all(isinstance(value, bool | int | float) for value in values):
        return np.array(values)
    return np.array([str(value) for value in values])


def _as_numbers(values: Sequence[str]) -> list[int] | list[float] | None:
    """Return texts as numbers, if all are."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return None


def _first(where: Any) -> int:
    """Return the position of the first true value of a column."""
    return int(np.flatnonzero(where.to_numpy())[0])


def _numbers(file: Path, name: str, column: Any) -> Array:
    """Return a column as numbers `[N]`, or one of lists as `[N, length]`."""
    from pyarrow import types

    if column.null_count:
        row = _first(column.is_null()) + 1
        raise ValueError(
            f"column {name!r} of {file} must have a number in each row, got none in row {row}: "
            "fill it in or leave the row out"
        )
    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(file, name, column)
    if _is_numeric(kind):
        return _as_floats(column.to_numpy())
    if types.is_decimal(kind):
        return np.asarray(column.cast("float64").to_numpy())
    for row, value in enumerate(_plain_values(column), start=1):
        if not isinstance(value, str) or not _is_number(value):
            raise ValueError(
                f"column {name!r} of {file} must be numbers, got {cut_text(repr(value), 100)} in "
                f"row {row}: leave the column out, or write its categories as numbers"
            )
    return np.array([float(value) for value in column.to_pylist()])


def _plain_values(column: Any) -> Iterator[Any]:
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def _lists(file: Path, name: str, column: Any) -> Array:
    from pyarrow import compute

    lengths = compute.list_value_length(column).to_numpy()
    if not lengths.any():
        return np.zeros((len(column), 0))
    values = column.combine_chunks().flatten()
    if _is_numeric(values.type) and not values.null_count and (lengths == lengths[0]).all():
        return _as_floats(values.to_numpy(zero_copy_only=False)).reshape(len(column), lengths[0])
    row, items = next(
        (row, items)
        for row, items in enumerate(_plain_values(column), start=1)
        if len(items) != lengths[0]
        or not all(isinstance(item, bool | int | float) for item in items)
    )
    raise ValueError(
        f"column {name!r} of {file} must have lists of {lengths[0]} numbers, got "
        f"{cut_text(repr(items), 100)} in row {row}"
    )


def _is_numeric(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind))


def _as_floats(values: Array) -> Array:
    return values.astype(np.float32 if values.dtype == np.float32 else np.float64)
