"""Every example runs."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from selfkd.config import load_config
from selfkd.data import load_data
from selfkd.experiments.run_folder import RunFolder
from selfkd.storage.checkpoint import save_tensors

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_plot_generations_gives_means_and_paired_intervals(tmp_path: Path) -> None:
    accuracy = np.array([[0.90, 0.92, 0.95], [0.80, 0.81, 0.86], [0.85, 0.88, 0.89]])
    for number, row in enumerate(accuracy):
        *generations, ensemble = [{"test_accuracy": value} for value in row]
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "summary.json").write_text(
            json.dumps(
                {
                    "generations": [{"test_accuracy": 0.5}] * len(generations),
                    "confirmations": [
                        {"mean": {"value": row["test_accuracy"]}} for row in generations
                    ],
                    "ensemble": ensemble,
                }
            )
        )
    printed = subprocess.run(
        [sys.executable, str(EXAMPLES / "plot_generations.py"), *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    gain = accuracy[:, 1] - accuracy[:, 0]
    half = stats.ttest_1samp(gain, 0).confidence_interval(0.95).high - gain.mean()
    assert "3 runs" in printed
    assert f"1: {accuracy[:, 1].mean():.2%}" in printed
    assert f"vs generation 0: {gain.mean():+.2%} ± {half:.2%}" in printed


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(EXAMPLES))
    try:
        from plot_generations import draw
    finally:
        sys.path.pop(0)
    draw(
        np.array([[0.9, 0.91, 0.95], [0.8, 0.83, 0.85]]), ["0", "1", "ensemble"], tmp_path / "a.svg"
    )
    assert (tmp_path / "a.svg").read_text().count("<path") > 5


def run(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs an example in this process, which has imported what takes seconds."""

    def run_here(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


@pytest.mark.parametrize(
    ("seeds", "gain", "low_gain"),
    [
        (2, 0.0, -100.0),  # two seeds have an interval of any width
        pytest.param(4, 1.0, 0.0, marks=pytest.mark.slow),  # the example itself: 3.7, 2.4
    ],
)
def test_a_plain_loop_is_born_again(
    seeds: int,
    gain: float,
    low_gain: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plain_loop

    monkeypatch.setattr(plain_loop, "SEEDS", seeds)
    plain_loop.main()
    printed = capsys.readouterr().out
    found = re.findall(r"(?:generation \d|student of all three): (\d+\.\d+)%", printed)
    gains = re.findall(r"%, ([+-]\d+\.\d) points \[([+-]\d+\.\d), ", printed)
    assert len(found) == 4
    assert all(float(accuracy) > 75 for accuracy in found)
    assert len(gains) == 3
    assert all(float(mean) > gain and float(low) > low_gain for mean, low in gains)


def test_a_loop_of_somebody_s_own_makes_generations(
    run_here: Callable[..., str], tmp_path: Path
) -> None:
    few = ("search.trials=2", "confirm.seeds=0", "resources.cpu=1.5")  # one worker of one thread
    printed = run_here("your_loop_generations.py", *few)
    found = re.findall(r"generation \d: (\d+\.\d)% of the tags right", printed)
    assert len(found) == 3
    assert all(float(share) > 60 for share in found)
    assert len(list((tmp_path / "runs").glob("*/generation_00?/student.safetensors"))) == 3


def test_features_and_logits_in_one_loss(run_here: Callable[..., str]) -> None:
    printed = run_here("features.py").splitlines()
    assert [line.partition(":")[0] for line in printed] == [
        "teacher",
        "student, labels only",
        "student, logits",
        "student, logits and features",
    ]
    for name in ("hard_loss", "soft_loss", "hint", "attention", "relations", "val_accuracy"):
        assert re.search(rf"\b{name} \d+\.\d{{3}}", printed[-1])


@pytest.mark.slow  # what they plug in is tested in tests/integrations
@pytest.mark.parametrize("name", ["timm_task.py", "lightning_callback.py"])
def test_loops_of_other_libraries_are_born_again(name: str, tmp_path: Path) -> None:
    found = re.findall(r"generation \d: val (\d+\.\d+)%", run(name, tmp_path))
    assert len(found) == 3
    assert all(float(accuracy) > 90 for accuracy in found)


@pytest.mark.parametrize(
    ("steps", "right"),
    [
        (10, 0.0),  # that models of half the depth learn is in integrations/test_transformers
        pytest.param(400, 80.0, marks=pytest.mark.slow),
    ],
)
def test_a_transformer_of_half_the_depth_learns_from_a_whole_one(
    run_here: Callable[..., str], steps: int, right: float
) -> None:
    printed = run_here("transformers_trainer.py", "--steps", str(steps))
    found = dict(re.findall(r"^(.+?) +(\d+\.\d) %$", printed, flags=re.MULTILINE))
    assert list(found) == ["teacher", "labels only", "distilled", "generation 2"]
    assert all(float(accuracy) > right for accuracy in found.values())


@pytest.mark.slow
def test_language_models_are_trained_from_logits_that_are_cached_once(tmp_path: Path) -> None:
    printed = run("transformers_cached.py", tmp_path, "--steps", "20", "--seeds", "1")
    found = dict(re.findall(r"^(.+?) +(\d\.\d{3}) nats$", printed, flags=re.MULTILINE))
    assert list(found) == ["teacher", "labels only, seed 1", "distilled, seed 1"]
    assert all(float(value) < 5.5 for value in found.values())  # log 256 is 5.545


def test_the_mythical_digit_is_drawn_and_told(tmp_path: Path) -> None:
    """Of three kinds of threes, each has its frame; the story has the figures of the run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import mythical_digit as mythical
    finally:
        sys.path.pop(0)
    config = load_config(settings=["study={arms: {no_three: {set: {data.classes: [0, 1, 2]}}}}"])
    labels = load_data("digits").test.labels
    logits = 10 * torch.nn.functional.one_hot(labels, 10).float()
    threes = torch.nonzero(labels == 3).flatten()
    logits[threes[1]] = torch.eye(10)[8] + 0.5 * torch.eye(10)[3]  # right with a bias of 1
    logits[threes[2]] = 9 * torch.eye(10)[8]  # wrong even then
    RunFolder(tmp_path).save_config(config)
    save_tensors(tmp_path / "predictions" / "a.safetensors", {"test": logits}, {})
    unseen = {"classes": [3], "bias": 1.0, "test_errors": 1.0}
    unseen |= {"class_accuracy": [0.0] * 3 + [0.9], "biased_class_accuracy": [0.0] * 3 + [0.95]}
    row = {"hash": "a", "test_errors": 20.0, "unseen": unseen}
    summary = {"items": 1197, "members": {"test_errors": 7.0}, "arms": [{"runs": [row]}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    mythical.draw(tmp_path, tmp_path / "threes.png")
    with Image.open(tmp_path / "threes.png") as picture:
        step = picture.width // mythical.COLUMNS
        frames = [picture.getpixel((place * step + 2, 2)) for place in range(4)]
    assert frames == [mythical.GREEN, mythical.BLUE, mythical.RED, mythical.GREEN]
    story = mythical.story(summary)
    assert all(part in story for part in ("7 of 1,197", "errs on 20", "90.0%", "+1.00", "95.0%"))
