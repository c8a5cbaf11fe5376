"""No password of a path is repeated, and nothing of a foreign run folder is fetched or run.

That a run writes and prints no key or token of its environment is in `tracking/test_online.py`.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from selfkd import ensemble, generations, submit


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generations", ["--set", "storage={}"]),
        ("generations", ["--set", "data.root={}"]),
        ("generations", ["--set", "targets.root={}"]),
        ("generations", ["--resume", "{}"]),
        ("ensemble", ["--from", "{}"]),
        ("ensemble", ["--set", "members.checkpoints=[{{path: '{}', model: a}}]"]),
        ("ensemble", ["--set", "members.checkpoints=[{{path: a, model: a, classes: '{}'}}]"]),
    ],
)
@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:{}@bucket/a",
        "S3:///KEY:{}@bucket",
        "abfs://:{}@host/a",
        "ftp://a:{}@b",
        "s3://a:{}/x@b",
    ],
)
@pytest.mark.parametrize("outside", [False, True])
def test_a_password_in_a_path_is_refused_and_not_repeated(
    command: str, words: list[str], uri: str, outside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = f"x{secrets.token_hex(8)}"
    words = [word.format(uri.format(secret)) for word in words]
    if outside:
        words = ["--address", "h:1", "--", command, *words]
        assert submit.main(words) == 2
    else:
        assert {"generations": generations, "ensemble": ensemble}[command].main(words) == 2
    said = capsys.readouterr()
    assert "must have no user:password@ in its URI" in said.err
    assert secret not in said.out + said.err


def test_nor_is_one_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SELFKD_DATA", "s3://KEY:hidden@bucket")
    assert generations.main(["--set", f"storage={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "must have no user:password@" in said
    assert "hidden" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["cache_dir: .", "pretrained_cfg: {url: 'http://127.0.0.1:9/x.py'}", "act_layer: os.system"],
)
def test_a_foreign_config_that_would_fetch_or_run_is_refused_at_resume(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("config.yaml", f"format: 1\nmodel:\n  name: resnet18\n  args:\n    {line}\n"),
        ("command", "generations"),
        ("run_id", "x"),
    ):
        (tmp_path / name).write_text(text)
    assert generations.main(["--resume", str(tmp_path)]) == 2
    assert "model.args: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command", "config.yaml", "run_id"]
