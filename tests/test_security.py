"""No key or token of the environment ends up in what a run writes or prints."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from ray_head import ROOT

from selfkd import ensemble, generations, submit

SECRETS = ("WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
TINY = ["search.trials=1", "train.epochs=2", "model.args={width: 4}", "tracking.mode=offline"]
TINY += ["confirm.seeds=0"]


def test_no_secret_is_written_or_printed(tmp_path: Path) -> None:
    planted = {name: secrets.token_hex(20) for name in SECRETS}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= planted
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "selfkd.generations", "--rounds", "1", "--verbose"]
    command += [word for setting in TINY for word in ("--set", setting)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rb"dashboard at \S*http://127\.0\.0\.1:", done.stderr), done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.suffix == ".safetensors" for path in files)
    written = {str(path): path.read_bytes() for path in files}
    written |= {"stdout": done.stdout, "stderr": done.stderr}
    found = [
        (name, where)
        for name, value in planted.items()
        for where, content in written.items()
        if value.encode() in content
    ]
    assert found == []


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
