"""What is written down of the machine at each start of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from selfkd.cli import environment


def test_every_start_is_written_down(tmp_path: Path) -> None:
    environment.record(tmp_path)
    environment.record(tmp_path)
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert len(starts) == 2
    assert {"selfkd", "torch", "ray"} <= starts[0]["versions"].keys()
    assert time.strptime(starts[0]["started"][:19], "%Y-%m-%dT%H:%M:%S")
    assert starts[0]["cpu"]
    assert isinstance(starts[0]["gpus"], list)


def test_a_damaged_environment_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    environment.record(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_cards_are_named_as_nvidia_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100'\necho 'NVIDIA H100'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.describe()["gpus"] == ["NVIDIA H100", "NVIDIA H100"]
    command.write_text("#!/bin/sh\nexit 9\n")
    assert environment.describe()["gpus"] == []
