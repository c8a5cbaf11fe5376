"""Logits of whatever a model returns, the check for a graph, and nested inputs leaf by leaf."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def take_logits(output: Any, name: str) -> Tensor:
    """Return the logits of a model's output.

    A tensor is taken as it is, and of an output with the key or attribute `logits`, as those of
    transformers or torchvision's GoogLeNet, that. Otherwise it must be clear which tensor is meant:
    the only floating-point one with a batch and classes, or of a tuple or list the first one where
    that is the only `[batch, classes]`.

    Args:
        output: Tensor, mapping, dataclass, tuple or list.
        name: Name of the logits, or of the model that returned them, for the message.

    Raises:
        TypeError: An output without logits, or with several tensors that may be meant.

    >>> logits = torch.zeros(2, 3)
    >>> take_logits({"loss": torch.tensor(0.5), "logits": logits}, "teacher").shape
    torch.Size([2, 3])
    >>> take_logits((logits, logits), "student_logits")
    Traceback (most recent call last):
    ...
    TypeError: student_logits must be a tensor of logits, or an output in which it is clear which \
tensor they are, got tuple of [2, 3], [2, 3]: give that tensor alone
    """
    found = output if isinstance(output, Tensor) else _find_logits(output)
    if found is not None:
        return found
    if name.endswith("logits"):
        verb, way_out = "be", "give that tensor alone"
    else:
        verb, way_out = "return", "wrap it in a module or function that returns that tensor alone"
    raise TypeError(
        f"{name} must {verb} a tensor of logits, or an output in which it is clear which tensor "
        f"they are, got {describe_output(output)}: {way_out}"
    )


def check_graph(tensor: Tensor, name: str) -> None:
    """Raise ValueError for a tensor without a graph, through which no student can be trained.

    No backward pass is run, and a gradient may be 0. Where gradients are not enabled nothing is
    checked: call it where the student trains.

    Args:
        tensor: Logits or features of the student.
        name: Name of the tensor, for the message.

    Raises:
        ValueError: A tensor that requires no gradient where gradients are enabled.

    >>> check_graph(torch.zeros(2, 3, requires_grad=True), "student_logits")
    >>> check_graph(torch.zeros(2, 3), "student_logits")
    Traceback (most recent call last):
    ...
    ValueError: student_logits must have a graph to train the student, got a tensor that requires \
no gradient: computed under torch.no_grad or inference_mode, detached, of a frozen student or a \
layer before its first weight, or inside a checkpointed block (use_reentrant=False keeps its graph)
    """
    if torch.is_grad_enabled() and not tensor.requires_grad:
        raise ValueError(
            f"{name} must have a graph to train the student, got a tensor that requires no "
            "gradient: computed under torch.no_grad or inference_mode, detached, of a frozen "
            "student or a layer before its first weight, or inside a checkpointed block "
            "(use_reentrant=False keeps its graph)"
        )


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested inputs with each tensor changed; containers are new ones of the same type.

    Args:
        value: Tensor, mapping (also `BatchEncoding` and other `UserDict`s), list, tuple, named
            tuple, dataclass, or anything else, which is returned as it is.
        change: Function from a tensor to another.

    >>> map_tensors({"ids": torch.tensor([1]), "more": [torch.tensor([2]), "a"]}, lambda t: -t)
    {'ids': tensor([-1]), 'more': [tensor([-2]), 'a']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):  # its `batch_sizes` must stay on the CPU
        data, sizes, *orders = value
        orders = [map_tensors(order, change) for order in orders]
        return PackedSequence(change(data), sizes, *orders)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(item, change) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return changed
        twin = copy.copy(value)
        for key, item in changed.items():
            twin[key] = item
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        fields = {name: map_tensors(getattr(value, name), change) for name in names}
        return dataclasses.replace(value, **fields)
    return value


def describe_output(output: Any) -> str:
    """Return type and shapes of an output for a message, on one line.

    >>> describe_output([torch.zeros(2, 3), torch.zeros(2)])
    'list of [2, 3], [2]'
    """
    items = _items(output)
    name = type(output).__name__
    if isinstance(output, str) or not items:
        return name
    shapes = [
        ("" if isinstance(key, int) else f"{key} ")
        + (str(list(item.shape)) if isinstance(item, Tensor) else type(item).__name__)
        for key, item in list(items.items())[:6]
    ]
    return f"{name} of {', '.join(shapes)}" + (", …" if len(items) > len(shapes) else "")


def _find_logits(output: Any) -> Tensor | None:
    """Return the logits of an output, None where it is not clear which tensor they are."""
    if isinstance(output, Tensor):
        return output
    if output is None or isinstance(output, str | int | float):
        return None
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if logits is not None:
        return _find_logits(logits)
    if hasattr(output, "to_tuple"):  # of transformers, which names logits where there are some
        return None
    items = _items(output)
    if items is None:
        return None
    if len(items) == 1:
        only = _find_logits(next(iter(items.values())))
        return None if only is None or only.ndim == 0 else only  # a loss is no logits
    found = [
        item
        for item in items.values()
        if isinstance(item, Tensor) and item.is_floating_point() and item.ndim >= 2
    ]
    if len(found) == 1:
        return found[0]
    rows = [item.ndim == 2 for item in found]
    if isinstance(output, tuple | list) and rows and rows[0] and sum(rows) == 1:
        return found[0]
    return None


def _items(output: Any) -> dict[Any, Any] | None:
    """Return the items of a container by name or number, None for anything else."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, Sequence):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return None
