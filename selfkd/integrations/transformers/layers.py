"""Layers of transformers' models: their mapping and losses, and copying them to a student."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selfkd.distill.initial import layer_lists, match_layers, start_from_layers
from selfkd.distill.outputs import check_graph
from selfkd.losses.features import (
    attention_matrices,
    cosine_embedding,
    every_other,
    hidden_state_loss,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OF_DISTILBERT = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
"""Parts of a layer of BERT by those of DistilBERT."""
_HEADS_OF_DISTILBERT = {
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector": "cls.predictions.decoder",
    "pre_classifier": "bert.pooler.dense",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}
"""Heads of BERT by those of DistilBERT."""


def start_from_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, *, layer_map: Sequence[int] | None = None
) -> list[str]:
    """Initialise a student from some of its teacher's layers and from all its other weights.

    Of an encoder-decoder, the layers of the encoder and those of the decoder are chosen each. A
    DistilBERT takes those of a BERT by their other names; what it has none of, such as embeddings
    of segments, is left out.

    Args:
        student: Model of the teacher's class and sizes, or a DistilBERT of a BERT's, with fewer
            layers or as many, whose weights are overwritten.
        teacher: Model whose weights are copied; it is not changed.
        layer_map: Index of the teacher's layer for each layer of the student, from 0;
            `selfkd.losses.features.every_other` if not given.

    Returns:
        Names of the student's parameters and buffers that are now the teacher's. Of tied embeddings
        whose teacher's are not tied, the head is overwritten but not the teacher's.

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
    families = [text_config(model).model_type for model in (student, teacher)]
    if families == ["distilbert", "bert"]:
        return start_from_layers(student, teacher, _distilbert_map(student, teacher, layers))
    mapping = dict[str, str]()
    lists = layer_lists(student)
    for path in lists:
        count = len(list(student.get_submodule(path).children()))
        if layer_map is not None and len(layers) != count:
            raise ValueError(
                f"layer_map must be of {count} layers, as {path!r} has, got {list(layer_map)}"
            )
        mapping |= {f"{path}.{i}": f"{path}.{layer}" for i, layer in enumerate(layers)}
    if layer_map is None:
        mapping = match_layers(student, teacher)
    for above in {path[: dot.start()] for path in lists for dot in re.finditer(r"\.|^", path)}:
        for name, _ in student.get_submodule(above).named_children():
            sibling = f"{above}.{name}".lstrip(".")
            if not any(f"{path}.".startswith(f"{sibling}.") for path in lists):
                mapping[sibling] = sibling
    return start_from_layers(student, teacher, mapping)


def _distilbert_map(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]
) -> dict[str, str]:
    """Return the modules of a BERT by those of a DistilBERT."""
    ours, theirs = ({*dict(model.named_modules())} for model in (student, teacher))
    own = "distilbert." if "distilbert" in ours else ""
    other = "bert." if "bert" in theirs else ""
    mapping = {
        f"{own}embeddings.{name}": f"{other}embeddings.{name}"
        for name in ("word_embeddings", "position_embeddings", "LayerNorm")
    }
    for i, layer in enumerate(layers):
        for name, source in _OF_DISTILBERT.items():
            mapping[f"{own}transformer.layer.{i}.{name}"] = f"{other}encoder.layer.{layer}.{source}"
    heads = _HEADS_OF_DISTILBERT.items()
    return mapping | {name: head for name, head in heads if name in ours and head in theirs}


def text_config(model: Any) -> Any:
    """Return the configuration of a model, or of its text model if it has several.

    Raises:
        ValueError: A model that is none of transformers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(
            "layers can be compared of models of transformers only, got "
            f"{type(model).__name__} without their config"
        )
    return config.get_text_config()


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


def check_weights(weights: Mapping[str, float], teachers: int) -> None:
    """Raise ValueError for weights of layers out of range, with several teachers or with none."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}_weight must be >= 0 and finite, got {weight}")
        if weight and not teachers:
            raise ValueError(
                f"{name}_weight must be 0 with targets, got {weight}: hidden states and attention "
                "need a live teacher"
            )
    if any(weights.values()) and teachers != 1:
        raise ValueError(
            "teacher must be one model where hidden states or attention are compared, got "
            f"{teachers}"
        )


def feature_terms(
    student: Any,
    teacher: Any,
    weights: Mapping[str, float],
    layer_map: Sequence[int],
    *,
    project: Callable[[Tensor], Tensor],
    mask: Tensor | None,
    trained: nn.Module | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the terms of hidden states and attention by name, each a mean over the batch.

    Args:
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        weights: Weights of the terms `hidden`, `cosine` and `attention`; those of 0 are left out.
        layer_map: Index of the teacher's layer for each layer of the student.
        project: Map of the student's hidden states to the teacher's width.
        mask: Attention mask.
        trained: Student where it trains: each layer must then have a graph, but the first ones
            that have no trainable parameters.

    Raises:
        ValueError: Outputs without hidden states or attention, or layers without a graph.
    """
    if weights["hidden"] or weights["cosine"]:
        students, teachers = _layers(student, teacher, "hidden_states")
        students, teachers = students[1:], teachers[1:]  # the first are embeddings
        compared = range(len(students)) if weights["hidden"] else [len(students) - 1]
        _check_graphs(students, compared, "hidden state", trained)
        states = [project(state) for state in students]
        if weights["hidden"]:
            yield "hidden", hidden_state_loss(states, teachers, layer_map=layer_map, mask=mask)
        if weights["cosine"]:
            yield "cosine", cosine_embedding(states[-1], teachers[layer_map[-1]], mask=mask)
    if weights["attention"]:
        students, teachers = _layers(student, teacher, "attentions")
        _check_graphs(students, range(len(students)), "attention", trained)
        losses = [
            attention_matrices(matrix, teachers[layer], mask=mask)
            for matrix, layer in zip(students, layer_map, strict=True)
        ]
        yield "attention", torch.stack(losses).mean()


def _layers(student: Any, teacher: Any, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers of both models, those of the teacher on the student's devices."""
    found: list[list[Tensor]] = []
    for outputs in (student, teacher):
        layers = getattr(outputs, name, None)
        if not layers or any(layer is None for layer in layers):
            hint = ': make both models with attn_implementation="eager"'
            raise ValueError(
                f"{name} must be returned by both models, got {layers}"
                f"{hint if name == 'attentions' else ''}"
            )
        found.append(list(layers))
    students, teachers = found
    return students, [layer.to(students[0].device) for layer in teachers]


def _check_graphs(
    layers: Sequence[Tensor], compared: Sequence[int], name: str, trained: nn.Module | None
) -> None:
    """Check that layers have a graph, as they do not inside reentrantly checkpointed blocks."""
    missing = [i for i in compared if not layers[i].requires_grad]
    if trained is None or not missing:
        return
    frozen = 0
    for layer in trained.get_submodule(_path_of_layers(trained)).children():  # type: ignore[arg-type]
        if any(parameter.requires_grad for parameter in layer.parameters()):
            break
        frozen += 1
    for i in missing:
        if i >= frozen:
            check_graph(layers[i], f"{name} of the student's layer {i}")
