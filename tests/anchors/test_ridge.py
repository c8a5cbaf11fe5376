"""Anchor A17: born-again ridge regression is what its closed form says (Mobahi et al., 2020)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from engine import make_run

from selfkd.config import load_config
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.training.functions import load_function

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "anchors" / "a17_ridge.py"
CONFIG = ROOT / "tune_configs" / "anchors" / "a17_ridge.yaml"
REFERENCE = f"{EXAMPLE}:train_ridge"


@pytest.fixture(scope="module")
def anchor() -> ModuleType:
    return sys.modules[load_function(REFERENCE).__module__]


def in_process(folder: Path, *settings: str) -> Path:
    config = load_config(CONFIG, settings=list(settings))
    run = RunFolder.create(folder / "run", config)
    born_again(make_run(config, run, function=REFERENCE))
    return run.path


def test_generations_are_those_of_the_closed_form(
    anchor: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_process(tmp_path)
    rows = anchor.compare(run)
    assert len(rows) == 9
    assert all(row.difference < 1e-8 for row in rows)
    assert [row.test_mse for row in rows] == pytest.approx([row.closed_mse for row in rows])
    for errors in ([row.test_mse for row in rows], [row.val_mse for row in rows]):
        assert anchor.shape(errors) == "U-shaped, lowest in generation 4"
    anchor.main([str(run)])
    printed = capsys.readouterr().out
    assert "test error is U-shaped, lowest in generation 4" in printed
    assert f"{rows[4].test_mse:.5f}" in printed


@pytest.mark.slow  # in one process it is above; test_examples has a user's function in workers
def test_those_of_the_command_are_the_same(anchor: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfkd.generations", "--config", str(CONFIG)]
    done = subprocess.run(
        [*command, "--train", REFERENCE, "--name", "ridge", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [
        [row.test_mse for row in anchor.compare(run)]
        for run in (tmp_path / "runs" / "ridge", in_process(tmp_path))
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_each_round_shrinks_once_more(anchor: ModuleType, tmp_path: Path) -> None:
    rows = anchor.compare(in_process(tmp_path, "rounds=3"))
    points, values = (part.numpy()[:, 0] for part in anchor.make_data(anchor.TRAIN, seed=0))
    distances = points[:, None] - points
    eigenvalues, vectors = np.linalg.eigh(np.exp(-(distances**2) / (2 * anchor.WIDTH**2)))
    before = values
    for row in rows:
        expected = eigenvalues / (eigenvalues + 0.2) * (vectors.T @ before)
        assert vectors.T @ row.fitted == pytest.approx(expected, abs=1e-12)
        assert np.linalg.norm(row.fitted) < np.linalg.norm(before)
        before = row.fitted


def test_where_c_is_large_error_rises_from_the_first_round_on(
    anchor: ModuleType, tmp_path: Path
) -> None:
    rows = anchor.compare(in_process(tmp_path, "params.c=5"))
    assert anchor.shape([row.test_mse for row in rows]) == "rising from generation 0 on"
    assert all(row.difference < 1e-8 for row in rows)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([3.0, 1.0, 2.0], "U-shaped, lowest in generation 1"),
        ([1.0, 2.0, 3.0], "rising from generation 0 on"),
        ([3.0, 2.0, 1.0], "falling"),
        ([3.0, 1.0, 2.0, 1.5], "of another shape"),
        ([3.0, 4.0, 1.0, 2.0], "of another shape"),
    ],
)
def test_the_shape_in_words(anchor: ModuleType, errors: list[float], words: str) -> None:
    assert anchor.shape(errors) == words
