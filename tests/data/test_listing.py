import os
import time
from pathlib import Path

import pytest

from selfkd.data import folder, listing
from selfkd.data.folder import open_folder
from tests.data.test_load import write_folder

HOUR_NS = 3600 * 10**9


@pytest.fixture(autouse=True)
def _any_number_of_files(cache, monkeypatch) -> None:
    monkeypatch.setattr(listing, "LEAST_FILES", 0)


@pytest.fixture
def root(tmp_path) -> Path:
    root = write_folder(tmp_path / "images", train=3, test=2)
    (root / "train" / "ant" / "notes.txt").write_text("")
    (root / "train" / "ant" / ".hidden").mkdir()
    age(root)
    return root


def age(root: Path) -> None:
    """Let all folders be an hour old."""
    then = time.time_ns() - HOUR_NS
    for place, _, _ in os.walk(root):
        os.utime(place, ns=(then, then))


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """Folders that were listed."""
    found, before = [], folder._list
    monkeypatch.setattr(folder, "_list", lambda root: found.append(root) or before(root))
    return found


def facts(root: Path) -> tuple[object, ...]:
    source = open_folder(root, None)
    assert source.test is not None
    splits = [source.pool, source.test]
    paths = [list(split.images.pictures.paths) for split in splits]
    labels = [split.labels.tolist() for split in splits]
    return source.class_names, source.val_size, source.note, paths, labels


def test_folder_is_listed_once(root, made):
    first = facts(root)
    assert "left out: 1 .txt, 1 hidden" in str(first)
    assert facts(root) == first
    assert made == [root]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train/bee/09.png").hardlink_to(root / "train/bee/00.png"),
        lambda root: (root / "train/bee/01.png").unlink(),
        lambda root: (root / "test/cat/01.png").rename(root / "test/cat/001.png"),
        lambda root: (root / "test").rename(root / "val"),
        lambda root: (root / "train/ant/notes.txt").rename(root / "train/ant/.notes"),
        lambda root: (root / "more").mkdir(),
    ],
    ids=["added", "removed", "renamed", "part renamed", "hidden", "folder added"],
)
def test_change_is_seen(root, made, change, monkeypatch):
    first = facts(root)
    change(root)
    second = facts(root)
    assert second != first
    monkeypatch.setenv("SELFKD_CACHE_GB", "0")
    assert facts(root) == second
    assert len(made) == 3


def test_change_is_seen_where_the_time_of_the_folder_is_set_back(root, made):
    place = root / "train/bee"
    first, found = facts(root), place.stat()
    (place / "01.png").unlink()
    os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert facts(root) != first


def test_folder_that_has_just_changed_is_listed_by_each(root, made):
    (root / "train" / "bee").touch()
    facts(root)
    facts(root)
    assert len(made) == 2


def test_folder_with_links_is_listed_by_each(root, tmp_path, made):
    other = tmp_path / "other.png"
    (root / "train/bee/00.png").rename(other)
    (root / "train/bee/00.png").symlink_to(other)
    age(root)
    assert facts(root) == facts(root)
    assert len(made) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"folders": [], "listing": {"classes": 3}}'])
def test_damaged_listing_is_made_anew(root, cache, made, content):
    first = facts(root)
    (file,) = cache.glob("*.json")
    file.write_text(content)
    assert facts(root) == facts(root) == first
    assert len(made) == 2


def test_listing_of_few_files_is_not_kept(root, cache, monkeypatch):
    monkeypatch.setattr(listing, "LEAST_FILES", 100)
    facts(root)
    assert not cache.exists() or not list(cache.glob("*.json"))
