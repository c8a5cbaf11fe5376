"""Tests of exports to ONNX."""

from __future__ import annotations

import copy
import errno
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selfkd.deployment import export
from selfkd.deployment.export import check_weights, export_onnx
from selfkd.deployment.interface import Interface
from selfkd.deployment.quantise import quantise
from selfkd.deployment.session import OnnxNetwork, load_graph
from selfkd.models import make_model
from selfkd.storage import files

IMAGES = Interface(input="images")
CONTEXT, WORDS = 6, 11
TOKENS = Interface(
    input="tokens", axes={0: "batch", 1: "length"}, longest={"length": CONTEXT}, timed=(1,)
)


class Step(nn.Module):
    """A layer that does something that not every graph can."""

    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, inputs):
        return self.work(inputs)


def with_step(work):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), Step(work)), nn.Linear(4, 3))


def make_cnn(**args):
    torch.manual_seed(0)
    return make_model("selfkd_cnn", {"width": 4} | args, num_classes=3, in_chans=1, image_size=8)


class LanguageModel(nn.Module):
    """A causal language model as transformers have them: it may return its keys as well."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(CONTEXT, 8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens):
        found = (self.words(tokens) + self.places(torch.arange(tokens.shape[1])))[:, None]
        found = nn.functional.scaled_dot_product_attention(found, found, found, is_causal=True)
        logits = self.head(found[:, 0])
        return SimpleNamespace(logits=logits, keys=found if self.config.use_cache else None)


def check_same(network, file, inputs):
    exported = OnnxNetwork(file)
    with torch.no_grad():
        logits = network.eval()(inputs)
    logits = getattr(logits, "logits", logits)
    torch.testing.assert_close(exported(inputs), logits.float(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    network, images = make_cnn(), torch.randn(8, 1, 8, 8)
    file = tmp_path_factory.mktemp("cnn") / "float.onnx"
    export_onnx(network, images[:1], IMAGES, file)
    return network, images, file


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    network, tokens = LanguageModel().train(), torch.randint(WORDS, (8, CONTEXT))
    file = tmp_path_factory.mktemp("text") / "float.onnx"
    export_onnx(network, tokens[:1, :1], TOKENS, file)
    assert all(module.training for module in network.modules())
    assert network.config.use_cache
    return network, tokens, file


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_exported_network_takes_any_batch(cnn, batch):
    network, images, file = cnn
    check_same(network, file, images[:batch])


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 5, CONTEXT])
def test_exported_language_model_takes_any_length(language_model, batch, length):
    network, tokens, file = language_model
    check_same(network, file, tokens[:batch, :length])


def test_names_and_free_axes_are_those_of_the_interface(language_model):
    graph = load_graph(language_model[2]).graph
    assert [value.name for value in [*graph.input, *graph.output]] == ["tokens", "logits"]
    axes = graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param for axis in axes] == ["batch", "length"]


def test_same_network_gives_the_same_file_without_paths(cnn, tmp_path):
    network, images, file = cnn
    export_onnx(network, images, IMAGES, tmp_path / "again.onnx")  # another example
    content = file.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == content
    for path in (str(tmp_path), str(Path(torch.__file__).parent), str(Path(__file__).parent)):
        assert path.encode() not in content
    assert b".py" not in content


def test_network_of_half_precision_is_exported_in_float32_and_not_changed(tmp_path):
    network = nn.Linear(4, 3).to(torch.bfloat16).requires_grad_(False)
    before = copy.deepcopy(network)
    inputs = torch.randn(2, 4).to(torch.bfloat16)
    export_onnx(network, inputs, IMAGES, tmp_path / "float.onnx")
    for tensor, other in zip(network.parameters(), before.parameters(), strict=True):
        assert not tensor.requires_grad
        assert torch.equal(tensor, other)
    check_same(network.float(), tmp_path / "float.onnx", inputs.float())


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite_are_refused_by_name(value, kind, tmp_path):
    network = make_cnn()
    network.features[0].bn.running_mean[1] = value
    with pytest.raises(ValueError, match=rf"got {kind} in features\.0\.bn\.running_mean"):
        export_onnx(network, torch.randn(2, 1, 8, 8), IMAGES, tmp_path / "float.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_one_file_are_refused(monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 40)
    check_weights(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="in float32, which is what one file of ONNX holds"):
        check_weights(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda x: x @ torch.linalg.inv(x.T @ x),
            r"no operator for aten\.linalg_inv_ex\.default, which layer 1\.1 \(Step\) uses",
        ),
        (
            lambda x: x if x.sum() > 0 else -x,
            r"in layer 1\.1 \(Step\), test_export\.py line \d+: its steps must be tensor op",
        ),
        (lambda x: torch.from_numpy(x.detach().numpy()), r"in layer 1\.1 \(Step\)"),
        (
            lambda x: torch.stack([x[i] for i in range(len(x))]),
            "must take any batch to be exported, and its code fixes a size: You marked batch as "
            r"dynamic but your code specialized it to be a constant \(3\)\.$",
        ),
        (lambda x: x if len(x) == 1 else 2 * x, "must take any batch"),
        (lambda x: x.reshape(3, 4), "must take any batch"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_layer(work, message, tmp_path, capfd):
    with pytest.raises(ValueError, match=message):
        export_onnx(with_step(work), torch.randn(3, 4), IMAGES, tmp_path / "float.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_full_disk_leaves_what_was_there(monkeypatch, tmp_path):
    def write_bytes(path, content):
        path.open("wb").write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "float.onnx"
    file.write_text("before")
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match=r"No space left on device.*float\.onnx"):
        export_onnx(nn.Linear(4, 3), torch.randn(2, 4), IMAGES, file)
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]
    assert file.read_text() == "before"


def test_libraries_are_silent(capfd, tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    root, images = logging.getLogger(), torch.randn(32, 1, 4, 4)
    before = (list(root.handlers), root.level)
    export_onnx(network, images, IMAGES, tmp_path / "float.onnx")
    quantise(tmp_path / "float.onnx", tmp_path / "int8.onnx", images, IMAGES)
    OnnxNetwork(tmp_path / "int8.onnx")(images)
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), root.level) == before


IMAGE_NETWORKS = [
    ("selfkd_mlp", {"width": 8}, 8),
    ("selfkd_resnet8", {"width": 4}, 8),
    ("selfkd_preresnet20", {}, 8),
    ("selfkd_wrn28", {"k": 1}, 8),
    ("selfkd_densenet", {}, 8),
    ("resnet18", {}, 32),
    ("mobilenetv3_small_100", {}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32}, 32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args", "size"), IMAGE_NETWORKS)
def test_networks_by_name_give_their_logits(name, args, size, tmp_path):
    torch.manual_seed(0)
    network = make_model(name, args, num_classes=3, in_chans=3, image_size=size)
    images = torch.randn(7, 3, size, size)
    export_onnx(network, images, IMAGES, tmp_path / "float.onnx")
    for batch in (1, 2, 7):
        check_same(network, tmp_path / "float.onnx", images[:batch])
