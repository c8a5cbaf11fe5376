"""The script that a machine with a GPU runs: tried on the CPU, with little installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

FOLDER = Path(__file__).parents[1] / "gpu"
NOT_THERE = (  # the script needs torch, timm, scikit-learn and safetensors alone
    *("ray", "wandb", "pydantic", "pydantic_core", "rich", "tenacity", "psutil", "optuna"),
    *("transformers", "lightning", "pyarrow", "torchmetrics"),
)
BLOCKED = f"""
import runpy, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {NOT_THERE!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
del sys.argv[0]
sys.path.insert(0, {str(FOLDER)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, blocked: bool = True) -> subprocess.CompletedProcess[str]:
    start = ["-c", BLOCKED] if blocked else []
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER}:{FOLDER.parents[1]}"}
    return subprocess.run(
        [sys.executable, *start, str(FOLDER / "check.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_all_parts_run_on_the_cpu_without_what_commands_need() -> None:
    done = run("--device", "cpu", "--quick")

    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) >= 20
    assert "| a resumed training is bit-equal | yes |  |" in rows
    assert not [row for row in rows if "FAILED" in row]


def test_a_part_that_fails_is_named_and_the_rest_goes_on(monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import check  # type: ignore[import-not-found]

    def fail(setting: object) -> list[object]:
        raise AssertionError("apart by 3")

    parts = {"losses": (fail, 5), "views": check.PARTS["views"]}
    monkeypatch.setattr(check, "PARTS", parts)

    assert check.main(["--device", "cpu", "--quick"]) == 1

    said = capsys.readouterr().out
    assert (
        "one tiny network stands for those that are named, so times and rates say nothing" in said
    )
    assert "| FAILED: losses | apart by 3 |  |" in said
    assert "| views bit-equal to those of the CPU | 9 of 9 |  |" in said
    assert said.rstrip().endswith("failed: losses")


@pytest.mark.parametrize("name", ["ResNet-20", "ensemble"])
def test_rates_are_measured_on_a_gpu_that_is_not_there(monkeypatch, name) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import check  # type: ignore[import-not-found]

    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with fake_cuda():
            rows = check.run_part(name, "cuda", quick=True)
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]
        torch.backends.cudnn.benchmark = False

    assert all(row.found.endswith("/s") for row in rows)


def test_a_part_that_hangs_is_ended(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import check  # type: ignore[import-not-found]

    with pytest.raises(AssertionError, match="no time was left"):
        check.run_apart("views", "cpu", 0.0)
    monkeypatch.setattr(check, "LEAST", 0.0)
    with pytest.raises(AssertionError, match=r"took more than 0\.01 s"):
        check.run_apart("views", "cpu", 0.01)


def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import check  # type: ignore[import-not-found]

    assert check.main([]) == 1
    assert "needs a GPU that torch finds: --device cpu --quick" in capsys.readouterr().out


@pytest.mark.slow  # a process group: that of NCCL needs two GPUs
def test_two_ranks_train_as_one() -> None:
    done = run("--device", "cpu", "--part", "ranks", blocked=False)

    assert done.returncode == 0, done.stderr
    assert "two ranks over gloo as one" in done.stdout
