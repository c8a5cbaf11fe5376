"""Weights of matrix products in 4, 3 or 2 bits: rounded in training, and written by onnxruntime.

Both round by the same rule, so that a network that was trained rounded has, bit for bit, the
weights of its file. A weight matrix is divided into blocks of `BLOCK` along its input dimension; in
each block

    scale = -w_m / 2^(bits - 1),    w_m the weight of the largest magnitude
    q = clip(floor(w / scale + 1/2), -2^(bits - 1), 2^(bits - 1) - 1)

and the weight is `scale * q`. To round twice changes nothing.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from selfkd.deployment.quiet import quiet
from selfkd.deployment.session import load_graph, nodes
from selfkd.deployment.weights import check_finite
from selfkd.results import WRITTEN_BITS
from selfkd.storage.files import replace

BLOCK = 32
"""Weights that share a scale."""
INT8_ACTIVATIONS = 4
"""Its `accuracy_level` that rounds the inputs of the products to int8, as fast kernels need."""
MENTIONED = 0.05
"""Share of the weights above which a kind of layer that is not rounded is mentioned."""


def round_blocks(weight: Tensor, bits: int) -> Tensor:
    """Return weights rounded in blocks.

    Args:
        weight: Matrix `[outputs, inputs]`.
        bits: Number of bits, at least 2.

    >>> round_blocks(torch.tensor([[-0.8, 0.33, 0.8, 0.0]]), 4)
    tensor([[-0.8000,  0.3000,  0.7000,  0.0000]])

    Reference:
        onnxruntime, `MlasQuantizeBlockwise` in onnxruntime/core/mlas/lib/q4_dq.cpp
    """
    outputs, inputs = weight.shape
    half = 2.0 ** (bits - 1)
    blocks = F.pad(weight, (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scale = torch.where(high.abs() > low.abs(), high, low) / -half
    inverse = 1 / scale
    inverse = torch.where(inverse.isfinite(), inverse, 0)  # a block of nothing but zeros
    whole = (blocks * inverse + half + 0.5).floor().clamp(0, 2 * half - 1) - half
    return (whole * scale).view(outputs, -1)[:, :inputs]


# an operator of its own: as part of a compiled graph, torch 2.14 computes it wrong on the CPU
@torch.library.custom_op(
    "selfkd::round_straight_through", mutates_args=(), schema="(Tensor weight, int bits) -> Tensor"
)
def round_straight_through(weight: Tensor, bits: int) -> Tensor:
    """Return weights rounded in blocks; gradients pass as if they were not.

    Args:
        weight: Matrix `[outputs, inputs]`.
        bits: Number of bits, at least 2.

    Reference:
        Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons
        for Conditional Computation", 2013, https://arxiv.org/abs/1308.3432
    """
    return round_blocks(weight, bits).contiguous()


@round_straight_through.register_fake
def _shape(weight: Tensor, bits: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _pass(context: object, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


round_straight_through.register_autograd(_pass)


class Rounded(nn.Module):
    """Weights rounded in blocks in the forward pass.

    Args:
        bits: Number of bits.
        transposed: Whether the weights are `[inputs, outputs]`.
    """

    def __init__(self, bits: int, transposed: bool) -> None:
        super().__init__()
        self.bits, self.transposed = bits, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weights."""
        own = weight.T if self.transposed else weight
        rounded: Tensor = round_straight_through(own, self.bits)
        return rounded.T if self.transposed else rounded


def round_weights(network: nn.Module, bits: int) -> None:
    """Let a network compute with rounded weights of its matrix products, in place.

    Linear layers are rounded; convolutions, embeddings, norms and biases stay as they are, and so
    does a layer whose weights are an embedding's.

    Args:
        network: Network whose weights are trained rounded; its parameters remain not rounded.
        bits: Number of bits.

    Raises:
        ValueError: No matrix products, adapters beside them, or weights that are not finite.
    """
    if hasattr(network, "merge_and_unload"):
        raise ValueError(
            f"deploy.bits must be left out with model.args.lora, got {bits}: what is rounded are "
            "whole weights"
        )
    products = dict(_products(network))
    if not products:
        raise ValueError(
            f"deploy.bits must be left out for a network without linear layers, got {bits}: "
            f"{type(network).__name__} has only {_kinds(network)}"
        )
    check_finite(network)
    for module in products.values():
        rounding = Rounded(bits, not isinstance(module, nn.Linear))
        parametrize.register_parametrization(module, "weight", rounding, unsafe=True)


def describe_rounded(network: nn.Module, bits: int) -> str:
    """Return which share of a network's weights `round_weights` rounds, in words.

    >>> describe_rounded(nn.Sequential(nn.Conv2d(1, 8, 5, bias=False), nn.Linear(8, 10)), 4)
    '28 % of the weights are rounded to 4 bits; those of Conv2d (69 %) are not'
    """
    rounded = {id(module.weight) for _, module in _products(network)}
    sizes, seen = Counter[str](), set[int]()
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            kind = "" if id(parameter) in rounded else type(module).__name__
            sizes[kind] += parameter.numel() * (id(parameter) not in seen)
            seen.add(id(parameter))
    total = sizes.total()
    others = [
        f"{kind} ({100 * size / total:.0f} %)"
        for kind, size in sizes.most_common()
        if kind and size >= MENTIONED * total
    ]
    text = f"{100 * sizes[''] / total:.0f} % of the weights are rounded to {bits} bits"
    return f"{text}; those of {', '.join(others)} are not" if others else text


def plain(network: nn.Module) -> nn.Module:
    """Return a network with its rounded weights as plain ones; one without such as it is.

    >>> network = nn.Sequential(nn.Linear(2, 1))
    >>> _ = round_weights(network, 4)
    >>> sorted(network.state_dict()), sorted(plain(network).state_dict())
    (['0.bias', '0.parametrizations.weight.original'], ['0.bias', '0.weight'])
    """
    if not any(isinstance(module, Rounded) for module in network.modules()):
        return network
    found = copy.deepcopy(network)
    module: Any
    for module in list(found.modules()):
        if parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            # not by torch's `remove_parametrizations`: the class is the original's, too
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            module.weight = nn.Parameter(weight.detach())
    return found


def _products(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that multiply by a matrix which is theirs alone, by name."""
    others = {
        id(parameter)
        for module in network.modules()
        if not _is_product(module)
        for parameter in module.parameters(recurse=False)
    }
    for name, module in network.named_modules():
        if _is_product(module) and id(module.weight) not in others:
            yield name, module


def _is_product(module: nn.Module) -> bool:
    """Whether a module is linear: torch's, or `Conv1D` of transformers, which is no convolution."""
    known = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, nn.Linear if known is None else (nn.Linear, known.Conv1D))


def _kinds(network: nn.Module) -> str:
    """Return the kinds of a network's layers with parameters, in words."""
    layers = [module for module in network.modules() if list(module.parameters(recurse=False))]
    return ", ".join(sorted({type(layer).__name__ for layer in layers})) or "no layers with weights"


def write_low_bits(source: Path, target: Path, bits: int) -> dict[str, int]:
    """Write a float file with the weights of its matrix products in low bits.

    Tables of embeddings are written in int8, as in an int8 file, or they would be most of it.

    Args:
        source: File of float32.
        target: File to create or replace.
        bits: Number of bits, 4 or 2.

    Returns:
        Number of operators in low precision, by kind.

    Raises:
        ValueError: Bits that no operator has, a graph without a product by a constant matrix, or
            weights that are not finite.
        OSError: The file cannot be written; a previous one is unchanged.
    """
    if bits not in WRITTEN_BITS:
        raise ValueError(
            f"deploy.bits must be 4 or 2 for a file, got {bits}: onnxruntime has no operator with "
            f"weights of {bits} bits, which are only simulated"
        )
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = load_graph(source)
    _check_constants(graph.graph)
    with tempfile.TemporaryDirectory(prefix="selfkd-") as folder, quiet():
        written = _with_low_bits(graph, bits)
        content = written.SerializeToString(deterministic=True)
        if tables := _tables(written.graph):
            file = Path(folder) / target.name
            quantize_dynamic(
                written, str(file), nodes_to_quantize=tables, weight_type=QuantType.QInt8
            )
            content = file.read_bytes()
    kinds = Counter(node.op_type for node in nodes(written.graph))
    if not kinds["MatMulNBits"]:
        heavy = kinds.keys() & {"Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"}
        raise ValueError(
            f"deploy.bits must be left out for {source}, got {bits}: its graph has no product by a "
            f"constant matrix, only {', '.join(sorted(heavy or kinds.keys()))}"
        )
    replace(target, lambda temporary: Path(temporary).write_bytes(content))
    found = {"MatMulNBits": kinds["MatMulNBits"], "Gather": len(tables)}
    return {kind: number for kind, number in found.items() if number}


def _with_low_bits(model: Any, bits: int) -> Any:
    """Return a graph whose products by constant matrices have weights of low bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )
    from onnxruntime.quantization.onnx_model import ONNXModel

    ONNXModel(model).replace_gemm_with_matmul()  # in place
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    rule = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS, bits=bits
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=rule, nodes_to_exclude=_tied(model.graph))
    quantizer.process()
    return quantizer.model.model


def _tied(graph: Any) -> list[str]:
    """Return the names of the products by a table of embeddings, which stays as it is."""
    import numpy as np
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}

    def values(kind: str, place: int) -> dict[str, Any]:
        found = [node for node in graph.node if node.op_type == kind]
        return {
            node.name: numpy_helper.to_array(constants[node.input[place]])
            for node in found
            if node.input[place] in constants
        }

    tables = values("Gather", 0).values()
    return [
        name
        for name, weight in values("MatMul", 1).items()
        if any(np.array_equal(weight.T, table) for table in tables)
    ]


def _tables(graph: Any) -> list[str]:
    """Return the names of the nodes that look up rows of a constant matrix of their own."""
    matrices = {tensor.name for tensor in graph.initializer if _is_matrix(tensor)}
    readers = Counter(name for node in graph.node for name in node.input)
    return [
        node.name
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in matrices and readers[node.input[0]] == 1
    ]


def _is_matrix(tensor: Any) -> bool:
    """Whether a constant of a graph is a float matrix, or has more axes."""
    return bool(tensor.data_type == tensor.FLOAT and len(tensor.dims) > 1)


def _check_constants(graph: Any) -> None:
    """Raise ValueError for a constant matrix of a graph with NaN or infinity."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in filter(_is_matrix, graph.initializer):
        if not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise ValueError(
                f"weights must be finite to be rounded, got NaN or inf in {tensor.name}"
            )
