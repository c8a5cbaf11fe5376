"""Ensembles and language models as one graph: the logits of torch, for batches of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import FAMILIES, ROWS
from torch import Tensor, nn

from selfkd.config import load_config, to_tree
from selfkd.deployment.export import export_onnx
from selfkd.deployment.interface import Interface
from selfkd.deployment.session import OnnxNetwork
from selfkd.distill.outputs import take_logits
from selfkd.losses import Average
from selfkd.tasks.common import Averaged
from selfkd.tasks.images.task import ImageTask
from selfkd.tasks.text.models import prepare
from selfkd.tasks.text.pretrained import make_architecture
from selfkd.tasks.text.task import TextTask

CONTEXT = 12
TOKENS = Interface(input="tokens", axes={0: "batch", 1: "length"}, longest={"length": CONTEXT})


@torch.no_grad()
def check_same(network: nn.Module, exported: nn.Module, inputs: Tensor) -> None:
    wanted = take_logits(network(inputs), "network")
    assert exported(inputs).shape == wanted.shape
    scale = float(wanted.abs().max())
    torch.testing.assert_close(exported(inputs), wanted, rtol=0, atol=1e-5 * scale)


# --- ensembles ---


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTask, list[str]]:
    """Three networks: the second of other normalisation, the third with its classes reversed."""
    config = load_config(settings=["model={name: selfkd_cnn, args: {width: 4}}"])
    task, folder = ImageTask(to_tree(config)), tmp_path_factory.mktemp("members")
    changes = [{}, {"mean": [0.5], "std": [0.25]}, {"classes": list(task.data.class_names)[::-1]}]
    files = []
    for number, more in enumerate(changes):
        torch.manual_seed(number)
        network = task.make(config.model)
        for batch_norm in network.modules():
            if isinstance(batch_norm, nn.BatchNorm2d):
                assert batch_norm.running_mean is not None
                batch_norm.running_mean.normal_()
        file = folder / f"{number}.safetensors"
        task.save(file, network, config.model, more)
        files.append(str(file))
    return task, files


@pytest.mark.parametrize(
    ("average", "weights"),
    [
        ("probabilities", [0.7, 0.3, 0.0]),
        pytest.param("probabilities", None, marks=pytest.mark.slow),
        pytest.param("logits", [0.5, 0.3, 0.2], marks=pytest.mark.slow),
    ],
)
def test_an_ensemble_is_one_graph(
    classifiers: tuple[ImageTask, list[str]],
    average: Average,
    weights: list[float] | None,
    tmp_path: Path,
) -> None:
    task, files = classifiers
    network = task.combined(files, average=average, weights=weights).eval()
    inputs = task.inputs("val", 20, like=files[0])
    export_onnx(network, inputs[:2], task.interface(), tmp_path / "ensemble.onnx")
    exported = OnnxNetwork(tmp_path / "ensemble.onnx")
    for items in (1, 7, 20):
        check_same(network, exported, inputs[:items])
    # the classes of the first, whatever the order of the others
    wanted = task.predict_with(network, "val", like=files[0])
    torch.testing.assert_close(task.predict_with(exported, "val", like=files[0]), wanted)
    members = [task.predict(file, "val") for file in files]
    average_of = Averaged([_Constant(logits) for logits in members], average, weights)
    torch.testing.assert_close(wanted, average_of(torch.zeros(len(wanted), 1)))


class _Constant(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def test_one_network_is_itself(classifiers: tuple[ImageTask, list[str]]) -> None:
    task, files = classifiers
    alone, _ = task.load(files[1])
    found = task.combined(files[1:2]).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in alone.state_dict().items())


def test_specialists_are_refused_by_name(classifiers: tuple[ImageTask, list[str]]) -> None:
    task, files = classifiers
    with pytest.raises(ValueError, match=r"members/teacher\.json cannot be exported: it is a gene"):
        task.combined([files[0], "members/teacher.json"])


# --- language models ---


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return prepare(make_architecture({"model_type": family, **FAMILIES[family]})).eval()


def check_lengths(network: nn.Module, file: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(ROWS, (3, CONTEXT), generator=draws)
    export_onnx(network, tokens[:2], TOKENS, file)
    exported = OnnxNetwork(file)
    for length in range(1, CONTEXT + 1):
        check_same(network, exported, tokens[: 1 + length % 3, :length])
    # causal: what follows a token changes nothing
    torch.testing.assert_close(exported(tokens)[:, :5], exported(tokens[:, :5]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_predict_texts_of_any_length(family: str, tmp_path: Path) -> None:
    check_lengths(make_model(family), tmp_path / "float.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_an_ensemble_of_language_models_is_one_graph(average: Average, tmp_path: Path) -> None:
    members = [make_model("gpt2"), make_model("llama")]
    check_lengths(Averaged(members, average, [0.25, 0.75]).eval(), tmp_path / "ensemble.onnx")


def make_task(tmp_path: Path, models: int) -> tuple[TextTask, list[str]]:
    settings = [
        "data={name: arithmetic, train_size: 200, val_size: 20}",
        "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    ]
    config = load_config(settings=settings, flags={"task": "text"})
    task = TextTask(to_tree(config))
    torch.manual_seed(0)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(models)]
    for file in files:
        task.save(Path(file), task.make(config.model), config.model, {})
    return task, files


@pytest.mark.parametrize("models", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_perplexity_and_exact_match_are_measured_by_the_file(models: int, tmp_path: Path) -> None:
    task, files = make_task(tmp_path, models)
    network, path = task.combined(files).eval(), tmp_path / "float.onnx"
    export_onnx(network, task.inputs("val", 2), task.interface(), path)
    exported = OnnxNetwork(path)
    inputs = task.inputs("val", 20)
    for items, length in ((1, 1), (20, 2), (7, task.data.context)):
        check_same(network, exported, inputs[:items, :length])
    logits = task.predict_with(network, "val")
    torch.testing.assert_close(task.predict_with(exported, "val"), logits)
    found = task.evaluate({"val": logits}, [exported])
    assert found == task.evaluate({"val": logits}, [network])
    assert "val_exact_match" in found
