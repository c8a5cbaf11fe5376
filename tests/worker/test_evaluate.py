"""What is measured of trained models, against NumPy and scikit-learn."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.results import Evaluation, Examples, from_row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.images.task import ImageTask
from selfkd.worker.evaluate import compare_errors, contrast, evaluate, examples

CONFIG = to_tree(load_config(settings=["model={name: selfkd_mlp, args: {width: 16, depth: 1}}"]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two networks after one epoch: they err often, and not alike."""
    folder = tmp_path_factory.mktemp("networks")
    task, paths = ImageTask(CONFIG), []
    for seed in range(2):
        torch.manual_seed(seed)
        network = task.make(task.config.model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for inputs, labels, _ in task.data.batches("train", batch_size=50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
        paths.append(str(folder / f"{seed}.safetensors"))
        model = ModelConfig(name="selfkd_mlp", args={"width": 16, "depth": 1})
        task.save(Path(paths[-1]), network, model, {})
    return paths


Measured = tuple[Evaluation, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def measured(checkpoints: list[str], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The first network with the second as its teacher, and the logits of both."""
    file = tmp_path_factory.mktemp("predictions") / "student.safetensors"
    (row,) = evaluate(
        CONFIG,
        checkpoints[0],
        predictions=str(file),
        teachers=[{"checkpoint": checkpoints[1]}],
        diagnose=True,
    )
    row = json.loads(json.dumps(row, allow_nan=False))
    task = ImageTask(CONFIG)
    student = {k: v.double().numpy() for k, v in load_tensors(file)[0].items()}
    teacher = {k: task.predict(checkpoints[1], k).double().numpy() for k in ("val", "test")}
    return from_row(Evaluation, row), student, teacher


def test_the_logits_that_a_teacher_s_own_evaluation_has_saved_are_read(
    measured: Measured, checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in ("teacher", "student")]
    (own,) = evaluate(CONFIG, checkpoints[1], predictions=files[0])
    teacher = {"hash": own["hash"], "checkpoint": checkpoints[1]}
    predicted, predict = list[str](), ImageTask.predict

    def remember(task: ImageTask, checkpoint: str, split: Any) -> torch.Tensor:
        predicted.append(checkpoint)
        return predict(task, checkpoint, split)

    monkeypatch.setattr(ImageTask, "predict", remember)

    def rows(**more: str) -> dict[str, Any]:
        student = {"predictions": files[1], "diagnose": True}
        (row,) = evaluate(CONFIG, checkpoints[0], teachers=[teacher | more], **student)
        return json.loads(json.dumps(row))

    found = rows(predictions=files[0])
    assert set(predicted) == {checkpoints[0]}
    assert from_row(Evaluation, found) == measured[0]
    assert rows(predictions=files[1]) == found, "another model's are not taken"
    assert rows(predictions=str(tmp_path / "none")) == found
    assert checkpoints[1] in predicted


@pytest.mark.skipif(sklearn.__version__ < "1.7", reason="sklearn's Brier score was of two classes")
@pytest.mark.parametrize("split", ["val", "test"])
def test_calibration_is_that_of_the_saved_logits(measured: Measured, split: str) -> None:
    evaluation, student, _ = measured
    found = evaluation.diagnostics[split]
    assert found.scaled is not None
    labels = ImageTask(CONFIG).labels(split).numpy()  # type: ignore[arg-type]
    z = student[split]
    assert found.metric("accuracy") == pytest.approx(accuracy_score(labels, z.argmax(1)), abs=1e-6)
    temperature = found.scaled["temperature"]
    for figures, p in (
        (found.metrics, softmax(z, axis=1)),
        (found.scaled, softmax(z / temperature, axis=1)),
    ):
        assert figures["nll"] == pytest.approx(log_loss(labels, p, labels=range(10)), rel=1e-4)
        expected = brier_score_loss(labels, p, labels=range(10), scale_by_half=False)
        assert figures["brier"] == pytest.approx(expected, rel=1e-4)
    assert sum(each.count for each in found.reliability) == len(labels)


def test_the_temperature_is_fitted_on_validation_and_used_for_both(measured: Measured) -> None:
    evaluation, student, _ = measured
    val, test = evaluation.diagnostics["val"], evaluation.diagnostics["test"]
    assert val.scaled is not None
    assert test.scaled is not None
    temperature = val.scaled["temperature"]
    assert temperature == test.scaled["temperature"]
    assert val.scaled["nll"] < val.metrics["nll"]
    labels = ImageTask(CONFIG).labels("val").numpy()

    def nll(t: float) -> float:
        return float(log_loss(labels, softmax(student["val"] / t, axis=1), labels=range(10)))

    assert nll(temperature) < min(nll(temperature * 1.03), nll(temperature / 1.03))


@pytest.mark.parametrize("split", ["val", "test"])
def test_fidelity_is_that_to_the_teacher(measured: Measured, split: str) -> None:
    evaluation, student, teacher = measured
    found = evaluation.diagnostics[split]
    labels = ImageTask(CONFIG).labels(split).numpy()  # type: ignore[arg-type]
    s, t = student[split], teacher[split]
    assert found.metric("agreement") == pytest.approx((s.argmax(1) == t.argmax(1)).mean(), abs=1e-6)
    p, q = softmax(t, axis=1), softmax(s, axis=1)
    kl = rel_entr(p, q).sum(1).mean()  # teacher || student
    assert found.metric("kl") == pytest.approx(kl, rel=1e-4)
    wrong = s.argmax(1) != labels
    assert len(found.confusions) == 10
    assert 0 < sum(each.count for each in found.confusions) <= wrong.sum()
    for each in found.teacher_confusions:
        label, other = int(each.label), int(each.predicted)
        both = (labels == label) & (s.argmax(1) == other) & (t.argmax(1) == other)
        assert each.count == both.sum() > 0
    by_class = [(s.argmax(1) == labels)[labels == c].mean() for c in range(10)]
    assert found.class_accuracy == pytest.approx(by_class)


def test_mcnemar_counts_the_images_that_one_alone_has_right(measured: Measured) -> None:
    evaluation, student, teacher = measured
    labels = ImageTask(CONFIG).labels("test").numpy()
    s, t = (each["test"].argmax(1) == labels for each in (student, teacher))
    found = evaluation.mcnemar
    assert found is not None
    assert (found.only_student, found.only_teacher) == ((s & ~t).sum(), (t & ~s).sum())
    assert evaluation.metric("agreement") == evaluation.diagnostics["test"].metric("agreement")


def test_without_a_teacher_there_is_no_fidelity(checkpoints: list[str]) -> None:
    (row,) = evaluate(CONFIG, checkpoints[0], diagnose=True)
    evaluation = from_row(Evaluation, row)
    found = evaluation.diagnostics["test"]
    assert found.metric("agreement") is found.metric("kl") is None
    assert found.teacher_confusions == ()
    assert evaluation.mcnemar is evaluation.metric("agreement") is None


def test_a_replicate_is_evaluated_on_test_and_nothing_else(
    checkpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []
    predict = ImageTask.predict

    def recorded(task: ImageTask, checkpoint: str, split: Any, **options: Any) -> Any:
        splits.append(split)
        return predict(task, checkpoint, split, **options)

    monkeypatch.setattr(ImageTask, "predict", recorded)
    (row,) = evaluate(CONFIG, checkpoints[0])
    assert splits == ["test"]
    metrics = from_row(Evaluation, row).metrics
    assert set(metrics) == {"test_accuracy", "test_nll", "test_ece", "test_errors"}


def test_equal_models_are_not_told_apart() -> None:
    hits = torch.tensor([True, True, False])
    found = compare_errors(hits, hits)
    assert (found.only_student, found.only_teacher, found.p) == (0, 0, 1.0)


def test_ensembles_are_compared_image_by_image(tmp_path: Path) -> None:
    labels = ImageTask(CONFIG).labels("test")
    members = []
    for number, right in enumerate((1000, 900)):
        shown = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 10)
        logits = 5.0 * torch.nn.functional.one_hot(shown, 10).float()
        file = tmp_path / f"{number}.safetensors"
        save_tensors(file, {"test": logits}, {"student": str(number)})
        members.append({"hash": str(number), "predictions": str(file)})
    (row,) = contrast(CONFIG, [members[:1], members[1:]])
    items = len(labels)
    assert row["values"][0]["value"] == pytest.approx(1000 / items)
    same, found = row["differences"]
    assert same == {"value": 0.0, "low": None, "high": None}
    assert found["value"] == pytest.approx(100 / items)
    spread = np.sqrt(100 / items * (1 - 100 / items) / items)  # of paired hits, not of two models
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    with pytest.raises(ValueError, match="was written by another model"):
        list(contrast(CONFIG, [[{**members[0], "hash": "x"}]]))


def test_items_that_tell_two_models_apart_have_pictures_and_confidences(tmp_path: Path) -> None:
    labels = ImageTask(CONFIG).labels("test")
    models = []
    for number, right in enumerate((slice(3, None), slice(2, -1))):  # one gained, one lost
        logits = torch.zeros(len(labels), 10)
        logits[torch.arange(len(labels)), (labels + 1) % 10] = 2.0
        logits[right] = 3.0 * torch.nn.functional.one_hot(labels, 10)[right].float()
        file = tmp_path / f"{number}.safetensors"
        save_tensors(file, {"test": logits}, {"student": str(number)})
        models.append({"hash": str(number), "predictions": str(file)})
    (row,) = examples(CONFIG, models, 5)
    found = from_row(Examples, {**row, "generations": (0, 3)})
    assert found.counts == (1, 1)
    (gained,), (lost,) = found.gained, found.lost
    assert (gained.item, lost.item) == (2, len(labels) - 1)
    assert gained.label == labels[2] == gained.predicted[1]
    assert gained.predicted[0] == (labels[2] + 1) % 10
    sure = [float(torch.tensor([z] + [0.0] * 9).softmax(dim=0)[0]) for z in (2.0, 3.0)]
    assert gained.confidence == pytest.approx(sure)
    assert lost.confidence == pytest.approx(sure[::-1])
    with Image.open(io.BytesIO(base64.b64decode(gained.picture))) as picture:
        assert (picture.format, picture.size) == ("PNG", (8, 8))
        pixels = torch.from_numpy(np.array(picture))
    assert torch.equal(pixels, ImageTask(CONFIG).data.test.images[2][0])
