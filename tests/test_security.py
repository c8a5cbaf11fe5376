"""No key or token of the environment ends up in what a run writes or prints."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

from ray_head import ROOT

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
