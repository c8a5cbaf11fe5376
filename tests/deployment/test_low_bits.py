"""Low bits: one rule for training and files, gradients straight through, plain weights saved."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import model_folders
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from text_trials import make_trial
from torch import nn
from transformers.pytorch_utils import Conv1D

from selfkd.config import Config, load_config, to_tree
from selfkd.deployment.low_bits import (
    describe_rounded,
    plain,
    round_blocks,
    round_weights,
    write_low_bits,
)
from selfkd.results import Row
from selfkd.storage import files
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks import make_task
from selfkd.worker.compression import round_checkpoint

SHAPES = [(64, 5), (70, 3), (33, 1), (20, 4), (1, 2)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_graph(path: Path, nodes: list[Any], constants: dict[str, torch.Tensor], **io: Any) -> Path:
    """Write a graph from `x` to `y`, each of a given shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, io["x"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, io["y"])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def product(path: Path, weight: torch.Tensor) -> Path:
    """Write the graph of a product by a matrix `[inputs, outputs]`."""
    inputs, outputs = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save_graph(path, [node], {"w": weight}, x=["b", inputs], y=["b", outputs])


def written_weights(path: Path) -> list[torch.Tensor]:
    """Return the dequantised matrices `[outputs, inputs]` of a file, in the order of its graph."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            packed, scale = constants[node.input[1]], constants[node.input[2]]
            bits = facts["bits"]
            parts = [packed >> bits * part & 2**bits - 1 for part in range(8 // bits)]
            whole = np.stack(parts, axis=-1).reshape(*scale.shape, -1) - np.float32(2 ** (bits - 1))
            weights = (whole * scale[..., None]).reshape(facts["N"], -1)[:, : facts["K"]]
            found.append(torch.from_numpy(weights))
    return found


# --- the rule ---


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_has_the_weights_of_the_simulation(
    tmp_path: Path, bits: int, shape: tuple[int, int]
) -> None:
    weight = draw(*shape)
    source = product(tmp_path / "float.onnx", weight)
    assert write_low_bits(source, tmp_path / "low.onnx", bits) == {"MatMulNBits": 1}
    rounded = round_blocks(weight.T, bits)
    assert torch.equal(written_weights(tmp_path / "low.onnx")[0], rounded)
    # the file is made of the trained network, whose weights are rounded already
    write_low_bits(product(source, rounded.T.contiguous()), tmp_path / "low.onnx", bits)
    assert torch.equal(written_weights(tmp_path / "low.onnx")[0], rounded)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_weights_are_rounded_as_the_formula_says(bits: int) -> None:
    weight = draw(3, 70)
    expected = np.zeros((3, 70))
    for row in range(3):
        for start in range(0, 70, 32):
            block = weight[row, start : start + 32].double().numpy()
            scale = -block[np.abs(block).argmax()] / 2 ** (bits - 1)
            whole = np.floor(block / scale + 0.5).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            expected[row, start : start + 32] = scale * whole
    rounded = round_blocks(weight, bits)
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-6, atol=0)
    assert torch.equal(round_blocks(rounded, bits), rounded)


def test_tables_of_embeddings_are_in_int8(tmp_path: Path) -> None:
    table = draw(500, 64)
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["a"], name="look_up"),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    weights, target = {"table": table, "w": draw(64, 3, seed=1)}, tmp_path / "low.onnx"
    source = save_graph(tmp_path / "float.onnx", nodes, weights, x=["b"], y=["b", 3])
    assert write_low_bits(source, target, 4) == {"MatMulNBits": 1, "Gather": 1}
    assert target.stat().st_size < table.numel() * 1.1
    assert torch.equal(written_weights(target)[0], round_blocks(weights["w"].T, 4))
    found = onnxruntime.InferenceSession(target).run(None, {"x": np.arange(500, dtype=np.float32)})
    expected = table @ round_blocks(weights["w"].T, 4).T
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("folded", [False, True])
def test_a_product_by_a_table_of_embeddings_stays_float(tmp_path: Path, folded: bool) -> None:
    table, target = draw(50, 64), tmp_path / "low.onnx"
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        *([] if folded else [helper.make_node("Transpose", ["table"], ["t"])]),
        helper.make_node("MatMul", ["b", "t"], ["y"]),
    ]
    weights = {"table": table, "w": draw(64, 64, seed=1)}
    weights |= {"t": table.T.contiguous()} if folded else {}
    source = save_graph(tmp_path / "tied.onnx", nodes, weights, x=["b"], y=["b", 50])
    found = {"MatMulNBits": 1} | ({"Gather": 1} if folded else {})
    assert write_low_bits(source, target, 4) == found
    assert torch.equal(written_weights(target)[0], round_blocks(weights["w"].T, 4))


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_a_block_without_a_scale_is_zero(value: float) -> None:
    assert torch.equal(round_blocks(torch.full((1, 32), value), 4), torch.zeros(1, 32))


# --- networks ---


def test_gradients_pass_as_if_the_weights_were_not_rounded() -> None:
    layer, inputs = nn.Linear(70, 4), draw(5, 70)
    master = layer.weight
    round_weights(layer, 3)
    assert torch.equal(layer.weight, round_blocks(master, 3))
    layer(inputs).square().sum().backward()
    other = plain(layer)
    other.zero_grad()
    other(inputs).square().sum().backward()
    assert master.grad is not None
    assert torch.equal(master.grad, other.weight.grad)  # type: ignore[union-attr, arg-type]
    assert torch.equal(dict(layer.named_parameters())["parametrizations.weight.original"], master)


@pytest.mark.slow
def test_a_compiled_network_computes_the_same() -> None:
    network, inputs = nn.Sequential(nn.Linear(40, 3), nn.ReLU(), nn.Linear(3, 2)), draw(8, 40)
    round_weights(network, 2)
    found: list[list[torch.Tensor]] = []
    for forward in (network, torch.compile(network)):
        network.zero_grad()
        logits = forward(inputs)
        logits.sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in network.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_linear_layers_alone_are_rounded_along_their_inputs() -> None:
    network = nn.ModuleDict(
        {
            "embedding": nn.Embedding(6, 40),
            "tied": nn.Linear(40, 6, bias=False),
            "convolution": nn.Conv2d(1, 2, 3),
            "norm": nn.LayerNorm(40),
            "linear": nn.Linear(40, 3),
            "transposed": Conv1D(5, 40),
        }
    )
    network["tied"].weight = network["embedding"].weight
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    round_weights(network, 4)
    after = plain(network).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"linear.weight", "transposed.weight"}
    assert torch.equal(after["linear.weight"], round_blocks(before["linear.weight"], 4))
    assert torch.equal(after["transposed.weight"], round_blocks(before["transposed.weight"].T, 4).T)


def test_what_stays_float_is_described() -> None:
    tied = nn.Sequential(nn.Embedding(90, 8), nn.Linear(8, 90, bias=False), nn.Linear(8, 10))
    tied[1].weight = tied[0].weight
    text = describe_rounded(tied, 2)
    assert text == "10 % of the weights are rounded to 2 bits; those of Embedding (89 %) are not"
    assert describe_rounded(nn.Linear(90, 90), 3) == "99 % of the weights are rounded to 3 bits"


def test_a_network_without_rounded_weights_is_plain() -> None:
    network = nn.Linear(2, 1)
    assert plain(network) is network


# --- files ---


@pytest.mark.parametrize("bits", [4, 2])
def test_a_file_predicts_as_the_rounded_network(tmp_path: Path, bits: int) -> None:
    network = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    state = {name.replace(".", "_"): value for name, value in network.state_dict().items()}
    nodes = [
        helper.make_node("Gemm", ["x", "0_weight", "0_bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2_weight", "2_bias"], ["y"], transB=1),
    ]
    source = save_graph(tmp_path / "float.onnx", nodes, state, x=["b", 70], y=["b", 6])
    target = tmp_path / "low.onnx"
    assert write_low_bits(source, target, bits) == {"MatMulNBits": 2}
    round_weights(network, bits)
    inputs = draw(50, 70, seed=1)
    expected = network(inputs).detach()
    found = onnxruntime.InferenceSession(target).run(None, {"x": inputs.numpy()})[0]
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * scale)  # int8 activations
    assert target.stat().st_size < source.stat().st_size / 2


def test_the_quantiser_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    product(tmp_path / "a.onnx", draw(40, 2))
    write_low_bits(tmp_path / "a.onnx", tmp_path / "b.onnx", 4)
    assert logging.getLogger().handlers == []
    assert capfd.readouterr() == ("", "")


# --- bad input ---


class Adapters(nn.Linear):
    def merge_and_unload(self) -> None:
        """Merge, as models with adapters can."""


def with_nan() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(network[0].weight, float("nan"))
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3)),
            "without linear layers, got 4: Sequential has only Con",
        ),
        (nn.Identity(), "Identity has only no layers with weights"),
        (Adapters(2, 2), "must be left out with model.args.lora, got 4"),
        (with_nan(), "must be finite, got NaN in 0.weight"),
    ],
)
def test_networks_that_cannot_be_rounded(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_weights(network, 4)


def test_graphs_that_cannot_be_written(tmp_path: Path) -> None:
    source, target = product(tmp_path / "float.onnx", draw(40, 2)), tmp_path / "low.onnx"
    with pytest.raises(ValueError, match="bits must be 4 or 2 for a file, got 3: onnxruntime"):
        write_low_bits(source, target, 3)
    with pytest.raises(ValueError, match=r"got NaN or inf in w$"):
        write_low_bits(product(source, torch.full((40, 2), torch.nan)), target, 4)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    shapes = {"x": ["b", 1, 8, 8], "y": ["b", 2, 6, 6]}
    convolution = save_graph(tmp_path / "c.onnx", [node], {"w": draw(2, 1, 3, 3)}, **shapes)
    with pytest.raises(ValueError, match=r"c.onnx, got 4: its graph has no product.* only Conv"):
        write_low_bits(convolution, target, 4)
    assert not target.exists()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = product(tmp_path / "float.onnx", draw(40, 2))

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "PATIENCE", 0.0)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*low.onnx"):
        write_low_bits(source, tmp_path / "low.onnx", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


# --- training ---

IMAGES = (
    "model={name: selfkd_mlp, args: {width: 12, depth: 1}}",
    "data.train_size=100",
    "train={epochs: 3, batch_size: 40, lr: 0.1, ema: 0.8}",
)
TEXT = (
    "data={name: text, context: 8, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 6, epochs: 3, batch_size: 4, warmup_steps: 2, ema: 0.8}",
)


@pytest.fixture(params=["images", "text"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    every = "checkpoint={seconds: null, epochs: 1}"
    if request.param == "images":
        return load_config(settings=[every, *IMAGES])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(f"{n * n} is {n}²." for n in range(300)))
    settings = [every, *TEXT, f"data.root={tmp_path / 'text'}"]
    return load_config(settings=settings, flags={"task": "text"})


def without_time(rows: Iterator[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_student_trained_in_low_bits_is_a_plain_one(config: Config, tmp_path: Path) -> None:
    task = make_task(to_tree(config))
    first, file = make_trial(config, tmp_path / "float" / "a.safetensors"), {}
    list(task.train(first))
    start = {"checkpoint": str(first.path)}
    for name in ("whole", "again"):
        file[name] = tmp_path / name / "a.safetensors"
    rows = without_time(task.train(make_trial(config, file["whole"]), start=start, bits=2))
    stopped = task.train(make_trial(config, file["again"]), start=start, bits=2)
    list(islice(stopped, 2))
    stopped.close()  # type: ignore[attr-defined]
    torch.manual_seed(99)
    again = task.train(make_trial(config, file["again"]), start=start, bits=2)
    assert without_time(again) == rows

    tensors, facts = load_tensors(file["whole"])
    assert facts["bits"] == 2
    assert tensors.keys() == load_tensors(first.path)[0].keys()
    network, _ = task.load(str(file["whole"]))
    found = task.evaluate({"val": task.predict_with(network, "val")})
    assert found["val_nll"] == pytest.approx(rows[-1]["val_nll"], rel=1e-5)
    round_weights(network, 2)  # which changes nothing
    assert all(torch.equal(plain(network).state_dict()[name], tensors[name]) for name in tensors)


def test_a_checkpoint_is_rounded_without_training(config: Config, tmp_path: Path) -> None:
    task = make_task(to_tree(config))
    trial, save = make_trial(config, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    list(task.train(trial))
    (row,) = round_checkpoint(to_tree(config), str(trial.path), 3, str(save))
    network, _ = task.load(str(trial.path))
    assert row["remarks"] == [describe_rounded(network, 3)]
    round_weights(network, 3)
    tensors, found = load_tensors(save)
    own = load_tensors(trial.path)[1]
    del own["stage"], own["seed"]
    assert found == {**own, "bits": 3, "hash": row["hash"]}
    assert all(torch.equal(plain(network).state_dict()[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("fill", "more", "message"),
    [
        (float("inf"), {}, "weights must be finite, got infinity in head.fc"),
        (1.0, {"mean": [0.25]}, r"--bits must have a model with the mean of the data \(\[.*0.25"),
    ],
)
def test_a_checkpoint_that_cannot_be_rounded(
    tmp_path: Path, fill: float, more: dict[str, Any], message: str
) -> None:
    config = load_config(settings=[*IMAGES, "model={name: selfkd_mlp, args: {depth: 0}}"])
    task: Any = make_task(to_tree(config))
    network = task.make(config.model)
    nn.init.constant_(network.head.fc.weight, fill)
    task.save(tmp_path / "a.safetensors", network, config.model, more)
    paths = str(tmp_path / "a.safetensors"), 4, str(tmp_path / "b.safetensors")
    (row,) = round_checkpoint(to_tree(config), *paths)
    assert re.fullmatch(message + ".*", row["fault"])


def test_a_model_of_transformers_is_trained_whole(tmp_path: Path) -> None:
    folder = model_folders.write(tmp_path / "model", "gpt2")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(model_folders.TEXT)
    settings = [
        f"data={{name: text, root: {tmp_path / 'text'}, context: 16, tokenizer: {folder}}}",
        f"model={{name: hf, args: {{path: {folder}, lora: 2}}}}",
        "train={steps: 2, epochs: 1, batch_size: 2, warmup_steps: 1}",
    ]
    config = load_config(settings=settings, flags={"task": "text"})
    task, path = make_task(to_tree(config)), tmp_path / "a.safetensors"
    task.save(path, task.make(config.model), config.model, {})
    trial = make_trial(config, tmp_path / "low" / "a.safetensors")
    list(task.train(trial, start={"checkpoint": str(path)}, bits=4))
    before, after = load_tensors(path)[0], load_tensors(trial.path)[0]
    name = "transformer.h.0.mlp.c_fc.weight"
    assert before.keys() == after.keys()
    assert torch.equal(after[name], round_blocks(after[name].T, 4).T)
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
