"""W&B's temporary folders: those of a killed process go, those of a living one stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from selfkd.storage.temporary import sweep

IMPORT = """
import sys, tempfile
from selfkd.tracking.temporary import import_wandb
before = tempfile.gettempdir()
import_wandb()
assert tempfile.gettempdir() == before and "wandb" in sys.modules
print("imported", flush=True)
sys.stdin.readline()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    return process


def test_the_next_start_removes_what_a_killed_one_has_left_and_no_others(tmp_path: Path) -> None:
    others = ["tmpabcwandb-media", "selfkd-wandb-of-another", "selfkd-wandb-file"]
    for name in others[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / others[2]).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    (tmp_path / "selfkd-wandb-link").symlink_to(outside)
    living, killed = start(tmp_path), start(tmp_path)
    made = set(tmp_path.glob("selfkd-wandb-????????"))
    assert len(made) == 2
    assert all(len(list(folder.glob("*wandb-*"))) == 2 for folder in made)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    third = start(tmp_path)
    left = set(tmp_path.glob("selfkd-wandb-????????"))
    assert len(left & made) == 1  # that of the living one
    assert len(left) == 2
    for process in (living, third):
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert not set(tmp_path.glob("selfkd-wandb-????????"))
    assert all((tmp_path / name).exists() for name in [*others, "outside/lock"])
    assert (tmp_path / "selfkd-wandb-link").is_symlink()
    assert not list(tmp_path.glob("tmp*wandb-artifacts"))


def test_a_temporary_folder_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "gone", "selfkd-wandb-*")
    assert not (tmp_path / "gone").exists()
