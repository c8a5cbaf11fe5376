import gc
import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import selfkd.data.load
from selfkd.data import Data, Split, batches, load_data
from selfkd.data.augmentation import Views
from selfkd.data.splits import divide, redraw, subset
from selfkd.training.ranks import Ranks

DATA = os.environ.get("SELFKD_DATA")
CLASSES = ("ant", "bee", "cat")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str = "MNIST", train: int = 120, test: int = 30) -> None:
    random = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        raw = root / folder / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)


def write_folder(root: Path, **images: int) -> Path:
    """Write PNG files of different sizes, `images` of each class in each named part."""
    random = np.random.default_rng(0)
    for part, n in images.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                height, width = random.integers(8, 15, 2)
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), train=12, val=4, test=3)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return root


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("SELFKD_DATA", raising=False)


def all_of(data: Data, split: str = "train", **settings) -> list[Tensor]:
    parts = zip(*data.batches(split, **({"batch_size": 7} | settings)), strict=True)
    return [torch.cat(part) for part in parts]


# --- splits ---


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("counts", [(50, 50, 50), (90, 40, 7), (10, 1, 100)])
@pytest.mark.parametrize("sizes", [(30, 20, 0), (30, 20, 40), (None, 60, 40), (3, 1, 0)])
def test_splits_are_disjoint_stratified_and_repeatable(seed, counts, sizes):
    train_size, val_size, test_size = sizes
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    settings = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
    parts = train, val, _ = divide(labels, **settings, num_classes=3, seed=seed)
    left = len(labels) - val_size - test_size
    assert [len(part) for part in parts] == [train_size or left, val_size, test_size]
    assert len(torch.cat(parts).unique()) == len(torch.cat(parts))
    assert all(part.equal(part.sort().values) for part in parts)
    for part in parts:
        share = part.numel() / len(labels)
        for label, count in enumerate(counts):
            if count > 1:  # the only image of a class is for training
                assert abs(int((labels[part] == label).sum()) - share * count) <= 2
    assert len(labels[train].unique()) == 3
    again = divide(labels, **settings, num_classes=3, seed=seed)
    assert all(one.equal(other) for one, other in zip(parts, again, strict=True))
    other = divide(labels, **settings, num_classes=3, seed=seed + 1)
    assert not val.equal(other[1])


@pytest.mark.parametrize("test_size", [0, 500])
def test_held_out_splits_do_not_depend_on_the_training_size(test_size):
    labels = torch.arange(1000) % 10
    settings = {"val_size": 200, "test_size": test_size, "num_classes": 10, "seed": 3}
    parts = [divide(labels, train_size=size, **settings) for size in (10, 100, 300)]
    for smaller, larger in pairwise(parts):
        assert smaller[1].equal(larger[1])
        assert smaller[2].equal(larger[2])
        assert torch.isin(smaller[0], larger[0]).all()


def test_test_split_gives_way_to_a_larger_training_split():
    labels = torch.arange(1000) % 10
    settings = {"val_size": 200, "test_size": 500, "num_classes": 10, "seed": 3}
    _, _, usual = divide(labels, train_size=300, **settings)
    train, _, smaller = divide(labels, train_size=700, **settings)
    assert (len(train), len(smaller)) == (700, 100)
    assert torch.isin(smaller, usual).all()
    assert (labels[smaller].bincount() == 10).all()


def test_subset_is_stratified():
    labels = torch.arange(100) % 4
    assert labels[subset(labels, 20, seed=0)].bincount().tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 9}, r"train_size must be at least the number of classes \(10\), got 9"),
        (
            {"train_size": 1797},
            "train_size must leave images to hold out of the 1797 that there are, got 1797",
        ),
        (
            {"val_size": 1700},
            r"val_size must be in \[1, 1696\] beside 100 training images out of 1797, got 1700",
        ),
        ({"train_size": 1000, "val_size": 797}, r"val_size must be in \[1, 796\]"),
        ({"val_size": 0}, "val_size must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"in_memory": False}, "in_memory must be true or not given for digits, got False"),
        ({"image_size": 20_000}, r"image_size must keep digits within 2,000,000,000 bytes"),
        (
            {"test_size": 9_000},
            r"data.test_size must keep .* got 9000: lower it or data.train_size$",
        ),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        load_data("digits", **sizes)


# --- digits ---


def test_digits():
    data = load_data("digits")
    assert [len(split) for split in (data.train, data.val, data.test)] == [100, 400, 1197]
    assert (data.num_classes, data.in_chans, data.image_size) == (10, 1, 8)
    assert data.class_names == tuple("0123456789")
    for split in (data.train, data.val, data.test):
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split), 1, 8, 8)
        assert split.index.equal(torch.arange(len(split)))
        assert (split.labels.bincount() - len(split) / 10).abs().max() <= len(split) * 0.01


def test_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    theirs = load_digits()
    pool = selfkd.data.load.open_digits().pool
    assert pool.labels.tolist() == theirs.target.tolist()
    np.testing.assert_allclose(pool.images[:, 0] / 255 * 16, theirs.images, atol=0.04)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # not found as a file
    assert selfkd.data.load.open_digits().pool.images.equal(pool.images)
    whole = pool.images.double() / 255
    assert load_data("digits").mean[0] == pytest.approx(whole.mean().item(), abs=1e-4)
    assert load_data("digits").std[0] == pytest.approx(whole.std().item(), abs=1e-4)


def test_importing_selfkd_data_imports_neither_torchvision_nor_scikit_learn():
    code = (
        "import sys, selfkd.data as d; d.load_data('digits');"
        "print([m for m in ('torchvision', 'sklearn', 'timm', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- batches ---


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_batches_in_order(batch_size):
    data = load_data("digits", train_size=200)
    inputs, labels, index = all_of(data, batch_size=batch_size)
    assert index.equal(torch.arange(200))
    assert labels.equal(data.train.labels)
    expected = (data.train.images.numpy() / 255.0 - data.mean[0]) / data.std[0]
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


def test_batches_in_an_order_drawn_from_the_generator():
    data = load_data("digits", train_size=200)
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    one, again = all_of(data, generator=first), all_of(data, generator=second)
    assert all(a.equal(b) for a, b in zip(one, again, strict=True))
    assert first.get_state().equal(second.get_state())
    inputs, labels, index = one
    assert index.sort().values.equal(torch.arange(200))
    assert not index.equal(torch.arange(200))
    assert labels.equal(data.train.labels[index])
    assert inputs.equal(all_of(data)[0][index])
    assert not all_of(data, generator=first)[2].equal(index)  # the next epoch has another order


def test_order_is_drawn_when_called():
    data, generator = load_data("digits", train_size=200), torch.Generator().manual_seed(0)
    state = generator.get_state()
    data.batches("train", batch_size=10, generator=generator)
    assert not generator.get_state().equal(state)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [90, 90, 20]), (True, [90, 90])])
def test_last_batch(drop_last, sizes):
    read = load_data("digits", train_size=200).batches("train", batch_size=90, drop_last=drop_last)
    assert [len(inputs) for inputs, _, _ in read] == sizes


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "smallest", "sizes"),
    [
        (5, 2, [5] * 5 + [6]),
        (6, 2, [6] * 4 + [7]),
        (10, 2, [10, 10, 11]),
        (30, 2, [31]),
        (31, 2, [31]),
        (40, 2, [31]),
        (7, 2, [7] * 4 + [3]),
        (7, 3, [7] * 4 + [3]),
        (7, 4, [7] * 3 + [10]),
        (9, 6, [9, 9, 13]),
        (5, 1, [5] * 6 + [1]),
        (1, 1, [1] * 31),
    ],
)
def test_a_last_batch_that_is_too_small_is_part_of_the_one_before(
    folder, in_memory, batch_size, smallest, sizes
):
    data = load_data("folder", root=folder, train_size=31, in_memory=in_memory)

    def indices(**settings) -> list[list[int]]:
        order = torch.Generator().manual_seed(3)
        read = data.batches("train", batch_size=batch_size, generator=order, **settings)
        seen = []
        for inputs, labels, index in read:
            assert len(inputs) == len(labels) == len(index)
            seen.append(index.tolist())
        return seen

    found, usual = indices(smallest=smallest), indices()
    assert [len(batch) for batch in found] == sizes
    assert [*chain(*found)] == [*chain(*usual)]  # in the same order
    if smallest == 1 or 31 % batch_size >= smallest:
        assert found == usual
    one, two = (indices(smallest=smallest, share=Ranks(rank, 2).share) for rank in (0, 1))
    if smallest >= 4:  # two for each of two ranks
        assert [a + b for a, b in zip(one, two, strict=True)] == found
        assert min(map(len, one + two)) >= 2


def test_fewer_images_than_a_batch():
    split = Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    settings = {"mean": [0.0], "std": [1.0], "batch_size": 4}
    assert len(list(batches(split, **settings))) == 1
    assert list(batches(split, **settings, drop_last=True)) == []


def test_batches_do_not_change_the_images():
    data = load_data("digits", train_size=200)
    before = data.train.images.clone()
    for inputs, _, _ in data.batches("train", batch_size=50, views=Views(), view=0):
        inputs.zero_()
    assert data.train.images.equal(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"views": Views(count=2), "view": 2}, r"view must be in \[0, 2\), got 2"),
        ({"split": "dev"}, "split must be train, val or test, got 'dev'"),
    ],
)
def test_impossible_batches(settings, message):
    with pytest.raises(ValueError, match=message):
        load_data("digits", train_size=200).batches(
            **({"split": "train", "batch_size": 5} | settings)
        )


def test_take_and_to():
    data = load_data("digits", train_size=200)
    some = data.train.take(torch.tensor([5, 2]))
    assert some.images.equal(data.train.images[[5, 2]])
    assert some.labels.equal(data.train.labels[[5, 2]])
    moved = data.to("meta")
    assert moved.train.images.device.type == moved.test.labels.device.type == "meta"
    assert data.train.images.device.type == "cpu"


# --- in memory and streamed are the same ---

VIEWS = Views(crop=0.5, flip=True, jitter=2, seed=3, count=2)


@pytest.mark.parametrize(
    ("workers", "batch_size", "views"), [(0, 5, None), (0, 36, VIEWS), (0, 4, VIEWS), (2, 9, VIEWS)]
)
def test_streamed_batches_are_those_in_memory(folder, workers, batch_size, views):
    held = load_data("folder", root=folder, image_size=10)
    streamed = load_data("folder", root=folder, image_size=10, in_memory=False)
    assert not isinstance(streamed.train.images, Tensor)
    streamed = replace(streamed, mean=held.mean, std=held.std)
    settings = {"views": views, "view": 1 if views else 0}

    def order() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    expected = all_of(held, generator=order(), batch_size=11, **settings)
    state = torch.get_rng_state()
    read = all_of(streamed, generator=order(), batch_size=batch_size, workers=workers, **settings)
    assert torch.get_rng_state().equal(state)
    for one, other in zip(read, expected, strict=True):
        assert one.equal(other)


def test_streamed_splits_are_those_in_memory(folder):
    settings = {"root": folder, "train_size": 9, "val_size": 6, "seed": 4}
    held = load_data("folder", **settings)
    streamed = load_data("folder", **settings, in_memory=False)
    for name in ("train", "val", "test"):
        one, other = getattr(held, name), getattr(streamed, name)
        assert one.labels.equal(other.labels)
        assert one.images.equal(torch.stack([other.images[i] for i in range(len(other))]))
    assert streamed.mean == selfkd.data.load.IMAGENET[0]
    assert streamed.image_size == held.image_size


def test_decoded_size_decides_what_is_held(folder, monkeypatch):
    assert isinstance(load_data("folder", root=folder, image_size=10).train.images, Tensor)
    size = (36 + 12 + 9) * 3 * 10 * 10
    monkeypatch.setattr(selfkd.data.load, "MEMORY_LIMIT", size - 1)
    assert not isinstance(load_data("folder", root=folder, image_size=10).train.images, Tensor)
    held = load_data("folder", root=folder, image_size=10, in_memory=True)
    assert isinstance(held.train.images, Tensor)


# --- folders ---


@pytest.mark.parametrize("image_size", [5, 10, 20])
def test_folder_is_read_as_torchvision_does(folder, image_size):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    theirs = ImageFolder(str(folder / "train"), transform=resize)
    data = load_data("folder", root=folder, image_size=image_size)
    assert data.class_names == tuple(theirs.classes) == CLASSES
    assert data.train.labels.tolist() == theirs.targets
    assert data.train.images.equal(torch.stack([image for image, _ in theirs]))
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 12, "val": 4, "test": 3}, (36, 12, 9)),
        ({"train": 12, "test": 3}, (33, 3, 9)),  # val from train: a tenth, one for each class
        ({"train": 12, "val": 4}, (33, 3, 12)),  # the val folder is the test split
    ],
)
@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_parts_of_a_folder(tmp_path, parts, sizes, name):
    parts = {name if part == "val" else part: images for part, images in parts.items()}
    data = load_data("folder", root=write_folder(tmp_path, **parts))
    assert (len(data.train), len(data.val), len(data.test)) == sizes
    assert data.val.labels.bincount().tolist() == [sizes[1] // 3] * 3


def test_folders_beside_the_splits_are_named(tmp_path):
    root = write_folder(tmp_path, train=8, test=2, val=2, valid=3, unlabelled=1)
    data = load_data("folder", root=root)
    assert len(data.val) == 6
    assert data.note.endswith("left out: 1 folder unlabelled, 1 folder valid")


def test_training_images_are_not_held_out_by_a_link(tmp_path):
    write_folder(tmp_path, train=8)
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(ValueError, match="must hold test apart from train, got a link in"):
        load_data("folder", root=tmp_path)


def test_a_class_may_be_written_in_another_form_of_unicode(tmp_path):
    write_folder(tmp_path, train=8, test=2)
    (tmp_path / "train" / "bee").rename(tmp_path / "train" / normalize("NFC", "b\u00e9e"))
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / normalize("NFD", "b\u00e9e"))
    data = load_data("folder", root=tmp_path)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]


def write_sizes(root: Path, sizes: list[tuple[int, int]]) -> Path:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i, size in enumerate(sizes):
                Image.new("RGB", size).save(root / part / name / f"{i:03d}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "expected", "said"),
    [
        ([(1, 1), *[(48, 50)] * 4], 48, "(shorter sides are 1 to 48, the median 48;"),
        ([(3, 900), *[(20, 20)] * 6, (500, 500)], 20, "3 to 500, the median 20;"),
        ([(500, 300)] * 5, 64, "(shorter sides are 300; data.image_size sets the size)"),
        ([(32, 40)] * 5, 32, None),
    ],
)
def test_default_image_size_is_the_median_of_the_shorter_sides_up_to_64(
    tmp_path, sizes, expected, said
):
    data = load_data("folder", root=write_sizes(tmp_path, sizes))
    assert data.image_size == expected
    if said is None:  # all pictures have it, so that there is nothing to say
        assert data.note == ""
    else:
        assert f" images of 2 classes, read at {expected}x{expected} pixels " in data.note
        assert said in data.note
    given = load_data("folder", root=tmp_path, image_size=9)
    assert given.image_size == 9
    assert given.note == ""


def test_size_of_many_images_is_that_of_a_sample_from_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("selfkd.data.stream.SURVEYED", 10)
    write_sizes(tmp_path, [(8, 8)] * 20)
    for path in (tmp_path / "train" / "b").iterdir():
        Image.new("RGB", (40, 40)).save(path)
    for i in range(10):  # of the 50 pictures, 30 are large
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / "b" / f"more{i}.png")
    assert load_data("folder", root=tmp_path).image_size == 40


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".hidden.png", "1 hidden"),
        ("._00.png", "1 hidden"),
        (".ipynb_checkpoints/00-checkpoint.png", "1 hidden"),
        ("deep/er/.git/x.png", "1 hidden"),
        ("__MACOSX/x.png", "1 system folder"),
        ("@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg", "1 system folder"),
        ("Thumbs.db", "1 .db"),
        ("notes.TXT", "1 .txt"),
        ("labels.csv.bak", "1 .bak"),
        ("drawing.svg", "1 .svg"),
        ("scan.pdf", "1 .pdf"),
        ("array.npy", "1 .npy"),
        ("README", "1 without suffix"),
    ],
)
def test_files_that_are_no_images_are_left_out_at_any_depth_and_counted(tmp_path, name, said):
    write_sizes(tmp_path, [(8, 8)] * 3)
    for folder in ("train/a", "test/b"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    data = load_data("folder", root=tmp_path)
    assert len(data.train) + len(data.val) == len(data.test) == 6
    two = said.replace("1", "2") + ("s" if said.endswith("folder") else "")
    assert data.note.endswith(f"pixels; left out: {two}")


def test_what_is_left_out_is_one_line_in_the_log(tmp_path, caplog):
    write_sizes(tmp_path, [(8, 8)] * 3)
    for i in range(3):
        (tmp_path / "train" / "a" / f"{i}.txt").touch()
    (tmp_path / "train" / "b" / ".hidden").touch()
    (tmp_path / "train" / "stray.png").touch()
    (tmp_path / "test" / ".DS_Store").touch()
    for i in range(20):
        (tmp_path / "train" / "b" / f"part.{i:03d}").touch()
    for _ in range(2):  # as in each trial of a process
        data = load_data("folder", root=tmp_path)
    assert [record.message for record in caplog.records] == [data.note]
    assert data.note == (
        f"{tmp_path}: 12 images of 2 classes, read at 8x8 pixels; left out: 1 .000, 1 .001, "
        "1 .002, 1 .003, 1 .004, 1 .png beside the classes, 3 .txt, 2 hidden, 15 of other types"
    )


def test_links_are_followed_but_in_no_circle(tmp_path):
    root, more = write_sizes(tmp_path / "root", [(8, 8)] * 3), tmp_path / "more"
    more.mkdir()
    Image.new("RGB", (8, 8)).save(more / "linked.png")
    a, b = root / "train" / "a", root / "train" / "b"
    (a / "folder").symlink_to(more)
    (a / "file.png").symlink_to(more / "linked.png")
    (a / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (a / "up").symlink_to(a)
    (a / "whole").symlink_to(root)
    (b / "disk").symlink_to("/")
    (b / "self.png").symlink_to(b / "self.png")
    (more / "back").symlink_to(tmp_path)
    (root / "train" / "c").symlink_to(more)
    (root / "train" / "d").symlink_to(root)
    (root / "test" / "e").symlink_to(root / "test")
    (root / "test" / "c").symlink_to(tmp_path / "nowhere")
    data = load_data("folder", root=root, in_memory=False)
    assert data.class_names == ("a", "b", "c")
    pool = [*data.train.images.keys(), *data.val.images.keys()]
    linked = ["train/a/file.png", "train/a/folder/linked.png", "train/c/linked.png"]
    assert {key.partition(":")[0] for key in pool} >= set(linked)
    assert len(pool) == 9
    assert data.note.endswith(
        "left out: 2 broken links, 1 broken link beside the classes, 7 circular links"
    )


def test_the_order_of_files_is_that_of_their_paths(tmp_path):
    write_sizes(tmp_path, [])
    names = ["b.png", "a/z.png", "a.png", "a-b.png", "B.PNG", "a/b/c.JPG", "Z/x.jpeg", "é.png"]
    for part in ("train", "test"):
        for name in (*names, "../b/x.jfif", "../b/y.gif", "../b/z.Tif", "../b/w.webp"):
            path = tmp_path / part / "a" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, "PNG")
    keys = load_data("folder", root=tmp_path, in_memory=False).test.images.keys()
    found = [tmp_path / key.partition(":")[0] for key in keys]
    assert len(found) == 12
    assert found == sorted(found)


def test_a_file_where_a_folder_is_expected(tmp_path):
    write_sizes(tmp_path, [(8, 8)] * 3)
    for path in (tmp_path / "test" / "b").iterdir():
        path.unlink()
    (tmp_path / "test" / "b").rmdir()
    (tmp_path / "test" / "b").touch()
    (tmp_path / "train" / "a" / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / "folder.png" / "x.png")
    data = load_data("folder", root=tmp_path)
    assert len(data.train) + len(data.val) == 7
    assert data.test.labels.tolist() == [0, 0, 0]
    assert data.note.endswith("left out: 1 without suffix beside the classes")


def test_folder_without_images(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "0.npy").touch()
    message = r"data\.root must hold images, got none in .*train \(left out: 1 \.npy\)"
    with pytest.raises(ValueError, match=message):
        load_data("folder", root=tmp_path)


def test_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"got no class in .*train"):
        load_data("folder", root=tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_class_without_a_training_image(tmp_path, in_memory):
    write_folder(tmp_path, train=8, test=2)
    for path in (tmp_path / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="must have a training image, got none of 'bee'"):
        load_data("folder", root=tmp_path, in_memory=in_memory)


def test_class_that_is_only_in_the_test_folder(tmp_path):
    write_folder(tmp_path, train=8, test=2)
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="must have a training image, got none of 'dog'"):
        load_data("folder", root=tmp_path)


@pytest.fixture
def _short_join(monkeypatch):
    """Shorten the 5 s that DataLoader waits for its workers after an error to 0.1 s."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    yield
    gc.collect()


@pytest.mark.usefixtures("_short_join")
@pytest.mark.parametrize("damage", [b"", b"no image", None], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_unreadable_image_is_named(tmp_path, damage, workers):
    write_folder(tmp_path, train=8, test=2)
    path = tmp_path / "train" / "cat" / "05.png"
    path.write_bytes(path.read_bytes()[:80] if damage is None else damage)

    def read() -> None:
        data = load_data("folder", root=tmp_path, in_memory=workers is None)
        all_of(data, workers=workers or 0)

    with pytest.raises(ValueError, match=r"every image must be readable, got .*cat/05\.png \("):
        read()


def test_val_folder_smaller_than_val_size(folder):
    with pytest.raises(ValueError, match="val_size must be at most 12, the images in val, got 13"):
        load_data("folder", root=folder, val_size=13)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"test": 2},
            r"must hold train/<class>/<image>, got .* which has no folder 'train' but 't",
        ),
        ({}, "which has no folder 'train' nor any other"),
        ({"train": 2}, "must hold a folder 'test' or 'val' beside 'train'"),
        ({"train": 2, "Test": 2}, "beside 'train', got .*, which has 'Test' there"),
    ],
)
def test_missing_part_of_a_folder(tmp_path, parts, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_data("folder", root=write_folder(tmp_path, **parts))


# --- torchvision's sets ---


@pytest.mark.parametrize(
    ("name", "folder_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_layout(tmp_path, name, folder_name):
    write_mnist(tmp_path, folder_name)
    data = load_data(name, root=str(tmp_path), train_size=40, val_size=20)
    assert [len(split) for split in (data.train, data.val, data.test)] == [40, 20, 30]
    assert data.train.labels.bincount().tolist() == [4] * 10
    assert (data.in_chans, data.image_size, data.num_classes) == (1, 28, 10)
    raw = (tmp_path / folder_name / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.test.images.numpy().tobytes() == raw


def test_mnist_is_normalised_as_in_torchvision_s_examples(mnist):
    from torchvision.datasets import MNIST
    from torchvision.transforms import v2

    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*to_float, v2.Normalize((0.1307,), (0.3081,))])
    expected = torch.stack([image for image, _ in MNIST(str(mnist), False, transform=transform)])
    inputs, _, _ = all_of(load_data("mnist", root=mnist, val_size=20), "test")
    torch.testing.assert_close(inputs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_layout(tmp_path, monkeypatch, name, classes):
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name.upper())
    fine = "" if classes == 10 else "fine_"
    key, meta_key = f"{fine}labels", f"{fine}label_names"
    random = np.random.default_rng(0)

    def write(file: str, content: dict) -> str:
        path = tmp_path / kind.base_folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    pixels = random.integers(0, 256, (300, 3072), dtype=np.uint8)
    labels = (np.arange(300) % classes).tolist()
    train = write("train_file", {"data": pixels, key: labels})
    test = write("test_file", {"data": pixels[:100], key: labels[:100]})
    meta = write("meta_file", {meta_key: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "train_list", [["train_file", train]])
    monkeypatch.setattr(kind, "test_list", [["test_file", test]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta_file", "key": meta_key, "md5": meta})

    data = load_data(name, root=tmp_path, val_size=100)
    assert [len(split) for split in (data.train, data.val, data.test)] == [200, 100, 100]
    assert data.train.images.shape == (200, 3, 32, 32)
    assert data.test.images.flatten(1).equal(torch.from_numpy(pixels[:100]))
    assert data.class_names[7] == "class 7"
    assert len(data.mean) == len(data.std) == data.in_chans == 3


def test_image_size_of_a_set_in_memory(mnist):
    data = load_data("mnist", root=mnist, val_size=20, image_size=14)
    assert data.train.images.shape == (100, 1, 14, 14)
    assert data.image_size == 14
    whole = load_data("mnist", root=mnist, val_size=20)
    means = [split.images.float().mean().item() for split in (data.test, whole.test)]
    assert means[0] == pytest.approx(means[1], rel=0.01)


def test_class_missing_from_a_known_set(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.arange(120) % 8)
    with pytest.raises(ValueError, match="must have a training image, got none of '8', '9'"):
        load_data("mnist", root=tmp_path, val_size=20)


def test_split_larger_than_the_set(mnist):
    message = r"val_size must be in \[1, 110\] beside 10 training images out of 120, got 10000"
    with pytest.raises(ValueError, match=message):
        load_data("mnist", root=mnist)


def test_set_that_was_not_downloaded(tmp_path):
    message = r"data\.root must hold mnist, got .*: pass --set data\.download=true to fetch it"
    with pytest.raises(FileNotFoundError, match=message):
        load_data("mnist", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold cifar10, got"):
        load_data("cifar10", root=tmp_path)


def test_download_only_on_request_and_its_failure_is_clear(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def fail(self: MNIST) -> None:
        raise RuntimeError("Error downloading:\nno route")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match="must hold mnist"):
        load_data("mnist", root=tmp_path)
    message = r"data\.download must succeed for mnist, got: Error downloading: no route"
    with pytest.raises(FileNotFoundError, match=message):
        load_data("mnist", root=tmp_path / "new", download=True)


def test_damaged_set(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="must hold intact files of mnist, got damaged ones"):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "folder", "torch/mnist"])
def test_root(name, tmp_path, monkeypatch):
    message = rf"data\.root must be given for {name}, got none: .*data\.root=PATH or .* SELFKD_DATA"
    with pytest.raises(ValueError, match=message):
        load_data(name)
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError, match=r"data\.root must be an existing folder, got .*go"):
        load_data(name, root=gone)
    monkeypatch.setenv("SELFKD_DATA", str(gone))
    with pytest.raises(FileNotFoundError, match=r"data\.root must be an existing folder, got .*go"):
        load_data(name)


def test_root_from_the_environment(mnist, monkeypatch):
    monkeypatch.setenv("SELFKD_DATA", str(mnist))
    assert len(load_data("mnist", val_size=20).train) == 100


# --- timm's sets ---


def test_timm_set_is_the_same_as_torchvision_s(mnist):
    ours = load_data("mnist", root=mnist, val_size=20, train_size=50)
    theirs = load_data("torch/mnist", root=mnist, val_size=20, train_size=50)
    for name in ("train", "val", "test"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.images.equal(other.images)
        assert one.labels.equal(other.labels)
    assert (theirs.in_chans, theirs.image_size, theirs.num_classes) == (1, 28, 10)
    streamed = load_data("torch/mnist", root=mnist, val_size=20, train_size=50, in_memory=False)
    assert streamed.train.images[3].equal(ours.train.images[3])
    assert streamed.mean == selfkd.data.load.GREY[0]


def fake_timm(monkeypatch, folder: Path, kind: str, classes: tuple[str, ...] = CLASSES) -> None:
    """Replace data sets that need packages or the network by timm's own classes on a folder."""
    import timm.data

    class Reader:
        class_to_idx = {name: i for i, name in enumerate(classes)}  # noqa: RUF012

        def __init__(self, part: Path, mode: str) -> None:
            self.paths = sorted(p for p in part.rglob("*.*") if p.parent.name in classes)
            self.mode = mode

        def __getitem__(self, i: int):
            return self.paths[i].open("rb"), classes.index(self.paths[i].parent.name)

        def __len__(self) -> int:
            return len(self.paths)

        def __iter__(self):
            for file, label in (self[i] for i in range(len(self))):
                picture = Image.open(file)
                yield picture.convert(self.mode) if self.mode else picture, label

        def iter_targets(self):
            return (classes.index(path.parent.name) for path in self.paths)

    def create(name: str, root=None, split="train", download=False, input_img_mode="RGB"):
        if split == "test":
            raise ValueError('Unknown split "test"')
        reader = Reader(folder / {"train": "train", "validation": "val"}[split], input_img_mode)
        if kind == "map":
            return timm.data.ImageDataset("", reader=reader)
        return timm.data.IterableImageDataset("", reader=reader)

    monkeypatch.setattr("timm.data.create_dataset", create)


@pytest.mark.parametrize(("name", "kind"), [("hfds/some/set", "map"), ("tfds/set", "iterable")])
def test_other_timm_sets(folder, monkeypatch, name, kind):
    fake_timm(monkeypatch, folder, kind)
    data = load_data(name)
    assert data.note.startswith(f"{name}: 48 images of 3 classes, read at 10x10 pixels (shorter ")
    data = load_data(name, image_size=10)
    ours = load_data("folder", root=folder, image_size=10)
    assert data.class_names == CLASSES
    assert (len(data.train), len(data.val), len(data.test)) == (33, 3, 12)
    assert data.test.labels.equal(torch.arange(3).repeat_interleave(4))
    everything = torch.cat([data.train.images, data.val.images]).flatten(1).tolist()
    assert sorted(everything) == sorted(ours.train.images.flatten(1).tolist())


def write_odd(root: Path) -> Path:
    """Write pictures of 16 bits, with alpha or an orientation; the first of all is grey."""
    random, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "val"):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            wide = random.integers(0, 65536, (12, 10), dtype=np.uint16)
            Image.fromarray(wide).save(folder / "0.png")
            rgba = random.integers(0, 256, (12, 10, 4), dtype=np.uint8)
            Image.fromarray(rgba).save(folder / "1.png")
            Image.fromarray(rgba[..., :3]).save(folder / "2.jpg", exif=exif)
            Image.fromarray(rgba[..., 0]).save(folder / "3.tiff")
    return root


@pytest.mark.parametrize(
    ("name", "kind"), [("hfds/set", "map"), ("hfids/set", "iterable"), ("wds/set", "iterable")]
)
def test_pictures_of_timm_sets_are_read_as_those_of_folders(tmp_path, monkeypatch, name, kind):
    write_odd(tmp_path)
    fake_timm(monkeypatch, tmp_path, kind)
    theirs = load_data(name, root=tmp_path, image_size=10).test.images
    assert theirs.equal(load_data("folder", root=tmp_path, image_size=10).test.images)
    assert theirs.shape[1] == 3  # though the first picture is grey


def test_torchvision_s_loader_is_replaced(tmp_path, monkeypatch):
    from torchvision.datasets import ImageFolder

    def create(name: str, root: str, split: str, download: bool):
        return ImageFolder(Path(root) / {"train": "train", "test": "val"}[split])

    monkeypatch.setattr("timm.data.create_dataset", create)
    write_odd(tmp_path)
    theirs = load_data("torch/imagenet", root=tmp_path).test.images
    assert theirs.equal(load_data("folder", root=tmp_path).test.images)


def test_pictures_of_torchvision_are_decoded_once(folder, monkeypatch, cache, decoded):
    from torchvision.datasets import ImageFolder

    def create(name: str, root: str, split: str, download: bool):
        return ImageFolder(Path(root) / {"train": "train", "test": "val"}[split])

    monkeypatch.setattr("timm.data.create_dataset", create)
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    first, again = (load_data("torch/imagenet", root=folder).train.images for _ in range(2))
    assert first.equal(again)
    assert len(decoded) == 3


def test_unreadable_image_of_a_timm_set_is_not_skipped(tmp_path, monkeypatch):
    write_folder(tmp_path, train=8, val=2)
    (tmp_path / "train" / "bee" / "03.png").write_bytes(b"no image")
    fake_timm(monkeypatch, tmp_path, "map")
    with pytest.raises(ValueError, match="image must be readable, got image 11 of hfds/set"):
        load_data("hfds/set", image_size=10)


def test_iterable_set_that_does_not_fit(folder, monkeypatch):
    fake_timm(monkeypatch, folder, "iterable")
    monkeypatch.setattr(selfkd.data.load, "MEMORY_LIMIT", 1000)
    with pytest.raises(ValueError, match="at most 1,000 decoded bytes where it can only"):
        load_data("tfds/set", image_size=10)


def test_timm_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold torch/mnist \(split train\), got"):
        load_data("torch/mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnits", ": did you mean mnist?"),
        ("MNIST", ""),
        ("fashion-mnist", ": did you mean fashion_mnist?"),
        ("torch/cifar11", ": did you mean torch/cifar1"),
        ("torch/image_folder", ""),
        ("somewhere/else", ""),
        ("zzz", ""),
        ("a/table.CSV", ": --data arrays --data-root a/table.CSV"),
        ("", ""),
    ],
)
def test_unknown_name(name, hint):
    names = r"data\.name must be one of digits, digit_pairs, mnist, "
    with pytest.raises(ValueError, match=names) as caught:
        load_data(name)
    assert f"got {name!r}{hint}" in str(caught.value)


# --- label noise ---


def test_a_share_of_the_training_labels_is_drawn_anew():
    clean = load_data("digits", train_size=400)
    noisy = load_data("digits", train_size=400, label_noise=0.5)
    assert torch.equal(noisy.train.images, clean.train.images)
    for split in ("val", "test"):
        assert torch.equal(getattr(noisy, split).labels, getattr(clean, split).labels)
    changed = noisy.train.labels != clean.train.labels
    assert 160 <= changed.sum() <= 195  # of 200 drawn, a tenth are what they were
    assert set(noisy.train.labels.tolist()) == set(range(10))
    assert noisy.fingerprint != clean.fingerprint
    again = load_data("digits", train_size=400, label_noise=0.5)
    assert torch.equal(again.train.labels, noisy.train.labels)
    assert again.fingerprint == noisy.fingerprint
    other = load_data("digits", train_size=400, label_noise=0.5, seed=1)
    assert other.fingerprint not in (noisy.fingerprint, clean.fingerprint)
    assert load_data("digits", label_noise=0.0).fingerprint == load_data("digits").fingerprint


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.999])
def test_drawn_labels_are_uniform_and_as_many_as_asked_for(share, seed):
    position, classes = torch.arange(20_000) * 3, [1, 4, 6, 7]
    labels = redraw(torch.zeros(20_000).long(), position, share, classes=classes, seed=seed)
    counts = labels.bincount(minlength=8).tolist()
    count = round(share * 20_000)
    assert counts[0] == 20_000 - count
    assert sum(counts[label] for label in classes) == count
    for label in classes:
        assert counts[label] == pytest.approx(count / 4, abs=5 * (count * 3 / 16) ** 0.5)


def test_a_larger_share_draws_the_same_and_more():
    position, labels = torch.arange(1000), torch.full((1000,), -1)
    few, many = (redraw(labels, position, n, classes=range(5), seed=0) for n in (0.1, 0.4))
    drawn = few >= 0
    assert drawn.sum() == 100
    assert torch.equal(few[drawn], many[drawn])
    assert (labels == -1).all()


def test_drawn_labels_are_of_the_classes_that_are_trained_on():
    clean = load_data("digits", classes=[2, 9])
    noisy = load_data("digits", classes=[2, 9], label_noise=0.9)
    assert set(noisy.train.labels.tolist()) == {2, 9}
    assert (noisy.train.labels != clean.train.labels).float().mean() == pytest.approx(0.45, abs=0.1)


def test_label_noise_of_streamed_images_is_that_of_those_in_memory(folder):
    held, streamed, clean = (
        load_data("folder", root=folder, in_memory=held, label_noise=noise).train
        for held, noise in ((True, 0.8), (False, 0.8), (True, 0.0))
    )
    assert torch.equal(held.labels, streamed.labels)
    assert not torch.equal(held.labels, clean.labels)


@pytest.mark.parametrize("name", ["mnist", "torch/mnist"])
def test_label_noise_of_other_sets(mnist, name):
    clean, noisy = (
        load_data(name, root=mnist, val_size=20, label_noise=noise) for noise in (0, 0.5)
    )
    assert (noisy.train.labels != clean.train.labels).sum() >= 35  # of 50 drawn
    assert torch.equal(noisy.val.labels, clean.val.labels)
    assert torch.equal(noisy.test.labels, clean.test.labels)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_label_noise_out_of_range(share):
    with pytest.raises(ValueError, match=r"data.label_noise must be in \[0, 1\), got"):
        load_data("digits", label_noise=share)


# --- fingerprints ---


def test_fingerprint_stays():
    one, again = load_data("digits"), load_data("digits")
    assert one.fingerprint == again.fingerprint
    assert len(one.fingerprint) == 16
    assert int(one.fingerprint, 16) >= 0


@pytest.mark.parametrize("changed", [{"seed": 1}, {"train_size": 201}, {"image_size": 9}])
def test_fingerprint_changes_with_the_training_split(changed):
    assert load_data("digits", **changed).fingerprint != load_data("digits").fingerprint


def test_fingerprint_does_not_depend_on_how_much_is_held_out(folder):
    """Soft targets are those of training images: they do not depend on the validation split."""
    fingerprints = {load_data("folder", root=folder, val_size=n).fingerprint for n in (6, 12)}
    assert len(fingerprints) == 1


def test_fingerprint_sees_each_pixel_label_and_normalisation():
    split = load_data("digits", train_size=200).train
    mean, std = (0.5,), (0.25,)

    def digest(split, mean, std):
        return selfkd.data.fingerprint(split, mean=mean, std=std)

    digests = {digest(split, mean, std), digest(split, (0.4,), std), digest(split, mean, (0.2,))}
    pixel, label = split.images.clone(), split.labels.clone()
    pixel[-1, 0, 7, 7] ^= 1
    label[-1] = (label[-1] + 1) % 10
    digests |= {
        digest(Split(pixel, split.labels), mean, std),
        digest(Split(split.images, label), mean, std),
    }
    order = torch.arange(200).flip(0)
    digests |= {digest(split.take(order), mean, std)}
    assert len(digests) == 6
    assert digest(split.take(torch.arange(200)), mean, std) in digests


@pytest.mark.parametrize("in_memory", [True, False])
def test_fingerprint_of_a_folder(tmp_path, in_memory):
    write_folder(tmp_path / "a", train=8, val=2, test=2)
    write_folder(tmp_path / "b", train=8, val=2, test=2)

    def digest(part: str = "b", size: int = 10) -> str:
        settings = {"image_size": size, "in_memory": in_memory}
        return load_data("folder", root=tmp_path / part, **settings).fingerprint

    original = digest()
    assert digest("a") == original  # the same files elsewhere
    assert digest(size=9) != original
    path = tmp_path / "b" / "train" / "bee" / "03.png"
    os.utime(path, (0, 0))
    assert digest() == original
    content = path.read_bytes()
    Image.new("RGB", (9, 12)).save(path)
    assert digest() != original
    path.write_bytes(content)
    assert digest() == original
    path.rename(tmp_path / "b" / "train" / "cat" / "99.png")
    assert digest() != original


# --- real data ---


@pytest.mark.skipif(
    not DATA or not Path(DATA, "MNIST").is_dir(), reason="needs MNIST under SELFKD_DATA"
)
def test_real_mnist():
    data = load_data("mnist", root=DATA)
    assert [len(split) for split in (data.train, data.val, data.test)] == [50000, 10000, 10000]
    pixels = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-3)
    assert data.std[0] == pytest.approx(pixels.std().item(), abs=1e-3)


def test_training_images_can_be_of_some_classes_alone() -> None:
    whole, some = load_data("digits", train_size=200), load_data("digits", classes=[7, 3])
    assert set(some.train.labels.tolist()) == {3, 7}
    assert torch.equal(some.val.images, whole.val.images)
    assert torch.equal(some.test.labels, whole.test.labels)
    assert some.num_classes == 10
    assert some.fingerprint != whole.fingerprint
    kept = torch.isin(whole.train.labels, torch.tensor([3, 7]))
    assert torch.equal(some.train.images, whole.train.images[kept])


def test_a_part_of_some_classes_is_nested_and_in_proportion() -> None:
    small, large = (load_data("digits", classes=[1, 2, 3], train_size=n).train for n in (9, 30))
    assert small.labels.bincount().tolist() == [0, 3, 3, 3]
    inside = {image.numpy().tobytes() for image in large.images}
    assert {image.numpy().tobytes() for image in small.images} <= inside


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [10]}, r"data.classes must be in \[0, 9\], got 10"),
        ({"classes": [-1]}, r"data.classes must be in \[0, 9\], got -1"),
        ({"classes": [1, 2], "train_size": 1}, r"at least the number of classes \(2\), got 1"),
        ({"classes": [1, 2], "train_size": 800}, "at most .* the images of data.classes, got 800"),
        ({"classes": [3]}, r"at least 2 classes, got \[3\]: .* leave data.classes out for all"),
        ({"classes": [3, 3]}, r"at least 2 classes, got \[3, 3\]: "),
    ],
)
def test_classes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("digits", **settings)


def test_a_single_class_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "cat" / "0.png")
    message = r"^data.root must hold at least 2 classes, got cat alone in .*: .*add images of ano"
    with pytest.raises(ValueError, match=message):
        load_data("folder", root=tmp_path)


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_single_class_of_a_timm_set_is_refused(tmp_path, monkeypatch, kind):
    write_folder(tmp_path, train=8, val=2)
    fake_timm(monkeypatch, tmp_path, kind, classes=("ant",))
    with pytest.raises(ValueError, match=r"data\.name must hold at least 2 classes, got ant "):
        load_data("hfds/set")


@pytest.mark.parametrize("name", ["mnist", "torch/mnist"])
def test_a_single_class_of_a_known_set_is_refused(mnist, name):
    with pytest.raises(ValueError, match=r"data.classes must be at least 2 classes, got \[4\]"):
        load_data(name, root=mnist, classes=[4])


@pytest.mark.parametrize("in_memory", [None, False])
def test_images_of_validation_and_test_may_be_of_another_size(tmp_path, in_memory):
    """They are decoded at that size, and training stays as it was."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(10):
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    settings = {"root": tmp_path, "image_size": 16, "in_memory": in_memory}
    data = load_data("folder", **settings, test_size=20)
    plain, larger = (load_data("folder", **settings | {"image_size": size}) for size in (16, 20))
    assert (data.image_size, data.test_size, plain.test_size) == (16, 20, 16)
    assert data.fingerprint == plain.fingerprint
    for split in ("val", "test"):
        own, expected = (next(d.batches(split, batch_size=4)) for d in (data, larger))
        assert own[0].shape == (own[0].shape[0], 3, 20, 20)
        assert torch.equal(own[1], expected[1])
        unit = torch.tensor(data.std)[:, None, None], torch.tensor(data.mean)[:, None, None]
        other = torch.tensor(larger.std)[:, None, None], torch.tensor(larger.mean)[:, None, None]
        torch.testing.assert_close(own[0] * unit[0] + unit[1], expected[0] * other[0] + other[1])


def test_images_in_memory_are_scaled_for_validation_and_test():
    data, plain = load_data("digits", test_size=12), load_data("digits")
    assert torch.equal(data.train.images, plain.train.images)
    assert data.val.images.shape[2:] == data.test.images.shape[2:] == (12, 12)
    assert torch.equal(data.val.images, load_data("digits", image_size=12).val.images)
