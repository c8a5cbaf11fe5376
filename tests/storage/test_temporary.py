"""Temporary folders: removed at the end, or by the next process where theirs was killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from selfkd.storage import temporary
from selfkd.storage.temporary import (
    TemporaryFolder,
    import_with_files,
    remove_all,
    sweep,
    temporary_files,
)

HOLDER = """
import sys
from pathlib import Path
from selfkd.storage.temporary import TemporaryFolder
folder = TemporaryFolder(path=Path(sys.argv[1]))
(folder.path / "part").mkdir()
(folder.path / "part" / "file").write_text("left")
print("held", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    dead, living = tmp_path / "session_1", tmp_path / "session_2"
    processes = hold(dead), hold(living)
    try:
        processes[0].kill()
        processes[0].wait()
        sweep(tmp_path, "session_*")
        assert not dead.exists()
        assert (living / "part" / "file").read_text() == "left"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    sweep(tmp_path, "session_*")
    assert not living.exists()


def test_what_is_not_provably_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the file, a link to one that has it, a file that is a link, other users'."""
    held = TemporaryFolder(path=tmp_path / "elsewhere")
    os.close(temporary._held.pop(held.path)._lock)  # as if its process had died
    (tmp_path / "session_link").symlink_to(held.path)
    (tmp_path / "session_bare").mkdir()
    (tmp_path / "session_file").write_text("")
    (tmp_path / "session_odd").mkdir()
    (tmp_path / "session_odd" / ".selfkd-held").symlink_to(held.path / ".selfkd-held")
    sweep(tmp_path, "session_*")
    names = ["elsewhere", "session_bare", "session_file", "session_link", "session_odd"]
    assert sorted(os.listdir(tmp_path)) == names
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    sweep(tmp_path, "elsewhere")
    assert held.path.exists()
    monkeypatch.undo()
    sweep(tmp_path, "elsewhere")
    assert not held.path.exists()
    sweep(tmp_path / "none", "*")


def test_a_folder_is_removed_at_its_end_and_all_when_the_process_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with TemporaryFolder("selfkd-a-") as folder:
        (folder.path / "file").write_text("")
        assert folder.path.parent == tmp_path
    assert os.listdir(tmp_path) == []
    folder.remove()
    TemporaryFolder("selfkd-b-")
    remove_all()
    assert os.listdir(tmp_path) == []


def test_temporary_files_of_a_command_and_of_an_import_lie_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_files():
        made = Path(tempfile.mkdtemp())
        assert made.parent.parent == tmp_path
    assert os.listdir(tmp_path) == []
    (tmp_path / "makes_files.py").write_text("import tempfile\nMADE = tempfile.mkdtemp()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_with_files("makes_files")
    (folder,) = tmp_path.glob("selfkd-*")
    assert Path(sys.modules.pop("makes_files").MADE).parent == folder
    remove_all()
    assert not folder.exists()
