"""Layers of transformers' models: their mapping from student to teacher, and copying them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from selfkd.distill.layers import copy_layers
from selfkd.losses.features import every_other

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def start_from_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, *, layer_map: Sequence[int] | None = None
) -> list[str]:
    """Initialise a student from some of its teacher's layers and from all its other weights.

    Args:
        student: Model of the teacher's class and sizes, with fewer layers or as many, whose weights
            are overwritten.
        teacher: Model whose weights are copied; it is not changed.
        layer_map: Index of the teacher's layer for each layer of the student, from 0;
            `selfkd.losses.features.every_other` if not given.

    Returns:
        Names of the student's parameters and buffers that were overwritten.

    Raises:
        ValueError: An impossible map, or models that do not fit (see `copy_layers`).

    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    >>> teacher, student = (BertModel(BertConfig(num_hidden_layers=n, **sizes)) for n in (4, 2))
    >>> names = start_from_teacher(student, teacher)
    >>> weights = (student.encoder.layer[0], teacher.encoder.layer[1])
    >>> torch.equal(*(layer.output.dense.weight for layer in weights))
    True

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    layers = resolve_layer_map(student, teacher, layer_map)
    path = _path_of_layers(student)
    mapping = {f"{path}.{i}": f"{path}.{layer}" for i, layer in enumerate(layers)}
    steps = path.split(".")
    for depth, step in enumerate(steps):
        above = ".".join(steps[:depth])
        for name, _ in student.get_submodule(above).named_children():
            if name != step:
                sibling = ".".join([*steps[:depth], name])
                mapping[sibling] = sibling
    return copy_layers(student, teacher, mapping)


def text_config(model: Any) -> Any:
    """Return the configuration of a model, or of its text model if it has several."""
    return model.config.get_text_config()


def resolve_layer_map(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[int] | None
) -> list[int]:
    """Return the index of the teacher's layer for each layer of the student.

    Args:
        student: Model with fewer layers, or as many.
        teacher: Model with more layers, or as many.
        layer_map: Indices to check; evenly spaced layers if not given.

    Raises:
        ValueError: An impossible map.
    """
    counts = [text_config(model).num_hidden_layers for model in (student, teacher)]
    if layer_map is None:
        return every_other(*counts)
    if len(layer_map) != counts[0] or not all(0 <= layer < counts[1] for layer in layer_map):
        raise ValueError(
            f"layer_map must be {counts[0]} layers in [0, {counts[1]}), got {list(layer_map)}"
        )
    return list(layer_map)


def _path_of_layers(model: PreTrainedModel) -> str:
    count = text_config(model).num_hidden_layers
    paths: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(paths) != 1:
        raise ValueError(
            f"student must have one list of its {count} layers, got {paths}: use "
            "selfkd.distill.layers.copy_layers"
        )
    return paths[0]
