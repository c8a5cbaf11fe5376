"""Image data sets saved by the library `datasets`: their columns, splits and pictures."""

import json
import os
import pickle
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfkd.data import load_data
from selfkd.data.decode import decode
from selfkd.data.saved import SavedPictures
from selfkd.data.stream import Stream

CLASSES = ("ant", "bee", "cat")


def test_without_the_library_its_pip_line_is_given(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for missing in (None, type(sys)("datasets")):  # not installed; another module of that name
        monkeypatch.setitem(sys.modules, "datasets", missing)
        with pytest.raises(
            ValueError, match=r"of the library datasets, .*pip install 'selfkd\[dat"
        ):
            load_data("folder", root=tmp_path)


datasets = pytest.importorskip("datasets")
FEATURES = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))}


datasets.disable_progress_bars()


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [
        Image.fromarray(draw.integers(0, 256, (10 + i % 3, 12, 3), dtype=np.uint8))
        for i in range(count)
    ]


def make(count: int, seed: int = 0, **columns):
    values = {"photo": pictures(count, seed), "kind": [i % 3 for i in range(count)]}
    features = FEATURES | {name: feature for name, (feature, _) in columns.items()}
    values |= {name: given for name, (_, given) in columns.items()}
    values = {name: value for name, value in values.items() if value is not None}
    features = {name: feature for name, feature in features.items() if name in values}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def save(root: Path, **splits: int) -> Path:
    made = {name: make(count, seed) for seed, (name, count) in enumerate(splits.items())}
    datasets.DatasetDict(made).save_to_disk(root)
    return root


def as_folder(root: Path, **splits: int) -> Path:
    """Write the same pictures as files."""
    for seed, (part, count) in enumerate(splits.items()):
        for i, picture in enumerate(pictures(count, seed)):
            path = root / part / CLASSES[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return root


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_splits_are_those_of_a_folder(tmp_path, val, in_memory):
    saved = save(tmp_path / "saved", train=24, **{val: 9}, test=6)
    ours = load_data("folder", root=saved, in_memory=in_memory)
    files = as_folder(tmp_path / "files", train=24, val=9, test=6)
    theirs = load_data("folder", root=files)
    assert ours.class_names == theirs.class_names == CLASSES
    assert ours.image_size == theirs.image_size == 11
    for name in ("train", "val", "test"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.labels.bincount().equal(other.labels.bincount())
        images = one.images if in_memory else decode(one.images)
        order = one.labels.argsort(stable=True)  # files are listed by class
        assert images[order].equal(other.images)
    assert ours.note == theirs.note.replace(str(files), str(saved)) != ""


def test_streams_of_worker_processes(tmp_path):
    data = load_data("folder", root=save(tmp_path, train=24, test=6), in_memory=False)
    again = pickle.loads(pickle.dumps(data.test.images))
    assert torch.equal(decode(again), decode(data.test.images))
    read = data.batches("test", batch_size=4, workers=1)
    alone = data.batches("test", batch_size=4)
    assert all(a[0].equal(b[0]) for a, b in zip(read, alone, strict=True))


@pytest.mark.parametrize("kind", ["one", "dict"])
def test_of_a_single_split_validation_and_test_are_taken(tmp_path, kind):
    whole = make(60)
    (whole if kind == "one" else datasets.DatasetDict({"train": whole})).save_to_disk(tmp_path)
    data = load_data("folder", root=tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [48, 6, 6]
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    parts = [data.train.images, data.val.images, data.test.images]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 60
    again = load_data("folder", root=tmp_path, train_size=12)
    assert again.test.images.equal(data.test.images)


def test_splits_that_were_saved_one_by_one(tmp_path):
    for name, count in (("train", 24), ("test", 6)):
        make(count).save_to_disk(tmp_path / name)
    data = load_data("folder", root=tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [21, 3, 6]


def test_other_splits_are_said_to_be_left_out(tmp_path):
    data = load_data("folder", root=save(tmp_path, train=24, test=6, extra=9))
    assert data.note.endswith("left out: 9 of split extra")


@pytest.mark.parametrize("form", ["numpy", "torch", None])
def test_other_columns_and_formats_do_not_matter(tmp_path, form):
    more = {
        "caption": (datasets.Value("string"), ["x"] * 24),
        "boxes": (datasets.List(datasets.Value("int64")), [[1, 2]] * 24),
        "crops": (datasets.List(datasets.Image()), [pictures(1)] * 24),
    }
    with_more = make(24, **more).with_format(form)
    datasets.DatasetDict({"train": with_more, "test": make(6, 1)}).save_to_disk(tmp_path / "a")
    plain = load_data("folder", root=save(tmp_path / "b", train=24, test=6))
    assert load_data("folder", root=tmp_path / "a").train.images.equal(plain.train.images)


def test_selected_rows_of_a_data_set(tmp_path):
    """Saved with a table of indices."""
    make(60).shuffle(seed=0).select(range(30)).save_to_disk(tmp_path)
    assert len(load_data("folder", root=tmp_path).train) == 24


def test_pictures_are_read_as_files_are(tmp_path):
    exif, draw = Image.Exif(), np.random.default_rng(0)
    exif[0x0112] = 6
    files = []
    for kind in ("alpha", "wide", "turned"):
        pixels = draw.integers(0, 256, (10, 10, 4), dtype=np.uint8)
        file = tmp_path / f"{kind}.png"
        if kind == "wide":
            Image.fromarray(draw.integers(0, 65536, (10, 10), dtype=np.uint16)).save(file)
        else:
            Image.fromarray(pixels).save(file, **({"exif": exif} if kind == "turned" else {}))
        for part in ("train", "test"):
            for name in CLASSES:
                path = tmp_path / "files" / part / name / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read_bytes())
        files.append({"bytes": file.read_bytes(), "path": file.name})
    values = {"photo": files * 3, "kind": [0] * 3 + [1] * 3 + [2] * 3}
    part = datasets.Dataset.from_dict(values, features=datasets.Features(FEATURES))
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    ours = load_data("folder", root=tmp_path / "saved").test.images
    theirs = load_data("folder", root=tmp_path / "files").test.images
    assert sorted(ours.flatten(1).tolist()) == sorted(theirs.flatten(1).tolist())


def age(root: Path) -> None:
    """Let all files be an hour old."""
    then = time.time() - 3600
    for path in root.rglob("*.*"):
        os.utime(path, (then, then))


@pytest.mark.parametrize("in_memory", [None, False])
def test_pictures_are_decoded_once(tmp_path, cache, decoded, in_memory):
    root = save(tmp_path / "saved", train=24, test=6)
    age(root)
    first, again = (load_data("folder", root=root, in_memory=in_memory) for _ in range(2))
    assert sorted(decoded) == [3, 6, 21]
    assert first.fingerprint == again.fingerprint
    for name in ("train", "val", "test"):
        one, other = getattr(first, name).images, getattr(again, name).images
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    make(24, seed=9).save_to_disk(root / "train")
    age(root / "train")
    load_data("folder", root=root, in_memory=in_memory)
    assert sorted(decoded) == [3, 3, 6, 21, 21]


def test_of_pictures_in_files_of_their_own_changes_are_not_known(tmp_path):
    as_folder(tmp_path / "files", train=24)
    settings = {"data_dir": tmp_path / "files", "cache_dir": tmp_path / "cache", "split": "train"}
    dataset = datasets.load_dataset("imagefolder", **settings)
    assert dataset.cache_files
    age(tmp_path / "cache")
    files = dataset.cast_column("image", datasets.Image(decode=False))
    assert SavedPictures("here", files, "image", "x").states([0]) is None


def with_column(**columns):
    return {"train": make(24, **columns), "test": make(6)}


TWO = datasets.ClassLabel(names=["x", "y"])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (lambda: {"test": make(6)}, "must hold a data set with a split train, got test in "),
        (
            lambda: with_column(photo=(datasets.Image(), None)),
            r"must hold a column of images, got kind \(ClassLabel\) in .*\(split train\): save it",
        ),
        (
            lambda: with_column(kind=(datasets.Value("string"), ["ant"] * 24)),
            r"a column of classes, got photo \(Image\), kind \(Value\) .*class_encode_column\(NAME",
        ),
        (
            lambda: with_column(coarse=(TWO, [0, 1] * 12)),
            r"one column of classes, got kind, coarse in .*\(split train\): .*remove_columns",
        ),
        (
            lambda: with_column(kind=(FEATURES["kind"], [-1, None] + [1] * 22)),
            r"every image must have a class, got 2 of 24 without one in .*\(split train\)",
        ),
        (
            lambda: with_column(kind=(TWO, [0, 1] * 12)),
            r"every split must have the classes x, y, got ant, bee, cat in .*\(split test\)",
        ),
        (
            lambda: with_column(kind=(datasets.ClassLabel(names=[*CLASSES]), [0, 1] * 12)),
            "every class must have a training image, got none of 'cat'",
        ),
        (
            lambda: with_column(photo=(datasets.Image(), [None] * 24)),
            r"every image must be readable, got image 0 of .*\(split train\) \(there is none\)",
        ),
        (
            lambda: with_column(photo=(datasets.Image(), [{"bytes": b"?", "path": None}] * 24)),
            r"every image must be readable, got image 0 of .*\(split train\) \(cannot identify",
        ),
    ],
)
def test_what_cannot_be_used_is_one_message(tmp_path, splits, message):
    for name, split in splits().items():
        split.save_to_disk(tmp_path / name)
    names = [path.name for path in tmp_path.iterdir()]
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": sorted(names, reverse=True)}))
    with pytest.raises(ValueError, match=message):
        load_data("folder", root=tmp_path)


def test_pictures_by_path_are_read_but_not_fetched(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pictures(1)[0].save(tmp_path / "0.png")
    values = {"photo": [str(tmp_path / "0.png"), "https://localhost/x.png", "gone.png"]}
    files = {"photo": datasets.Image(decode=False)}
    dataset = datasets.Dataset.from_dict(values, features=datasets.Features(files))
    stream = Stream(SavedPictures("here", dataset, "photo", "x"), torch.arange(3), 10, "RGB")
    assert stream[0].shape == (3, 10, 10)
    message = r"image 1 of here \(it is at https://localhost/x\.png, not saved with the data set\)"
    with pytest.raises(ValueError, match=message):
        stream[1]
    with pytest.raises(ValueError, match=r"image 2 of here \(.*No such file or directory: .*gone"):
        stream[2]


def test_one_class_is_refused(tmp_path):
    one = {"photo": pictures(9), "kind": [0] * 9}
    features = datasets.Features(FEATURES | {"kind": datasets.ClassLabel(names=["ant"])})
    datasets.Dataset.from_dict(one, features=features).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="must hold at least 2 classes, got ant alone in "):
        load_data("folder", root=tmp_path)


def test_damaged_files_are_one_message(tmp_path):
    root = save(tmp_path, train=24, test=6)
    (root / "train" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(ValueError, match="must hold an intact saved data set, got "):
        load_data("folder", root=root)
    (root / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="must hold an intact saved data set, got "):
        load_data("folder", root=root)


def test_fingerprint_is_that_of_the_saved_pictures(tmp_path):
    def digest(root: Path, **settings) -> str:
        return load_data("folder", root=root, **settings).fingerprint

    one = save(tmp_path / "one", train=24, test=6)
    for settings in ({}, {"in_memory": False}):
        assert digest(one, **settings) == digest(one, **settings)
    other = tmp_path / "other"
    make(24, seed=9).save_to_disk(other)
    assert digest(one) != digest(other)
    assert digest(one, in_memory=False) != digest(other, in_memory=False)
    moved = one.rename(tmp_path / "moved")
    assert digest(moved, in_memory=False) == digest(moved, in_memory=False)
