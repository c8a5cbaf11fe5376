from pathlib import Path

import pytest

from selfkd.data import decode
from selfkd.storage import machine_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the machine's cache, which keeps images of any size."""
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decode, "LEAST_BYTES", 0)
    return tmp_path / "cache" / machine_cache.FOLDER


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that are decoded, one for each part of a split."""
    found, before = list[int](), decode._decoded

    def follow(stream):
        found.append(len(stream))
        return before(stream)

    monkeypatch.setattr(decode, "_decoded", follow)
    return found
