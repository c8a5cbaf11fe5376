"""Arrays are read from every kind of file alike, and what cannot be used is refused by name."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from selfkd.data import load_data

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(40, 3)) * [1, 100, 0.01] + [0, 1000, 0]
Y = np.arange(40) % 2
WORDS = np.where(Y == 1, "yes", "no")


def write_csv(path: Path, rows: Any, header: str | None = "a,b,c,label") -> Path:
    lines = [] if header is None else [header]
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def table(labels: Any = WORDS, x: Any = X) -> list[list[Any]]:
    return [[*map(repr, row), label] for row, label in zip(x.tolist(), labels, strict=True)]


def npz(path: Path) -> Path:
    np.savez(path / "a.npz", features=X, labels=WORDS)
    return path / "a.npz"


def npy(path: Path) -> Path:
    np.save(path / "X.npy", X)
    np.save(path / "y.npy", WORDS)
    return path


def csv(path: Path) -> Path:
    return write_csv(path / "a.csv", table())


def pandas_csv(path: Path) -> Path:
    rows = ([n, *row] for n, row in enumerate(table()))
    return write_csv(path / "a.csv", rows, ",a,b,c,Class")


def spaces(path: Path) -> Path:
    rows = [[*(f" {value}" for value in row), ""] for row in table()]
    return write_csv(path / "a.csv", rows, "a, b, c, label,")


def semicolons(path: Path) -> Path:
    path = write_csv(path / "a.csv", table())
    path.write_text("\ufeff" + path.read_text().replace(",", ";"))
    return path


def unheaded(path: Path) -> Path:
    return write_csv(path / "a.csv", table(), header=None)


def columns(path: Path) -> Path:
    names = {name: X[:, number] for number, name in enumerate("abc")}
    parquet.write_table(pa.table({"target": WORDS, **names}), path / "a.parquet")
    return path


def embeddings(path: Path) -> Path:
    parquet.write_table(pa.table({"embedding": X.tolist(), "kind": WORDS}), path / "a.parquet")
    return path / "a.parquet"


@pytest.mark.parametrize(
    "write", [npz, npy, csv, pandas_csv, spaces, semicolons, unheaded, columns, embeddings]
)
def test_every_kind_of_file_is_the_same_data(write: Callable[[Path], Path], tmp_path: Path) -> None:
    data = load_data("arrays", root=write(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (32, 4, 4)
    assert data.class_names == ("no", "yes")
    assert data.in_chans == 3
    assert data.image_size == 1
    rows = torch.cat([data.train.images, data.val.images, data.test.images])
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    order = rows[:, 0].argsort()
    wanted = X[:, 0].argsort()
    np.testing.assert_array_equal(rows[order].numpy(), X[wanted])
    np.testing.assert_array_equal(labels[order].numpy(), Y[wanted])
    assert [split.labels.bincount().tolist() for split in (data.val, data.test)] == [[2, 2]] * 2
    assert data.fingerprint == load_data("arrays", root=npz(tmp_path / "..")).fingerprint


def test_features_are_standardised_on_the_training_split(tmp_path: Path) -> None:
    x = np.column_stack([X, np.full(40, 0.1)])  # a constant column
    x[:, 0] += 1e9  # more than single precision has
    np.savez(tmp_path / "a.npz", x=x, y=Y)
    data = load_data("arrays", root=tmp_path / "a.npz")
    inputs, _, index = next(data.batches("train", batch_size=40))
    train = data.train.images.numpy()
    assert inputs.dtype == torch.float32
    assert data.std[3] == 1
    wanted = (train - train.mean(axis=0)) / [*train.std(axis=0)[:3], 1]
    np.testing.assert_allclose(inputs.numpy(), wanted, atol=1e-6)
    assert (inputs[:, 3] == 0).all()
    assert index.tolist() == list(range(32))


def test_given_splits_are_kept_and_others_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6], ids=Y)
    data = load_data("arrays", root=tmp_path / "a.npz")
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 6)
    assert data.note.endswith("left out: ids")
    (tmp_path / "b").mkdir()
    write_csv(tmp_path / "b" / "train.csv", table())
    swapped = [[b, a, c, label] for a, b, c, label in table()[:4]]
    write_csv(tmp_path / "b" / "valid.csv", swapped, "b,a,c,label")
    write_csv(tmp_path / "b" / "test.csv", table()[:8])
    data = load_data("arrays", root=tmp_path / "b")
    assert (len(data.train), len(data.val), len(data.test)) == (40, 4, 8)
    np.testing.assert_array_equal(data.val.images.numpy(), X[:4])
    same = load_data("arrays", root=tmp_path / "b", train_size=10, seed=1).train.images
    assert torch.equal(
        same, load_data("arrays", root=tmp_path / "b", train_size=10, seed=1).train.images
    )


def test_labels_are_classes_in_order(tmp_path: Path) -> None:
    labels = np.array([10.0, 9.0, -1.0, 9.0] * 10)
    np.savez(tmp_path / "a.npz", X.reshape(40, 3, 1), labels[:, None])
    data = load_data("arrays", root=tmp_path / "a.npz")
    assert data.class_names == ("-1", "9", "10")
    assert data.note.endswith("flattened from 3 x 1")
    write_csv(tmp_path / "b.csv", table(Y), "a,kind,c,b")
    data = load_data("arrays", root=tmp_path / "b.csv")
    assert data.note.endswith("labels are column b")
    assert data.class_names == ("0", "1")
    with pytest.raises(ValueError, match=r"b.csv.*got 'kin': did you mean 'kind'\?"):
        load_data("arrays", root=tmp_path / "b.csv", label_column="kin")


def save(**arrays: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        np.savez(path / "a.npz", **arrays)
        return path / "a.npz"

    return write


def lines(rows: Any, header: str | None = "a,b,c,label") -> Callable[[Path], Path]:
    return lambda path: write_csv(path / "a.csv", rows, header)


def pickled(path: Path) -> Path:
    (path / "X.npy").write_bytes(pickle.dumps(X))
    np.save(path / "y.npy", Y)
    return path


def other(x: Any, at: tuple[int, int], value: Any) -> Any:
    x = np.array(x)
    x[at] = value
    return x


def text_of(rows: list[list[Any]], at: tuple[int, int], value: str) -> list[list[Any]]:
    rows[at[0]][at[1]] = value
    return rows


def kaggle(path: Path) -> Path:
    write_csv(path / "train.csv", table())
    write_csv(path / "test.csv", [row[:3] for row in table()], "a,b,c")
    return path


def huge(path: Path) -> Path:
    np.save(path / "X.npy", X)
    with (path / "X.npy").open("r+b") as file:
        file.seek(0)
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)}
        np.lib.format.write_array_header_1_0(file, header)
    np.save(path / "y.npy", Y)
    return path


def bomb(path: Path) -> Path:
    """Write an archive whose directory says that it holds an exabyte."""
    npz(path)
    with zipfile.ZipFile(path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", b"")
        archive.getinfo("more.npy").file_size = 10**18
    return path / "a.npz"


def pipe(path: Path) -> Path:
    os.mkfifo(path / "a.csv")
    return path / "a.csv"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save(x=other(X, (6, 1), np.nan), y=Y), r"finite, got nan in row 7, column x1 of .*\(1 of"),
        (save(x=other(X, (0, 0), -np.inf), y=Y), "finite, got -inf in row 1, column x0"),
        (save(x=X, y=Y[:-1]), "as many rows, got 40 and 39"),
        (save(x=X.astype(object), y=Y), "got objects, which are never unpickled"),
        (save(x=X, y=WORDS.astype(object)), "got objects, which are never unpickled"),
        (pickled, r"X\.npy must have arrays .* never unpickled"),
        (save(x=X.astype(str), y=Y), "features must be numbers, got dtype <U"),
        (save(x=X + 1j, y=Y), "features must be numbers, got dtype complex"),
        (save(x=X[:, 0], y=Y), r"must be \[N, F\], got \[40\]"),
        (save(x=X, y=np.eye(2)[Y]), r"must be \[N\], got \[40, 2\].*argmax"),
        (save(x=X[:0], y=Y[:0]), "rows with features, got 0 rows of 3 features"),
        (save(x=X[:, :0], y=Y), "got 40 rows of 0 features"),
        (save(x=X, y=Y * 0), "at least 2 classes, got 0 alone"),
        (save(x=X, y=Y + 0.5), r"classes, whole numbers or words, got 0\.5 in row 1"),
        (save(x=X, y=other(Y * 1.0, (3,), np.nan)), "got nan in row 4"),
        (save(x=X, y=np.arange(40)), "got 40 different ones in 40 rows"),
        (save(x=X), r"features and labels of train, got x alone"),
        (huge, r"X\.npy must fit into memory"),
        (bomb, r"a\.npz must fit into memory, got 1,000,000,000 GB of data for"),
        (pipe, r"must be a file or folder, got .*a\.csv, a pipe or device"),
        (save(a=X, b=Y), "arrays x and y, or x_train and y_train, got a, b"),
        (save(x=X, data=X, y=Y), "one array of features for train, got x and data"),
        (save(x=X, y=Y, x_test=X), "features and labels of test, got x_test alone"),
        (save(x=X, y=Y, x_test=X[:, :2], y_test=Y), "must have the 3 features of .*, got 2"),
        (save(x=X, y=Y, x_test=X, y_test=Y + 1), "none of 2, which is in row 2 of"),
        (lines(text_of(table(), (4, 1), "tall")), "column 'b' of .* numbers, got 'tall' in row 5"),
        (lines(text_of(table(), (2, 0), "")), "column 'a' of .* number .*, got none in row 3"),
        (lines(text_of(table(), (2, 0), "inf")), "finite, got inf in row 3, column a"),
        (lines(text_of(table(), (2, 3), "")), "got '' in row 3"),
        (lines(table(X[:, 0])), "classes, whole numbers or words, got .* in row 1"),
        (lines(table(), "a,a,c,label"), "columns of different names, got 'a' twice"),
        (lines([["yes"], ["no"]], "label"), "columns of features and one of labels, got label"),
        (lines([]), "got 0 rows of 3 features"),
        (lines([*table(), [1, 2]]), "must be an intact table"),
        (kaggle, r"test\.csv must have the column of labels of the training split, 'label'"),
        (save(x=X * 1e304, y=Y), "finite standard deviation, got inf of feature 1"),
        (lambda path: path, "must be or hold a file .npz, .*, got no file"),
        (lambda path: path / "nowhere.csv", "must be an existing file or folder"),
    ],
)
def test_bad_input_is_refused_by_name(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data("arrays", root=write(tmp_path))


def test_a_table_that_only_compressed_fits_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pa.array(np.zeros(10**6, dtype=np.int8))
    parquet.write_table(pa.table({"a": rows, "label": rows}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match=r"a\.parquet must fit into memory"):
        load_data("arrays", root=tmp_path / "a.parquet")


def test_what_is_damaged_or_mixed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ValueError, match=r"a\.npz must be an intact file"):
        load_data("arrays", root=tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"x,y")
    with pytest.raises(ValueError, match=r"b\.npz must be a file of NumPy's own.* other content"):
        load_data("arrays", root=tmp_path / "b.npz")
    (tmp_path / "b.npz").unlink()
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.parquet must be an intact table"):
        load_data("arrays", root=tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"files of one kind, got \.npz, \.parquet"):
        load_data("arrays", root=tmp_path)
    with pytest.raises(ValueError, match=r"label_column must be left out .* no table"):
        load_data("arrays", root=npz(tmp_path), label_column="y")
    with pytest.raises(ValueError, match="image_size must be left out for arrays, got 8"):
        load_data("arrays", root=npz(tmp_path), image_size=8)
