"""Files of ONNX in int8, by operator."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.deployment.interface import LEAST_CALIBRATION, Interface
from selfkd.deployment.quiet import quiet
from selfkd.deployment.session import OnnxNetwork, load_graph, make_session, nodes
from selfkd.errors import cut_text
from selfkd.storage.files import fetch, replace

_BATCH = 32
_IN_INT8 = {
    **dict.fromkeys(("QLinearConv", "ConvInteger"), "Conv"),
    **dict.fromkeys(
        ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"),
        "MatMul",
    ),
    "QLinearAdd": "Add",
}
"""Kinds of operators by the names that onnxruntime gives them where they compute in int8."""


def quantise(
    source: Path, target: Path, calibration: Tensor | None, interface: Interface
) -> dict[str, int]:
    """Write a file of float32 in int8, and return how many operators of each kind compute in it.

    Each kind is quantised in the way that is fastest and costs no accuracy where it was measured
    (onnxruntime 1.32, one thread, AVX-512 VNNI):

    - A matrix product is dynamic: weights of 7 bits, which cannot saturate, one scale a matrix;
      activations are scaled as they come. On MNIST (2x800) this is 3.2 to 3.5 times as fast as
      float at batch 128, predicts the same for more than 99.9 % of the images, and needs no
      calibration. One scale a column is no better there, and slower at batch 1.
    - A convolution is static, one scale a channel, with the ReLU behind it and the residual sum
      that joins it: a ResNet-20 becomes 2.1 times as fast as in float at batch 1, 1.8 times where
      sums and ReLUs stay in float, at the same accuracy. One scale a tensor is no faster, and has
      1.5 times the error. Signed activations are 2.5 times as slow on x86, symmetric ones 1.3
      times.
    - Ranges are the smallest and largest values: percentiles, entropy and moving averages were no
      better in accuracy, agreement or NLL on digits and CIFAR-10.
    - An embedding of tokens is looked up in int8, without which a language model of 0.9 million
      parameters stays at 0.33 of its size. With it that is 0.27, at 0.0005 nats.

    Weights of convolutions have 8 bits, whose products saturate on x86 without VNNI
    (`cpu.has_int8`) unless a session takes exact ones, as `OnnxNetwork` does there. With 7 bits
    they would nowhere, at twice the error: 99.8 % instead of 99.9 % agreement on digits.

    Args:
        source: File of float32.
        target: File to create or replace.
        calibration: Images `[images, channels, height, width]` that the ranges of the activations
            are measured on, at least 32; None where nothing is convolved.
        interface: Names of input and output.

    Raises:
        ValueError: Fewer images than 32, activations that are not finite, or a graph in which
            nothing can be quantised.
        OSError: The file cannot be written; a previous one is unchanged.
    """
    images = _check_images(source, calibration)
    with tempfile.TemporaryDirectory(prefix="selfkd-") as folder:
        file = Path(folder) / "float.onnx"
        shutil.copyfile(fetch(source), file)  # onnxruntime writes beside the files that it reads
        try:
            file = _quantise_products(file, tokens=images is None)
            if images is not None:
                file = _quantise_convolutions(file, images, interface.input)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} cannot be quantised by onnxruntime: {cut_text(str(error), 300)}"
            ) from error
        _check_scales(load_graph(file), source)
        found = count_int8(file)
        if not found.keys() & {"Conv", "MatMul"}:
            kinds = sorted({node.op_type for node in nodes(load_graph(source).graph)})
            raise ValueError(
                f"{source} must have a convolution or a matrix product that can compute in int8, "
                f"got {', '.join(kinds)}: serve it in float"
            )
        replace(target, lambda temporary: shutil.copyfile(file, temporary))
    return found


def count_int8(path: Path) -> dict[str, int]:
    """Return how many operators of each kind compute in int8, as onnxruntime runs a file.

    Args:
        path: File, local or remote.

    Returns:
        Numbers of `Conv`, `MatMul`, `Add` and `Gather`, where there are some.
    """
    with tempfile.TemporaryDirectory(prefix="selfkd-") as folder:
        fused = Path(folder) / "fused.onnx"
        make_session(path, threads=1, fused=fused)
        graph = load_graph(fused).graph
    found = Counter(_IN_INT8[node.op_type] for node in nodes(graph) if node.op_type in _IN_INT8)
    found["Gather"] = len(_gathers(graph))
    return {kind: number for kind, number in sorted(found.items()) if number}


def _check_images(source: Path, calibration: Tensor | None) -> Tensor | None:
    """Return the calibration images; None of a graph that takes tokens.

    Raises:
        ValueError: Fewer than are needed, or some that the graph gives no finite logits for.
    """
    import onnx

    graph = load_graph(source).graph
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return None
    images = torch.zeros(0) if calibration is None else calibration.detach().cpu().float()
    convolves = any(node.op_type == "Conv" for node in graph.node)
    if convolves and len(images) < LEAST_CALIBRATION:
        raise ValueError(
            f"calibration must have at least {LEAST_CALIBRATION} images for the ranges of the "
            f"activations, got {len(images)}"
        )
    network = OnnxNetwork(source)
    if not all(
        network(batch).isfinite().all() for batch in torch.split(images, _BATCH) if len(batch)
    ):
        raise ValueError(
            f"activations must be finite, got NaN or infinite logits of {source} on the "
            "calibration images"
        )
    return images


def _quantise_products(file: Path, *, tokens: bool) -> Path:
    """Return a file beside another, whose matrix products and embeddings are in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = file.with_name("products.onnx")
    kinds = ["MatMul", "Gemm", *(["Gather"] if tokens else [])]
    with quiet():
        quantize_dynamic(
            str(file), str(target), op_types_to_quantize=kinds, weight_type=QuantType.QInt8
        )
    return target


def _quantise_convolutions(file: Path, images: Tensor, name: str) -> Path:
    """Return a file beside another, whose convolutions are in int8 too."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    chosen = _around_convolutions(load_graph(file).graph)
    if not chosen:
        return file
    target = file.with_name("convolutions.onnx")
    with quiet():
        quantize_static(
            str(file),
            str(target),
            _Images(images, name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip", "MaxPool", "Add"],
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return target


def _around_convolutions(graph: Any) -> list[str]:
    """Return the names of the convolutions, and of what can go on in their int8.

    ReLUs, clips and largest values do so where their input is in int8 (onnxruntime leaves the
    others). Of sums it is those that join a convolution's output with a shortcut and go to a ReLU
    or a convolution: elsewhere, as before a batch norm, it is no faster, and costs accuracy.
    """
    producer = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    constant = {tensor.name for tensor in graph.initializer}

    def joins(node: Any) -> bool:
        parts = [producer.get(name) for name in node.input]
        after = [other.op_type for other in consumers.get(node.output[0], [])]
        return (
            not constant & set(node.input)
            and any(part is not None and part.op_type == "Conv" for part in parts)
            and any(kind in ("Relu", "Clip", "Conv") for kind in after)
        )

    if not any(node.op_type == "Conv" for node in graph.node):
        return []
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "Relu", "Clip", "MaxPool")
        or (node.op_type == "Add" and joins(node))
    ]


def _check_scales(model: Any, source: Path) -> None:
    """Check the scales of a quantised graph, which come from its weights and activations.

    Raises:
        ValueError: One is not finite.
    """
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale"):
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if not values.isfinite().all():
                raise ValueError(
                    f"activations must be finite, got {tensor.name.removesuffix('_scale')} of "
                    f"{source} with NaN or infinite values on the calibration images"
                )


def _gathers(graph: Any) -> list[Any]:
    from onnx import TensorProto

    whole = (TensorProto.INT8, TensorProto.UINT8)
    tables = {t.name for t in graph.initializer if t.data_type in whole}
    return [n for n in nodes(graph) if n.op_type == "Gather" and n.input[0] in tables]


class _Images:
    """Calibration images in batches, as onnxruntime reads them."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._batches: Iterator[Tensor] = iter(torch.split(images, _BATCH))
        self._name = name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.contiguous().numpy()}
