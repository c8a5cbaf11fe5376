"""Files of ONNX as networks: run by onnxruntime, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.deployment.quiet import quiet
from selfkd.storage.files import fetch

_FATAL = 4  # of ORT's C++ log


class OnnxNetwork(nn.Module):
    """A file of ONNX as a network in eval mode, without parameters.

    Args:
        path: File, which holds all its weights.
        threads: Number of threads of onnxruntime.

    Raises:
        ValueError: A file that onnxruntime cannot run, or with weights in other files.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        import onnxruntime

        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        content = load_graph(path).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        try:
            with quiet():
                self._session = onnxruntime.InferenceSession(
                    content, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class for each status
            raise ValueError(f"{path} cannot be run by onnxruntime: {error}") from None
        self._input = self._session.get_inputs()[0].name
        self.eval()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, float32, on the device of the inputs.

        Args:
            inputs: Images `[batch, channels, height, width]`, or tokens `[batch, length]`.
        """
        given = inputs.detach().cpu().contiguous().numpy()
        logits = self._session.run(None, {self._input: given})[0]
        return torch.from_numpy(logits).float().to(inputs.device)


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

    try:
        model = onnx.load(str(fetch(path)), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - of protobuf
        raise ValueError(f"{path} must be a file of ONNX, and cannot be read: {error}") from None
    outside = [tensor.name for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    if outside:
        raise ValueError(f"{path} must hold all its weights, got {outside[0]} in another file")
    return model


def nodes(graph: Any) -> Iterator[Any]:
    """Yield all nodes of a graph, those of its branches and loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                yield from nodes(inner)
