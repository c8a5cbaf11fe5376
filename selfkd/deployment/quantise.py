"""Files of ONNX in int8, by operator."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.deployment.interface import Interface
from selfkd.deployment.quiet import quiet
from selfkd.deployment.session import load_graph, nodes
from selfkd.storage.files import fetch, replace

FEWEST = 32
"""Smallest number of images that activations are calibrated on."""
_BATCH = 32


def quantise(
    source: Path, target: Path, calibration: Tensor | None, interface: Interface
) -> dict[str, int]:
    """Write a float file in int8, and return how many operators of each kind compute in it.

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
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = load_graph(source)
    kinds = {node.op_type for node in nodes(graph.graph)}
    images = None
    if "Conv" in kinds and calibration is not None:
        if len(calibration) < FEWEST:
            raise ValueError(
                f"calibration must have at least {FEWEST} images, got {len(calibration)}"
            )
        images = calibration
    with tempfile.TemporaryDirectory(prefix="selfkd-") as folder, quiet():
        file = Path(folder) / "dynamic.onnx"
        dynamic = ["MatMul", "Gemm"] + (["Gather"] if 1 in interface.axes else [])
        quantize_dynamic(
            str(fetch(source)),
            str(file),
            op_types_to_quantize=dynamic,
            weight_type=QuantType.QInt8,
        )
        if images is not None:
            before, file = file, Path(folder) / "static.onnx"
            quantize_static(
                str(before),
                str(file),
                _Reader(images, interface.input),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        content = file.read_bytes()
        found = in_int8(file)
    if not found:
        raise ValueError(f"{source} has no operator that can be quantised: {', '.join(kinds)}")
    replace(target, lambda temporary: Path(temporary).write_bytes(content))
    return found


def in_int8(path: Path) -> dict[str, int]:
    """Return the kinds of operators of a file that compute in int8, with their numbers."""
    graph = load_graph(path).graph
    found: Counter[str] = Counter()
    made = {output: node for node in nodes(graph) for output in node.output}
    for node in nodes(graph):
        if node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul"):
            found["MatMul"] += 1
        elif node.op_type in ("ConvInteger", "QLinearConv"):
            found["Conv"] += 1
        elif node.op_type == "Conv":
            givers = [made.get(name) for name in node.input[:2]]
            if all(giver and giver.op_type == "DequantizeLinear" for giver in givers):
                found["Conv"] += 1
    return dict(found)


class _Reader:
    """Calibration images in batches, as onnxruntime asks for them."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._batches: Iterator[Tensor] = iter(torch.split(images.cpu().float(), _BATCH))
        self._name = name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.contiguous().numpy()}
