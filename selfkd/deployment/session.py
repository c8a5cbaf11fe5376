"""Files of ONNX as networks: run by onnxruntime, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.deployment.cpu import has_int8
from selfkd.deployment.quiet import quiet
from selfkd.errors import cut_text
from selfkd.storage.files import fetch

EXACT = "session.x64quantprecision"
"""Option of a session for exact products of int8 where those of the processor saturate: on x86
without VNNI. On one with VNNI it would be slower, and no more exact."""
_FATAL = 4  # level of onnxruntime's own log, on standard error


class OnnxNetwork(nn.Module):
    """A file of ONNX as a network without parameters, always in eval mode.

    Args:
        path: File, local or remote, which holds all its weights.
        threads: Number of threads of onnxruntime.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A file that onnxruntime cannot run, or with weights in other files.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        load_graph(path)
        self._path = path
        self._session = make_session(path, threads=threads)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [self._session.get_outputs()[0].name]
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, float32, on the device of the inputs.

        Args:
            inputs: Images `[batch, channels, height, width]`, or tokens `[batch, length]`.

        Raises:
            ValueError: Inputs that the file does not take.
        """
        feed = self._feed(inputs)
        try:
            logits = torch.from_numpy(self._session.run(self._outputs, feed)[0])
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class for each status
            raise ValueError(
                f"{self._path} must take {inputs.dtype} {list(inputs.shape)}, which it does not: "
                f"{cut_text(str(error), 300)}"
            ) from None
        return logits if inputs.device == logits.device else logits.to(inputs.device)

    def timed(self, inputs: Tensor) -> Callable[[], object]:
        """Return what predicts inputs as a service would, from numpy to numpy, to be timed."""
        return partial(self._session.run, self._outputs, self._feed(inputs))

    def _feed(self, inputs: Tensor) -> dict[str, Any]:
        given = inputs.detach().cpu()
        given = given.float() if given.is_floating_point() else given
        return {self._input: given.contiguous().numpy()}


def make_session(path: Path, *, threads: int, fused: Path | None = None) -> Any:
    """Return an onnxruntime session on the CPU, without its log.

    On a processor without int8 instructions it takes exact products (`EXACT`).

    Args:
        path: File, local or remote.
        threads: Number of threads.
        fused: File to write the graph to as it is run, for looking at its operators.

    Raises:
        ValueError: A file that onnxruntime cannot run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    if not has_int8():
        options.add_session_config_entry(EXACT, "1")
    if fused is not None:
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # all, without memory layouts
        )
        options.optimized_model_filepath = str(fused)
    try:
        with quiet():
            return onnxruntime.InferenceSession(
                str(fetch(path)), options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # noqa: BLE001 - onnxruntime has a class for each status
        raise ValueError(
            f"{path} cannot be run by onnxruntime: {cut_text(str(error), 300)}"
        ) from None


def operators(path: Path) -> dict[str, int]:
    """Return the kinds of a file's operators with their numbers, most frequent first."""
    kinds = Counter(node.op_type for node in nodes(load_graph(path).graph))
    return dict(kinds.most_common())


def load_graph(path: Path) -> Any:
    """Return a file's `ModelProto`.

    Args:
        path: File, local or remote.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or has weights in other files.
    """
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    content = fetch(path).read_bytes()
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # noqa: BLE001 - protobuf's own
        raise ValueError(f"{path} must be a file of ONNX, and cannot be read: {error}") from None
    if not model.graph.input:
        raise ValueError(f"{path} must be a file of ONNX, and has no graph")
    outside = [tensor.name for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    if outside:
        raise ValueError(
            f"{path} must hold all its weights, got {outside[0]} in another file: export it again"
        )
    return model


def nodes(graph: Any) -> Iterator[Any]:
    """Yield all nodes of a graph, those of its branches and loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                yield from nodes(inner)
