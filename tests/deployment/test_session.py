"""Tests of ONNX files that are run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from selfkd.deployment import session
from selfkd.deployment.session import OnnxNetwork, operators

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def make_model(**external):
    weight = numpy_helper.from_array(WEIGHT, "weight")
    node = helper.make_node("MatMul", ["images", "weight"], ["logits"])
    given = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([node], "graph", [given], [logits], [weight])
    opset = helper.make_opsetid(external.get("domain", ""), 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    node.domain = external.get("domain", "")
    model.graph.node[0].domain = node.domain
    return model


@pytest.fixture
def file(tmp_path):
    onnx.save(make_model(), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def test_file_is_a_network_without_parameters(file):
    network = OnnxNetwork(file)
    assert not network.training
    assert not list(network.parameters())
    inputs = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    logits = network(inputs)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    torch.testing.assert_close(logits, inputs.detach().float() @ torch.tensor(WEIGHT))
    (timed,) = network.timed(inputs)()
    np.testing.assert_array_equal(timed, logits.numpy())


def test_operators_are_counted_in_branches_too(file):
    assert operators(file) == {"MatMul": 1}
    model = onnx.load(file)
    inner = helper.make_graph([helper.make_node("Relu", ["logits"], ["x"])], "inner", [], [])
    node = helper.make_node("If", ["images"], ["y"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)
    onnx.save(model, file)
    assert operators(file) == {"Relu": 2, "MatMul": 1, "If": 1}


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin"])
def test_weights_in_another_file_are_refused(location, tmp_path):
    model = make_model()
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "run").mkdir()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    onnx.save(model, tmp_path / "run" / "float.onnx")
    with pytest.raises(ValueError, match="must hold all its weights, got weight in another file"):
        OnnxNetwork(tmp_path / "run" / "float.onnx")


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a"])
def test_damaged_file_is_named(content, file, capfd):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"float\.onnx must be a file of ONNX"):
        OnnxNetwork(file)
    assert capfd.readouterr() == ("", "")


def test_operators_of_other_libraries_are_refused(file, capfd):
    onnx.save(make_model(domain="of.somebody"), file)
    with pytest.raises(ValueError, match=r"float\.onnx cannot be run by onnxruntime: .*MatMul"):
        OnnxNetwork(file)
    assert capfd.readouterr() == ("", "")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        OnnxNetwork(tmp_path / "float.onnx")


def test_other_inputs_and_threads_are_refused(file, capfd):
    with pytest.raises(ValueError, match=r"must take torch\.float32 \[4, 3\], which it does not"):
        OnnxNetwork(file)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        OnnxNetwork(file, threads=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("int8", [True, False])
def test_exact_products_where_those_of_the_processor_saturate(int8, file, monkeypatch):
    monkeypatch.setattr(session, "has_int8", lambda: int8)
    options = session.make_session(file, threads=1).get_session_options()
    if int8:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(session.EXACT)
    else:
        assert options.get_session_config_entry(session.EXACT) == "1"
