"""Networks as files of ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.deployment.interface import Interface
from selfkd.deployment.quiet import quiet
from selfkd.distill.outputs import take_logits
from selfkd.errors import cut_text
from selfkd.storage.files import replace

LARGEST = 2**31 - 2**20
"""Largest number of bytes of the weights of one file: protobuf ends at 2 GB."""


def export_onnx(network: nn.Module, inputs: Tensor, interface: Interface, path: Path) -> None:
    """Write a network as one file of ONNX, in float32 and eval mode.

    The file has no path of this machine, and is the same for the same network. The network itself
    is not changed.

    Args:
        network: Network from one tensor to logits, or to an output with logits.
        inputs: Example of its inputs: images `[items, channels, height, width]` or tokens
            `[items, length]`.
        interface: Names of input and output, and axes of any size.
        path: File to create or replace, local or remote.

    Raises:
        ValueError: Weights that are NaN or infinite, more than one file holds, an operator that
            ONNX lacks, or a network whose steps depend on its values.
        OSError: The file cannot be written; a previous one is unchanged.
    """
    check_weights(network)
    copied = _Logits(copy.deepcopy(network).cpu().float().eval())
    example = _example(inputs.cpu(), interface)
    program = _capture(copied, example, interface)
    model = _translate(program, copied, interface)
    content = model.SerializeToString(deterministic=True)
    replace(path, lambda temporary: Path(temporary).write_bytes(content))


def check_weights(network: nn.Module) -> None:
    """Check that a network can be served.

    Raises:
        ValueError: Weights that are NaN or infinite, or more of them than one file holds.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind = "NaN" if tensor.isnan().any() else "infinite"
            raise ValueError(f"weights must be finite, got {kind} values in {name}")
    size = 4 * sum(tensor.numel() for tensor in tensors.values())
    if size > LARGEST:
        raise ValueError(
            f"weights must have at most 2 GB in float32, which is what one file of ONNX holds, "
            f"got {size / 1e9:.1f} GB"
        )


class _Logits(nn.Module):
    """A network whose output is its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config = getattr(network, "config", None)
        if getattr(config, "use_cache", False):  # of transformers: keys and values are no logits
            config.use_cache = False  # type: ignore[union-attr]

    def forward(self, inputs: Tensor) -> Tensor:
        return take_logits(self.network(inputs), "the network").float()


def _example(inputs: Tensor, interface: Interface) -> Tensor:
    """Return inputs whose free axes have sizes that torch.export takes for any size."""
    while len(inputs) < 3:
        inputs = torch.cat([inputs, inputs])
    return inputs[:3]


def _capture(network: nn.Module, example: Tensor, interface: Interface) -> Any:
    free = {
        axis: torch.export.Dim(name, min=1, max=interface.longest.get(name))
        for axis, name in interface.axes.items()
    }
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                network, (example,), dynamic_shapes=({**free},), strict=False
            )
    except Exception as error:
        raise ValueError(
            f"the network cannot be exported by torch.export{_layer_of(error, network)}: "
            f"{_first_lines(error)}"
        ) from error


def _translate(program: Any, network: nn.Module, interface: Interface) -> Any:
    try:
        with torch.no_grad(), quiet():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[interface.input],
                output_names=[interface.output],
                verbose=False,
            )
        model = made.model_proto
    except Exception as error:
        raise ValueError(f"ONNX lacks an operator: {_first_lines(error)}") from error
    _strip(model)
    return model


def _layer_of(error: BaseException, network: nn.Module) -> str:
    """Return the innermost layer in which an error was raised, in words."""
    names = {id(module): name for name, module in network.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = names[id(module)].removeprefix("network").removeprefix(".")
        trace = trace.tb_next
    return f", in layer {found}" if found else ""


def _first_lines(error: BaseException) -> str:
    return cut_text(str(error).strip(), 600)


def _strip(model: Any) -> None:
    """Remove what says where and how a graph was made: paths of this machine stand there."""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for part in [graph, *graph.node, *getattr(graph, "initializer", []), *graph.value_info]:
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
            part.doc_string = ""
    for part in [*model.graph.input, *model.graph.output]:
        del part.metadata_props[:]
