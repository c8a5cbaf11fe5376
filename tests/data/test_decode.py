import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from selfkd.data import decode as module
from selfkd.data import load_data
from selfkd.data.decode import decode, keep
from selfkd.data.stream import Files, Stream

HOUR_NS = 3600 * 10**9
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def root(tmp_path) -> Path:
    """Folder of images that were written an hour ago."""
    random = np.random.default_rng(0)
    for part, images in (("train", 8), ("test", 3)):
        for name in ("ant", "bee"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(images):
                write(tmp_path / f"images/{part}/{name}/{i}.png", random)
    return tmp_path / "images"


def write(path: Path, random: np.random.Generator, hours: int = 1) -> None:
    Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path, "BMP")
    then = time.time_ns() - hours * HOUR_NS
    os.utime(path, ns=(then, then))


def stream_of(root: Path, **settings) -> Stream:
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    numbers = torch.arange(len(paths))
    return Stream(Files(root, paths), numbers, **{"image_size": 8, "mode": "RGB"} | settings)


def one_by_one(stream: Stream) -> Tensor:
    return torch.stack([stream[i] for i in range(len(stream))])


def test_images_are_decoded_once(root, decoded):
    stream = stream_of(root)
    expected = one_by_one(stream)
    assert decode(stream).equal(expected)
    again = decode(stream_of(root))
    assert again.equal(expected)
    again += 1  # its own
    assert decode(stream_of(root)).equal(expected)
    assert decoded == [len(stream)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_processes_decode_the_same(root, monkeypatch, mode):
    monkeypatch.setattr(module, "_IMAGES", 1)
    monkeypatch.setattr(module, "_CHUNK", 500)
    stream = stream_of(root, mode=mode)
    state = torch.get_rng_state()
    assert torch.cat(list(module._chunks(stream))).equal(one_by_one(stream))
    assert torch.get_rng_state().equal(state)


def test_kept_stream_is_the_same(root, monkeypatch):
    stream = stream_of(root)
    kept = keep(stream)
    monkeypatch.setattr(Files, "open", None)
    assert kept.keys() == stream.keys()
    some = torch.tensor([5, 0, 7])
    monkeypatch.undo()
    expected = one_by_one(stream)
    assert one_by_one(kept).equal(expected)
    assert one_by_one(kept.take(some)).equal(expected[some])
    assert one_by_one(kept.take(some).take(torch.tensor([2, 1]))).equal(expected[[7, 0]])


@pytest.mark.parametrize(
    "other",
    [{"image_size": 7}, {"mode": "L"}, {"positions": torch.tensor([1, 0, 2])}],
    ids=["size", "mode", "images"],
)
def test_other_images_have_a_file_of_their_own(root, cache, other):
    stream = stream_of(root)
    decode(stream)
    changed = Stream(
        stream.pictures,
        **{"positions": stream.positions, "image_size": 8, "mode": "RGB"} | other,
    )
    assert decode(changed).equal(one_by_one(changed))
    assert len(list(cache.glob("*.u8"))) == 2


@pytest.mark.parametrize("time_set_back", [False, True])
def test_changed_file_is_seen(root, time_set_back):
    stream = stream_of(root)
    before = decode(stream)
    path = Path(stream.pictures.where(3))
    found = path.stat()
    write(path, np.random.default_rng(7), hours=2)
    assert path.stat().st_size == found.st_size
    if time_set_back:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = decode(stream_of(root))
    assert after.equal(one_by_one(stream))
    assert [i for i in range(len(stream)) if not after[i].equal(before[i])] == [3]


def test_file_just_written_is_decoded_by_each(root, cache):
    stream = stream_of(root)
    Path(stream.pictures.where(3)).touch()
    assert decode(stream).equal(one_by_one(stream))
    assert not list(cache.glob("*.u8"))


def test_file_that_changes_while_it_is_decoded_is_not_kept(root, cache, monkeypatch):
    stream = stream_of(root)
    before = module._decoded

    def and_change(images):
        yield from before(images)
        write(Path(stream.pictures.where(3)), np.random.default_rng(7), hours=3)

    monkeypatch.setattr(module, "_decoded", and_change)
    found = decode(stream)
    assert not list(cache.glob("*.u8"))
    assert found.equal(one_by_one(stream))


def test_of_a_file_that_is_gone_its_name_is_said(root, cache):
    stream = stream_of(root)
    path = Path(stream.pictures.where(3))
    path.unlink()
    with pytest.raises(ValueError, match=f"every image must be readable, got {path} "):
        decode(stream)


def test_few_bytes_are_not_kept(root, cache, monkeypatch):
    monkeypatch.setattr(module, "LEAST_BYTES", 2**16)
    stream = stream_of(root)
    assert decode(stream).equal(one_by_one(stream))
    assert not cache.exists()


def test_copied_folder_has_a_file_of_its_own(root, tmp_path, cache):
    expected = decode(stream_of(root))
    other = shutil.copytree(root, tmp_path / "other")
    assert decode(stream_of(other)).equal(expected)
    assert len(list(cache.glob("*.u8"))) == 2


@pytest.mark.parametrize("in_memory", [None, False])
def test_data_are_the_same_with_and_without_the_cache(root, cache, monkeypatch, in_memory):
    settings = {"root": root, "train_size": 8, "val_size": 4, "in_memory": in_memory}

    def batch(data):
        generator = torch.Generator().manual_seed(1)
        return torch.cat([x for x, *_ in data.batches("train", batch_size=3, generator=generator)])

    made, kept = load_data("folder", **settings), load_data("folder", **settings)
    assert len(list(cache.glob("*.u8"))) == 3
    monkeypatch.setenv("SELFKD_CACHE_GB", "0")
    plain = load_data("folder", **settings)
    for data in (made, kept):
        assert data.fingerprint == plain.fingerprint
        assert (data.mean, data.std) == (plain.mean, plain.std)
        assert batch(data).equal(batch(plain))


def test_only_the_images_of_the_splits_are_decoded(root, monkeypatch):
    read, before = [], Stream._read
    monkeypatch.setattr(Stream, "_read", lambda self, n: read.append(n) or before(self, n))
    data = load_data("folder", root=root, train_size=2, val_size=2)
    assert len(data.train) + len(data.val) + len(data.test) == len(read) == 10


def test_why_images_are_not_kept_is_said_once(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "file"))
    data = load_data("folder", root=root, image_size=8)
    assert data.note.count("decoded images are not kept for other processes") == 1
    assert sum("are not kept" in record.message for record in caplog.records) == 1
