"""Tests of int8 files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selfkd.deployment import quantise as module
from selfkd.deployment.export import export_onnx
from selfkd.deployment.interface import Interface
from selfkd.deployment.quantise import count_int8, quantise
from selfkd.deployment.session import OnnxNetwork, operators

IMAGES = Interface(input="images")
TOKENS = Interface(input="tokens", axes={0: "batch", 1: "length"}, longest={"length": 6})


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, inputs):
        return torch.relu(inputs + self.conv(inputs))


def make_network():
    """Return grouped and depthwise convolutions, a shortcut, a dead channel and two products."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(), Residual(8), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU6(), nn.Conv2d(8, 8, 1, groups=8)),
        *(nn.Flatten(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)),
    )
    nn.init.zeros_(network[0].weight[1])
    nn.init.zeros_(network[0].bias[1])
    return network


def export(network, inputs, folder, interface=IMAGES):
    export_onnx(network, inputs, interface, folder / "float.onnx")
    return folder / "float.onnx"


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randn(64, 2, 8, 8)


@pytest.fixture(scope="module")
def source(images, tmp_path_factory):
    return export(make_network(), images, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def target(source, images):
    target = source.with_name("int8.onnx")
    assert quantise(source, target, images, IMAGES) == {"Add": 1, "Conv": 4, "MatMul": 2}
    return target


def test_convolutions_sums_and_products_compute_in_int8(target):
    assert count_int8(target) == {"Add": 1, "Conv": 4, "MatMul": 2}
    assert "Relu" in operators(target)  # between the products, in float


def test_predictions_are_close_to_those_of_float(source, target, images):
    exact, found = OnnxNetwork(source)(images), OnnxNetwork(target)(images)
    assert float((found - exact).norm() / exact.norm()) < 0.05
    torch.testing.assert_close(OnnxNetwork(target)(images[:1]), found[:1], rtol=0, atol=0.02)


def test_float_file_has_nothing_in_int8(source):
    assert count_int8(source) == {}


def test_same_file_again_and_nothing_beside_it(source, target, images, tmp_path):
    quantise(source, tmp_path / "again.onnx", images, IMAGES)
    assert (tmp_path / "again.onnx").read_bytes() == target.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]
    assert {path.name for path in source.parent.iterdir()} == {"float.onnx", "int8.onnx"}
    assert str(tmp_path).encode() not in target.read_bytes()


def test_embeddings_of_tokens_are_in_int8(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(300, (40, 6))
    source = export(
        nn.Sequential(nn.Embedding(300, 32), nn.Linear(32, 300)), tokens, tmp_path, TOKENS
    )
    target = tmp_path / "int8.onnx"
    assert quantise(source, target, None, TOKENS) == {"Gather": 1, "MatMul": 1}
    assert target.stat().st_size < 0.3 * source.stat().st_size
    exact, found = OnnxNetwork(source)(tokens[:2, :5]), OnnxNetwork(target)(tokens[:2, :5])
    assert float((found - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("number", [None, 0, 31])
def test_few_calibration_images_are_refused(number, source, images, tmp_path):
    few = None if number is None else images[:number]
    with pytest.raises(ValueError, match=rf"at least 32 images .* got {number or 0}$"):
        quantise(source, tmp_path / "int8.onnx", few, IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value, source, images, tmp_path):
    broken = images.clone()
    broken[40, 0, 0, 0] = value
    with pytest.raises(ValueError, match="activations must be finite, got NaN or infinite logits"):
        quantise(source, tmp_path / "int8.onnx", broken, IMAGES)
    assert not list(tmp_path.iterdir())


def test_hidden_infinity_is_refused(images, tmp_path):
    class Huge(nn.Module):
        def forward(self, inputs):
            return inputs.abs() * 3e38 * 10

    network = nn.Sequential(nn.Conv2d(2, 2, 1), Huge(), nn.Sigmoid(), nn.Conv2d(2, 2, 1))
    network = nn.Sequential(network, nn.ReLU(), Huge(), nn.Conv2d(2, 1, 8), nn.Sigmoid())
    source = export(nn.Sequential(network, nn.Flatten()), images, tmp_path)
    with pytest.raises(ValueError, match="finite"):
        quantise(source, tmp_path / "int8.onnx", images, IMAGES)


def test_graph_without_anything_to_quantise_is_an_error(images, tmp_path):
    source = export(nn.Sequential(nn.ReLU(), nn.Flatten()), images, tmp_path)
    with pytest.raises(
        ValueError, match=r"must have a convolution or a matrix product .* got Relu"
    ):
        quantise(source, tmp_path / "int8.onnx", images, IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


def test_quantiser_that_skips_all_is_an_error(source, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_quantise_products", lambda file, tokens: file)
    monkeypatch.setattr(module, "_around_convolutions", lambda graph: [])
    with pytest.raises(ValueError, match="can compute in int8"):
        quantise(source, tmp_path / "int8.onnx", images, IMAGES)
    assert not list(tmp_path.iterdir())


def test_fault_of_the_quantiser_is_one_message(source, images, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("scale issue")

    monkeypatch.setattr(module, "_quantise_convolutions", fail)
    with pytest.raises(ValueError, match=r"cannot be quantised by onnxruntime: scale issue"):
        quantise(source, tmp_path / "int8.onnx", images, IMAGES)
