"""Several runs at once that share their soft targets."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from drive import Driver
from record import record
from test_killed_driver import SETTINGS

from selfkd.targets import main


@pytest.mark.parametrize(
    "killed",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["both to the end", "one killed in between"],
)
def test_two_runs_cache_the_same_teacher_at_once(
    driver: Driver, tmp_path: Path, killed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both write the same shards; what each finds is what it would have found alone."""
    settings = [
        *(line for line in SETTINGS if not line.startswith("targets.")),
        f"targets={{root: {tmp_path / 'shared'}, shard_size: 20}}",
        "data={views: 2, jitter: 1}",
    ]
    found: dict[str, tuple[int, str]] = {}

    def run(driver: Driver, name: str) -> None:
        folder = tmp_path / name / "run"
        folder.parent.mkdir()
        if killed and name == "b":
            assert driver.run(folder, settings, die="^TaskProgressed", number=5)[0] != 0
        found[name] = driver.run(folder, settings)

    with Driver() as other:
        other.run(tmp_path / "warm" / "up", ["model.name=none"])  # until it has started
        threads = [
            threading.Thread(target=run, args=each) for each in ((driver, "a"), (other, "b"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = tmp_path / "alone" / "run"
        alone.parent.mkdir()
        own = [line.replace("shared", "own") for line in settings]
        assert driver.run(alone, own) == (0, "")
    assert found == {"a": (0, ""), "b": (0, "")}
    a, b, c = (record(tmp_path / name / "run") for name in ("a", "b", "alone"))
    assert a == b == c
    stores = list((tmp_path / "shared").glob("*/*/manifest.json"))
    assert len(stores) == 1
    assert main(["verify", str(tmp_path / "shared")]) == 0, capsys.readouterr().out
