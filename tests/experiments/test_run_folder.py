"""What a run folder is continued from."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import FORMAT


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
