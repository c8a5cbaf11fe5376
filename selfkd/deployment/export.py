"""Networks as files of ONNX."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.deployment.interface import Interface
from selfkd.deployment.quiet import quiet
from selfkd.deployment.weights import check_finite
from selfkd.distill.outputs import take_logits
from selfkd.errors import cut_text
from selfkd.storage.files import replace

LARGEST = 2**31 - 2**24
"""Largest number of bytes of the weights of a file, which protobuf ends at 2 GB."""
_ROWS = 3  # of an example: torch.export takes sizes of 0 and 1 for constants


def export_onnx(network: nn.Module, inputs: Tensor, interface: Interface, path: Path) -> None:
    """Write a network as one file of ONNX, in float32 and eval mode.

    The file takes any size of the free axes, has no path of this machine, and is the same for the
    same network. The network itself is not changed: a copy on the CPU is exported.

    Args:
        network: Network from one tensor to logits, or to an output with logits.
        inputs: Example of its inputs: images `[items, channels, height, width]` or tokens
            `[items, length]`.
        interface: Names of input and output, and free axes with their largest sizes.
        path: File to create or replace, local or remote.

    Raises:
        ValueError: Weights that are NaN or infinite, or more than one file holds; an operator that
            ONNX lacks, or code that works for some sizes or values only. Names the layer.
        OSError: The file cannot be written; a previous one is unchanged.
    """
    check_weights(network)
    copied = _Logits(copy.deepcopy(network)).cpu().float().eval()
    program = _capture(copied, _example(inputs, interface), interface)
    model = _translate(program, copied, interface)
    _strip(model)
    _name_axes(model, interface)
    content = model.SerializeToString(deterministic=True)
    replace(path, lambda temporary: Path(temporary).write_bytes(content))


def check_weights(network: nn.Module) -> None:
    """Check that a network can be served from one file.

    Raises:
        ValueError: Weights that are NaN or infinite, or more than one file holds.
    """
    check_finite(network)
    tensors = [*network.parameters(), *network.buffers()]
    size = 4 * sum(tensor.numel() for tensor in tensors)
    if size > LARGEST:
        raise ValueError(
            f"weights must have at most {LARGEST / 1e9:.1f} GB in float32, which is what one file "
            f"of ONNX holds, got {size / 1e9:.1f} GB: deploy a smaller student"
        )


class _Logits(nn.Module):
    """A network whose output is its logits, in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for module in network.modules():  # also those of an ensemble
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False):  # of transformers: cached keys are no logits
                config.use_cache = False  # type: ignore[union-attr]

    def forward(self, inputs: Tensor) -> Tensor:
        return take_logits(self.network(inputs), "the network").float()


def _example(inputs: Tensor, interface: Interface) -> Tensor:
    """Return inputs of a size in each free axis that torch.export does not take for a constant."""
    example = inputs.detach().cpu()
    for axis, name in interface.axes.items():
        size, few = example.shape[axis], min(_ROWS, interface.longest.get(name, _ROWS))
        chosen = torch.arange(few if axis == 0 else max(size, few)) % size
        example = example.index_select(axis, chosen)
    return example.float() if example.is_floating_point() else example


def _capture(network: nn.Module, inputs: Tensor, interface: Interface) -> Any:
    """Return a network as torch.export captures it, in which the free axes have any size."""
    free = {
        axis: torch.export.Dim(name, min=1, max=interface.longest.get(name))
        for axis, name in interface.axes.items()
        if interface.longest.get(name) != 1
    }
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(network, (inputs,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # of torch's many classes, and of the network's own code
        first = " ".join(str(error).strip().partition("\n")[0].split())
        if "Constraints violated" in first:
            raise ValueError(
                f"the network must take any {' and '.join(interface.axes.values())} to be "
                f"exported, and its code fixes a size: {_reason(error)}"
            ) from error
        raise ValueError(
            f"the network cannot be captured by torch.export{_place(error, network)}: its steps "
            f"must be tensor operations, the same for all values of its inputs "
            f"({type(error).__name__}: {cut_text(first, 300)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return what torch.export says of a size that code fixes, without its advice on flags."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith(("You marked", "Not all values"))]
    return cut_text((found or lines)[0].partition(" If you're")[0], 300)


def _place(error: BaseException, network: nn.Module) -> str:
    """Return the innermost layer in which an error was raised and its line of code, in words."""
    names = {id(module): name for name, module in network.named_modules()}
    layer, line = "", ""
    for frame, number in _frames(error):
        module = frame.f_locals.get("self")
        name = names.get(id(module), "network")
        if name not in ("", "network"):
            layer = f" in layer {name.removeprefix('network.')} ({type(module).__name__})"
        file = Path(frame.f_code.co_filename)
        if layer and file.exists() and "site-packages" not in file.parts:
            line = f", {file.name} line {number}"
    return layer + line


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    yield from traceback.walk_tb(error.__traceback__)


def _translate(program: Any, network: nn.Module, interface: Interface) -> Any:
    """Return a captured network as a `ModelProto`."""
    try:
        with torch.no_grad(), quiet():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[interface.input],
                output_names=[interface.output],
                verbose=False,
            )
            return made.model_proto
    except Exception as error:  # the exporter raises its own for all, from the first one
        causes = list(_causes(error))
        lacking = any(type(cause).__name__ == "DispatchError" for cause in causes)
        where = next(filter(None, (_node(cause, network) for cause in causes)), "an operator")
        if lacking:
            raise ValueError(
                f"the network cannot be translated to ONNX, which has no operator for {where}: "
                "write the layer with other operators, or serve the network with torch"
            ) from error
        last = causes[-1]
        raise ValueError(
            f"the network cannot be translated to ONNX, for {where}: {type(last).__name__}: "
            f"{cut_text(str(last).strip(), 300)}"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _node(error: BaseException, network: nn.Module) -> str:
    """Return the operator whose translation failed, with its layer; nothing where not known."""
    modules = dict(network.named_modules())
    for frame, _ in _frames(error):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":
            paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            path = paths[-1] if paths else ""
            kind = type(modules[path]).__name__ if path in modules else ""
            layer = path.removeprefix("network").removeprefix(".")
            return (
                f"{node.target}, which " + (f"layer {layer} ({kind})" if layer else "it") + " uses"
            )
    return ""


def _strip(model: Any) -> None:
    """Remove what says how a graph was made: paths and code of this machine stand there.

    Shapes within the graph, which every reader infers, go too.
    """
    graph, functions = model.graph, model.functions
    del graph.value_info[:]
    values = [*graph.input, *graph.output, *graph.initializer]
    for part in [model, graph, *values, *functions, *graph.node]:
        part.doc_string = ""
        del part.metadata_props[:]
    for part in [part for function in functions for part in [*function.node, *function.value_info]]:
        part.doc_string = ""
        del part.metadata_props[:]


def _name_axes(model: Any, interface: Interface) -> None:
    """Give the free axes of input and output their names.

    Raises:
        ValueError: One has a fixed size.
    """
    names = {}
    for axis, name in interface.axes.items():
        size = model.graph.input[0].type.tensor_type.shape.dim[axis]
        if interface.longest.get(name) == 1:
            continue
        if not size.dim_param:
            raise ValueError(
                f"the network must take any {name}, and its graph takes {size.dim_value} only"
            )
        names[size.dim_param] = name
    for value in [*model.graph.input, *model.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]
