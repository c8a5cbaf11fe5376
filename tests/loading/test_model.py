"""Models of run folders: which is loaded, what it predicts, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import make_run
from PIL import Image
from run_folders import capacity_run, generations_run, study_run
from torch import nn

import selfkd
from selfkd.cli.result import Result
from selfkd.config import load_config
from selfkd.data import load_data
from selfkd.data.stream import square
from selfkd.errors import ConfigError
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import EnsembleSummary, GenerationsSummary, Members
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import load_json, save_json
from selfkd.storage.rows import load_row
from selfkd.worker.jobs import run_job

DIGITS = load_data("digits")


def accuracy(model: selfkd.LoadedModel) -> float:
    labels = model.predict(DIGITS.test.images).labels
    return (labels == DIGITS.test.labels).double().mean().item()


def test_each_generation_predicts_as_the_run_measured_it(lineage: Path) -> None:
    for result in RunFolder(lineage).results():
        model = selfkd.load(lineage, generation=result.generation)
        assert accuracy(model) == pytest.approx(result.metrics["test_accuracy"])
        assert model.checkpoint["hash"] == result.hash
        assert not model.model.training
        assert model.classes == DIGITS.class_names


def test_the_best_generation_is_that_of_fresh_seeds_on_validation(lineage: Path) -> None:
    summary = load_row(GenerationsSummary, lineage / "summary.json")
    means = [sum(row.validation) / len(row.validation) for row in summary.confirmations]
    best = means.index(max(means))
    chosen = RunFolder(lineage).results()[best]
    assert summary.best == best
    assert selfkd.load(lineage).checkpoint["hash"] == chosen.hash
    assert selfkd.load(lineage / "best.safetensors").checkpoint["hash"] == chosen.hash


def test_the_ensemble_of_all_generations_is_the_summarys(lineage: Path) -> None:
    summary = load_row(GenerationsSummary, lineage / "summary.json")
    model = selfkd.load(lineage, ensemble=True)
    assert summary.ensemble is not None
    assert accuracy(model) == pytest.approx(summary.ensemble.metrics["test_accuracy"])
    with pytest.raises(ValueError, match="model must be a single one to be saved"):
        model.save(lineage / "out")


def test_an_ensemble_run_gives_its_student_or_its_teachers(compressed: Path) -> None:
    summary = load_row(EnsembleSummary, compressed / "summary.json")
    student = selfkd.load(compressed)
    assert student.checkpoint["hash"] == summary.chosen.hash
    best = selfkd.load(compressed / "best.safetensors")
    assert best.checkpoint["hash"] == summary.chosen.hash
    teachers = selfkd.load(compressed, ensemble=True)
    assert accuracy(teachers) == pytest.approx(summary.teacher.metrics["test_accuracy"])
    rows = load_row(Members, compressed / "members" / "result.json").members
    assert teachers.checkpoint["hash"] == "+".join(row.hash for row in rows)


def test_a_run_under_way_gives_what_is_done(lineage: Path, tmp_path: Path) -> None:
    shutil.copytree(lineage, tmp_path / "run")
    for name in ("summary.json", "best.safetensors"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "generation_001" / "result.json").unlink()
    assert selfkd.load(tmp_path / "run").title == "generation 0"
    (tmp_path / "run" / "generation_000" / "result.json").unlink()
    with pytest.raises(ConfigError, match="must have a finished generation, got none yet: wait"):
        selfkd.load(tmp_path / "run")


# --- images ---


def test_images_of_any_kind_are_the_same_to_it(lineage: Path, tmp_path: Path) -> None:
    model = selfkd.load(lineage)
    pixels = DIGITS.test.images[:3]
    pictures = [Image.fromarray(image[0].numpy()) for image in pixels]
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    wanted = model.predict(pixels).probabilities
    given: list[Any] = [pictures, files, [str(file) for file in files], list(pixels)]
    given += [pixels[:, 0].numpy(), pixels.permute(0, 2, 3, 1).numpy(), pictures[0].convert("RGB")]
    for images in given:
        found = model.predict(images).probabilities
        torch.testing.assert_close(found, wanted[: len(found)])
    torch.testing.assert_close(model.predict(pixels / 255).probabilities, wanted)
    inputs, _, _ = next(DIGITS.batches("test", batch_size=3))
    with torch.no_grad():
        assert torch.equal(model.model(inputs).softmax(1), wanted)


@pytest.mark.parametrize(
    "one", [DIGITS.test.images[0], Image.new("L", (8, 8)), np.zeros((8, 8), np.uint8)]
)
def test_one_image_is_one_row(lineage: Path, one: Any) -> None:
    found = selfkd.load(lineage).predict(one)
    assert (len(found), len(found.names), found.probabilities.shape) == (1, 1, (1, 10))
    (((name, value), *_),) = found.top(2)
    assert (name, value) == (found.names[0], found.confidences[0].item())
    assert f"{name} {value:.0%}" in repr(found)


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (16, 16)])
def test_other_sizes_are_scaled_and_cut_as_in_evaluation(
    lineage: Path, shape: tuple[int, int]
) -> None:
    model = selfkd.load(lineage)
    rolled = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    picture = Image.fromarray(rolled)
    cut = torch.tensor(np.array(square(picture, 8)))[None]
    wanted = model.predict(cut).probabilities
    assert torch.equal(model.predict(picture).probabilities, wanted)
    # of a tensor by torch's own antialiasing, which rounds otherwise
    torch.testing.assert_close(
        model.predict(torch.tensor(rolled)).probabilities, wanted, atol=5e-3, rtol=0
    )


def test_no_images_are_no_rows(lineage: Path) -> None:
    assert selfkd.load(lineage).predict([]).probabilities.shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 8, 8) - 2, ValueError, r"pixels in \[0, 1\].* got -2 to -2: .* `.model`"),
        (torch.full((1, 8, 8), torch.nan), ValueError, r"must be pixels in \[0, 1\]"),
        (
            torch.zeros(3, 8, 8),
            ValueError,
            r"must be \[1, height, width\], got a tensor \[3, 8, 8\]",
        ),
        (torch.zeros(1, 8, 8, dtype=torch.int64), ValueError, "must be uint8.* got torch.int64"),
        ([3], TypeError, "must be files, Pillow images, arrays or tensors, got int"),
        (3, TypeError, "must be files, Pillow images, arrays or tensors, got int"),
        ("nowhere.png", ValueError, "every image must be readable, got nowhere.png"),
    ],
)
def test_images_that_cannot_be_used(
    lineage: Path, images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        selfkd.load(lineage).predict(images)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": 2}, "one of the 2 that are finished in .*, 0 to 1, got 2"),
        ({"generation": -1}, "0 to 1, got -1"),
        ({"generation": 1, "ensemble": True}, "generation must not be given with ensemble=True"),
    ],
)
def test_what_the_run_does_not_have(lineage: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        selfkd.load(lineage, **options)


def test_an_ensemble_has_no_generations(compressed: Path) -> None:
    with pytest.raises(ConfigError, match=r"left out for .*, a run of selfkd\.ensemble, got 1"):
        selfkd.load(compressed, generation=1)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run must be a run folder .* got .*nowhere"):
        selfkd.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"run must be a file that is there, got a\.safetensors"):
        selfkd.load("a.safetensors")
    run = generations_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="generation 2 must have its file, got none at"):
        selfkd.load(run, generation=2)
    (run / "config.yaml").write_text(text.replace("format: 1", "format: 7"))
    with pytest.raises(ConfigError, match=r"is of format 7, and selfkd .* reads format 1"):
        selfkd.load(run)


def test_runs_that_choose_no_model_name_their_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which chooses no model: its files are named once it"):
        selfkd.load(study_run(tmp_path / "study"))
    run = capacity_run(tmp_path / "capacity")
    summary = load_json(run / "summary.json")
    summary["sizes"][1]["checkpoint"] = "students/a/trial_000/student.safetensors"
    save_json(run / "summary.json", summary)
    file = run / "students" / "a" / "trial_000" / "student.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ConfigError) as found:
        selfkd.load(run)
    assert f"{file}  (model.args.width 8)" in str(found.value)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": {"name": "selfkd_mlp", "args": {"width": 10**9}}}, "of its tensors' sizes"),
        ({"model": {"name": "os.system", "args": {}}}, "must be a timm model name"),
        ({"image_size": 10**9}, "image_size"),
        ({"image_size": 0}, "must say the size and the normalisation of its images"),
        ({"std": [0.0]}, "must say the size and the normalisation of its images"),
        ({"mean": [0.0, 0.0]}, "must say the size and the normalisation of its images"),
    ],
)
def test_a_foreign_file_is_checked_before_memory_is_taken(
    lineage: Path, tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    tensors, found = load_tensors(lineage / "best.safetensors")
    path = tmp_path / "a.safetensors"
    save_tensors(path, tensors, found | facts)
    with pytest.raises(ValueError, match=message):
        selfkd.load(path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("generation_001/result.json", {"models": []}, "generation 1 of .* must have a model"),
        ("generation_000/result.json", {"models": 3}, "generation_000/result.json is damaged"),
        ("generation_000/confirmation.json", {"mean": 3}, "confirmation.json is damaged"),
        ("summary.json", {"generations": 3}, "summary.json is damaged"),
        ("data.json", {"unit": 3}, "data.json is damaged"),
    ],
)
def test_damaged_rows_are_one_message(
    lineage: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(lineage, tmp_path / "run")
    path = tmp_path / "run" / file
    save_json(path, load_json(path) | change)
    with pytest.raises(ValueError, match=message):
        selfkd.load(tmp_path / "run")


def test_a_summary_without_rows_is_a_card_without_them(lineage: Path, tmp_path: Path) -> None:
    shutil.copytree(lineage, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    save_json(path, load_json(path) | {"generations": [], "confirmations": [], "ensemble": None})
    assert "## Results" in selfkd.load(tmp_path / "run").card


def test_names_of_files_stay_within_the_folder(lineage: Path, tmp_path: Path) -> None:
    shutil.copytree(lineage, tmp_path / "run")
    file = tmp_path / "run" / "generation_000" / "result.json"
    row = load_json(file)
    row["models"][0]["checkpoint"] = "../../elsewhere.safetensors"
    save_json(file, row)
    with pytest.raises(ValueError, match="must be a file within the run folder"):
        selfkd.load(tmp_path / "run", generation=0)


# --- a training function of the user's own ---

TRAIN = """
import torch

def train(trial):
    torch.manual_seed(trial.seed)
    student = torch.nn.Linear(4, 3)
    trial.report({"val_accuracy": 0.5 + 0.1 * trial.generation}, student=student)
    return {"test_accuracy": 0.25}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    (root / "mine.py").write_text(TRAIN)
    config = load_config(settings=["rounds=1", "search.trials=1", "confirm.seeds=2"])
    folder = RunFolder.create(root / "run", config)
    born_again(make_run(config, folder, run_job, function=f"{root / 'mine.py'}:train"))
    return folder.path


def test_its_architecture_comes_from_the_user(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"make_model must be given for .*make_model=lambda"):
        selfkd.load(own)
    model = selfkd.load(own, make_model=lambda: nn.Linear(4, 3))
    assert (model.title, model.classes) == ("generation 1", ())
    tensors, _ = load_tensors(own / "best.safetensors")
    assert torch.equal(model.model.state_dict()["weight"], tensors["weight"])
    inputs = torch.randn(5, 4)
    found = model.predict(inputs, batch_size=2)
    torch.testing.assert_close(found.probabilities, model.model(inputs).softmax(1).detach())
    assert found.names == [str(label) for label in found.labels.tolist()]
    with pytest.raises(ConfigError, match=r"make_model must make the network of .*size mismatch"):
        selfkd.load(own, make_model=lambda: nn.Linear(5, 3))
    with pytest.raises(ConfigError, match="ensemble must be False with make_model"):
        selfkd.load(own, ensemble=True, make_model=lambda: nn.Linear(4, 3))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        model.predict([1, 2])


def test_what_the_function_returns_is_in_the_result(own: Path) -> None:
    summary = load_row(GenerationsSummary, own / "summary.json")
    assert [row.metrics["test_accuracy"] for row in summary.generations] == [0.25, 0.25]
    assert [row["test_accuracy"] for row in Result(own, summary).table] == [0.25, 0.25]


def test_it_is_saved_and_loaded_too(own: Path, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Linear(4, 3)

    selfkd.load(own, make_model=make).save(tmp_path / "out")
    with pytest.raises(ConfigError, match="make_model must be given"):
        selfkd.load(tmp_path / "out")
    card = selfkd.load(tmp_path / "out", make_model=make).card
    assert "--train mine.py:train" in card
    assert str(own.parent) not in card
