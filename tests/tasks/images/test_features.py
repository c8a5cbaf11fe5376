"""Classifiers of features: made, saved, loaded, averaged and exported as those of images are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfkd.config import load_config, to_tree
from selfkd.deployment.predictor import write_predictor
from selfkd.loading import model as loading
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks.images.features import feature_inputs
from selfkd.tasks.images.task import ImageTask

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(120) % 3
X = GENERATOR.normal(size=(120, 4)) * [1, 50, 0.1, 1] + LABELS[:, None] * [1, 100, 0, 0]
NAMES = ["length", "width, outer", "größe", "x"]


def make_task(root: Path, **data: Any) -> ImageTask:
    config = load_config(flags={"data": {"name": "arrays", "root": str(root), **data}})
    return ImageTask(to_tree(config))


def write(path: Path, names: list[str], x: Any = X) -> Path:
    rows = [",".join(f'"{name}"' for name in [*names, "label"])]
    rows += [
        ",".join([*map(repr, row), "abc"[label]])
        for row, label in zip(x.tolist(), LABELS.tolist(), strict=True)
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    return make_task(write(tmp_path_factory.mktemp("features") / "train.csv", NAMES))


@pytest.fixture(scope="module")
def checkpoint(task: ImageTask, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    torch.manual_seed(0)
    task.save(file, task.make(task.config.model), task.config.model, {})
    return str(file)


def test_a_perceptron_is_the_default_and_the_facts_are_of_rows(task: ImageTask) -> None:
    facts = task.check()
    assert task.config.model.name == "selfkd_mlp"
    assert facts.unit == "rows"
    assert facts.items == {"train": 96, "val": 12, "test": 12}
    assert facts.names == ("a", "b", "c")
    assert "labels are column label" in facts.notes[0]
    assert task.pictures("test", [0]) == []
    assert task.example(2).shape == (2, 4)
    assert task.interface().input == "features"
    assert task.calibration(60).shape == (60, 4)


def test_other_networks_are_refused(task: ImageTask, tmp_path: Path) -> None:
    other = load_config(flags={"data": {"name": "arrays", "root": task.config.data.root}})
    tree = to_tree(other) | {"model": {"name": "selfkd_cnn", "args": {}}}
    with pytest.raises(ValueError, match=r"model must take \[N, 4\] features, .* 'selfkd_cnn'"):
        ImageTask(tree).check()


def test_a_loaded_model_predicts_as_the_task_does(task: ImageTask, checkpoint: str) -> None:
    logits, data = task.predict(checkpoint, "test"), task.data.test
    model = loading.load(checkpoint)
    found = model.predict(data.images.numpy())
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1))
    assert "model.predict(features)" in model.card
    assert "tabular" in model.card
    one = model.predict(data.images[0].tolist()).probabilities
    torch.testing.assert_close(one, found.probabilities[:1])
    average = task.combined([checkpoint, checkpoint])
    inputs = task.inputs("test", 12)
    torch.testing.assert_close(average(inputs).softmax(dim=1), logits.softmax(dim=1))


def test_a_teacher_of_other_statistics_sees_features_as_it_was_trained(
    task: ImageTask, checkpoint: str, tmp_path: Path
) -> None:
    other = make_task(write(tmp_path / "b.csv", NAMES, X * 3 + 1))
    wanted = loading.load(checkpoint).predict(other.data.test.images).probabilities
    logits = other.predict(checkpoint, "test")
    torch.testing.assert_close(logits.softmax(dim=1), wanted, atol=1e-5, rtol=1e-4)


def test_a_model_of_other_features_is_refused(checkpoint: str, tmp_path: Path) -> None:
    other = make_task(write(tmp_path / "b.csv", [*NAMES[1:], NAMES[0]]))
    with pytest.raises(ValueError, match=r"trained on other inputs than the 4 features .*: length"):
        other.load(checkpoint)


class Frame:
    """Table with columns by name, as of pandas."""

    def __init__(self, values: Any, columns: list[str]) -> None:
        self.values, self.columns, self.iloc = values, columns, self

    def __getitem__(self, key: Any) -> Frame:
        return Frame(self.values[key], [self.columns[n] for n in key[1]])

    def to_numpy(self) -> Any:
        return self.values


STATISTICS = {"names": ["a", "b"], "mean": [0.0, 1.0], "std": [1.0, 2.0]}


def test_columns_of_a_frame_are_taken_by_name() -> None:
    frame = Frame(np.array([[5.0, 9.0, 1.0]]), ["b", "other", "a"])
    assert feature_inputs(frame, **STATISTICS).tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="must have a column 'a', got b"):
        feature_inputs(Frame(np.zeros((1, 1)), ["b"]), **STATISTICS)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (np.zeros((3, 5)), ValueError, r"must be \[N, 2\], got \[3, 5\]"),
        ([[0.0, np.nan]], ValueError, "must be finite, got nan in row 1, column b"),
        ([["a", "b"]], TypeError, "must be rows of numbers"),
        ("a.csv", TypeError, "got the file a.csv"),
    ],
)
def test_what_is_no_row_of_features_is_refused(
    items: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        feature_inputs(items, **STATISTICS)


class Session:
    """A network as a session of onnxruntime."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network.eval()

    def run(self, outputs: None, inputs: dict[str, Any]) -> list[Any]:
        with torch.no_grad():
            return [self.network(torch.from_numpy(inputs["features"])).numpy()]


def test_predict_py_predicts_as_the_loaded_model(
    task: ImageTask, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = load_tensors(Path(checkpoint))[1]
    write_predictor(tmp_path, metadata, task.interface(), task="images", file="f.onnx")
    spec = importlib.util.spec_from_file_location("predict", tmp_path / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "session", lambda file: Session(task.load(checkpoint)[0]))
    names = [*NAMES[::-1], "label"]
    file = write(tmp_path / "new.csv", names[:-1], X[:, ::-1])
    wanted = loading.load(checkpoint).predict(X)
    labels, probabilities = module.predict(module.read(file))
    np.testing.assert_allclose(probabilities, wanted.probabilities.numpy(), atol=1e-5)
    assert labels == wanted.names
    with pytest.raises(ValueError, match="must be finite"):
        module.predict(np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match=r"must be \[rows, 4\], got \[2, 3\]"):
        module.predict(np.zeros((2, 3)))
