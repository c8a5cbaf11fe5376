"""What is measured of a trained model, against NumPy and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.images.task import Bench
from selfkd.worker.evaluate import compare_errors, contrast, diagnosis, score

CONFIG = to_tree(load_config(settings=["model={name: selfkd_mlp, args: {width: 16, depth: 1}}"]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two networks that have not learnt much: they err often, and not alike."""
    folder = tmp_path_factory.mktemp("scores")
    bench, paths = Bench(CONFIG), []
    for seed in range(2):
        torch.manual_seed(seed)
        network = bench.make(bench.config.model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for inputs, labels, _ in bench.data.batches("train", batch_size=50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
        paths.append(str(folder / f"{seed}.safetensors"))
        model = ModelConfig(name="selfkd_mlp", args={"width": 16, "depth": 1})
        bench.save(Path(paths[-1]), network, model, {})
    return paths


@pytest.fixture(scope="module")
def measured(
    checkpoints: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Row, dict[str, Any], dict[str, Any]]:
    """The row of the first network taught by the second, and the logits of both."""
    file = tmp_path_factory.mktemp("predictions") / "student.safetensors"
    (row,) = score(
        CONFIG,
        checkpoints[0],
        predictions=str(file),
        teachers=[{"checkpoint": checkpoints[1]}],
        diagnose=True,
    )
    bench = Bench(CONFIG)
    student = {k: v.double().numpy() for k, v in load_tensors(file)[0].items()}
    teacher = {k: bench.answer(checkpoints[1], k).double().numpy() for k in ("val", "test")}
    return row, student, teacher


@pytest.mark.parametrize("split", ["val", "test"])
def test_calibration_is_that_of_the_saved_logits(measured: Any, split: str) -> None:
    row, student, _ = measured
    found = row["diagnostics"][split]
    labels = Bench(CONFIG).labels(split).numpy()
    z = student[split]
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, z.argmax(1)), abs=1e-6)
    temperature = found["scaled"]["temperature"]
    for figures, p in (
        (found, softmax(z, axis=1)),
        (found["scaled"], softmax(z / temperature, axis=1)),
    ):
        assert figures["nll"] == pytest.approx(log_loss(labels, p, labels=range(10)), rel=1e-4)
        expected = brier_score_loss(labels, p, labels=range(10), scale_by_half=False)
        assert figures["brier"] == pytest.approx(expected, rel=1e-4)
    assert sum(each["count"] for each in found["reliability"]) == len(labels)


def test_the_temperature_is_fitted_on_validation_and_used_for_both(measured: Any) -> None:
    row, student, _ = measured
    val, test = row["diagnostics"]["val"], row["diagnostics"]["test"]
    temperature = val["scaled"]["temperature"]
    assert temperature == test["scaled"]["temperature"]
    assert val["scaled"]["nll"] < val["nll"]
    labels = Bench(CONFIG).labels("val").numpy()

    def nll(t: float) -> float:
        return float(log_loss(labels, softmax(student["val"] / t, axis=1), labels=range(10)))

    assert nll(temperature) < min(nll(temperature * 1.03), nll(temperature / 1.03))


@pytest.mark.parametrize("split", ["val", "test"])
def test_fidelity_is_that_to_the_teacher(measured: Any, split: str) -> None:
    row, student, teacher = measured
    found = row["diagnostics"][split]
    labels = Bench(CONFIG).labels(split).numpy()
    s, t = student[split], teacher[split]
    assert found["agreement"] == pytest.approx((s.argmax(1) == t.argmax(1)).mean(), abs=1e-6)
    p, q = softmax(t, axis=1), softmax(s, axis=1)
    assert found["kl"] == pytest.approx(
        rel_entr(p, q).sum(1).mean(), rel=1e-4
    )  # teacher || student
    wrong = s.argmax(1) != labels
    assert len(found["confusions"]) == 10
    assert 0 < sum(each["count"] for each in found["confusions"]) <= wrong.sum()
    for each in found["teacher_confusions"]:
        label, other = int(each["label"]), int(each["predicted"])
        both = (labels == label) & (s.argmax(1) == other) & (t.argmax(1) == other)
        assert each["count"] == both.sum() > 0
    by_class = [(s.argmax(1) == labels)[labels == c].mean() for c in range(10)]
    assert found["class_accuracy"] == pytest.approx(by_class)


def test_mcnemar_counts_the_images_that_one_alone_has_right(measured: Any) -> None:
    row, student, teacher = measured
    labels = Bench(CONFIG).labels("test").numpy()
    s, t = (each["test"].argmax(1) == labels for each in (student, teacher))
    found = row["mcnemar"]
    assert (found["only_student"], found["only_teacher"]) == ((s & ~t).sum(), (t & ~s).sum())
    assert row["agreement"] == row["diagnostics"]["test"]["agreement"]


def test_a_row_is_json(measured: Any) -> None:
    row, _, _ = measured
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_without_a_teacher_there_is_no_fidelity(checkpoints: list[str]) -> None:
    (row,) = score(CONFIG, checkpoints[0], diagnose=True)
    found = row["diagnostics"]["test"]
    assert (found["agreement"], found["kl"], found["teacher_confusions"]) == (None, None, [])
    assert "mcnemar" not in row
    assert "agreement" not in row


def test_a_model_that_confirms_is_tested_and_nothing_else(
    checkpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    answer = Bench.answer

    def heard(bench: Bench, checkpoint: str, split: Any, **options: Any) -> Any:
        asked.append(split)
        return answer(bench, checkpoint, split, **options)

    monkeypatch.setattr(Bench, "answer", heard)
    (row,) = score(CONFIG, checkpoints[0])
    assert asked == ["test"]
    assert set(row) == {"hash", "parameters", "test_accuracy", "test_nll", "test_ece"}


def test_a_class_without_images_and_a_perfect_model() -> None:
    logits = 9 * torch.eye(3)[:2]
    found = diagnosis(logits, torch.tensor([0, 1]), names="abc", temperature=1.0, taught=logits)
    assert found["class_accuracy"] == [1.0, 1.0, None]
    assert found["confusions"] == found["teacher_confusions"] == []
    assert (found["agreement"], found["kl"]) == (1.0, pytest.approx(0))


def test_equal_models_are_not_told_apart() -> None:
    logits = torch.eye(3)
    found = compare_errors(logits, logits, torch.tensor([0, 1, 1]))
    assert found == {"only_student": 0, "only_teacher": 0, "p": 1.0}


def test_ensembles_are_compared_image_by_image(tmp_path: Path) -> None:
    labels = Bench(CONFIG).labels("test")
    members = []
    for number, right in enumerate((1000, 900)):
        shown = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 10)
        logits = 5.0 * torch.nn.functional.one_hot(shown, 10).float()
        file = tmp_path / f"{number}.safetensors"
        mark = save_tensors(file, {"test": logits}, {"student": str(number)})
        assert mark
        members.append({"hash": str(number), "predictions": str(file)})
    (row,) = contrast(CONFIG, [members[:1], members[1:]])
    images = row["images"]
    assert images == len(labels)
    assert row["accuracy"][0]["value"] == pytest.approx(1000 / images)
    same, found = row["differences"]
    assert same == {"value": 0.0, "low": None, "high": None}
    assert found["value"] == pytest.approx(100 / images)
    spread = np.sqrt(
        100 / images * (1 - 100 / images) / images
    )  # of paired hits, not of two models
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    with pytest.raises(ValueError, match="was written by another model"):
        list(contrast(CONFIG, [[{**members[0], "hash": "x"}]]))
