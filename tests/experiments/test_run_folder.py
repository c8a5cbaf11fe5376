"""What a run folder is continued from."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfkd.config import Config, config_hash
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import FORMAT
from selfkd.storage.files import save_text
from selfkd.storage.remote import as_path


@pytest.mark.parametrize(
    ("text", "found"),
    [(f"format: {FORMAT + 1}\nrounds: 1\n", FORMAT + 1), ("rounds: 1\n", None), ("[1]\n", None)],
)
def test_another_format_is_refused_in_one_line_that_names_both(
    tmp_path: Path, text: str, found: int | None
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        RunFolder.open(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path} is of format {found}, ")
    assert f"continues format {FORMAT}: " in message


def test_what_was_written_is_read(tmp_path: Path) -> None:
    config = Config(rounds=3)
    RunFolder.create(tmp_path / "run", config)
    folder, read = RunFolder.open(tmp_path / "run")
    assert (folder.path, read) == (tmp_path / "run", config)


CREATE = """
import sys
import subprocess
import sys
from pathlib import Path
from selfkd.config import Config
from selfkd.experiments.run_folder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    print(RunFolder.create(Path(sys.argv[1]), Config(), numbered=True).path)
"""


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    """As in a shell's loop with &, without a --name: the names are those of the second."""
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, str(tmp_path / "runs" / "digits")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for start in starts:
        assert start.stdout is not None
        assert start.stdout.readline() == "ready\n"
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("\n")
        start.stdin.flush()
    paths = [line for start in starts for line in start.communicate(timeout=60)[0].splitlines()]
    assert [start.returncode for start in starts] == [0, 0, 0]
    names = {Path(path).name for path in paths}
    assert names == {"digits", *(f"digits-{number}" for number in range(2, 61))}
    for path in paths:
        assert (Path(path) / "run_id").read_text().startswith(f"{Path(path).name}-")


def test_a_given_name_is_never_another(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", Config())
    with pytest.raises(ConfigError, match="exists already: continue it with --resume"):
        RunFolder.create(tmp_path / "run", Config())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_start_has_left_has_its_name_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run_id").write_text("run-0")
    assert RunFolder.create(tmp_path / "run", Config()).run_id != "run-0"


def test_a_folder_that_another_start_creates_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self, **_: False)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="was created by another start just now"):
        RunFolder.create(tmp_path / "run", Config())


def test_numbers_are_those_of_folders_in_a_bucket_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfkd.experiments import run_folder

    monkeypatch.setattr(run_folder, "_SETTLE_SECONDS", 0.0)
    root = as_path("mock:///runs")
    numbered = [RunFolder.create(root / "a", Config(), numbered=True).path for _ in range(3)]
    assert [path.name for path in numbered] == ["a", "a-2", "a-3"]
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: save_text(root / "b" / "run_id", "x"))
    assert RunFolder.create(root / "b", Config(), numbered=True).path.name == "b-2"


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("kills", [(0,), (1,), (2,), (3,), (1, 1), (2, 1), (2, 2)])
def test_a_run_that_is_killed_while_its_config_is_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...]
) -> None:
    """Each start writes what its workers decide; it is killed before the write of that number."""
    from selfkd.experiments import run_folder

    folder = RunFolder.create(tmp_path / "run", Config())
    for start, kill in enumerate(kills):
        writes = iter(range(kill))

        def save(path: Path, text: str, *, writes: Iterator[int] = writes, **_: object) -> None:
            if next(writes, None) is None:
                raise _KilledError
            save_text(path, text)

        with monkeypatch.context() as patched, contextlib.suppress(_KilledError):
            patched.setattr(run_folder, "save_text", save)
            folder.save_config(Config().at({"train.amp": ("bfloat16", "float16")[start]}))
        folder, stored = RunFolder.open(folder.path)
        folder.check_change(stored, stored)
    config = Config().at({"train.amp": "none"})
    folder.save_config(config)
    assert RunFolder.open(folder.path)[1] == config
    assert (folder.path / "config.hash").read_text() == config_hash(config)


def test_a_run_has_no_config_that_would_be_too_long_to_read(tmp_path: Path) -> None:
    config = Config(params={"list": [1] * 200_000})
    with pytest.raises(ConfigError, match="must have at most 524,288 characters"):
        RunFolder.create(tmp_path / "run", config)
    assert list(tmp_path.iterdir()) == []
