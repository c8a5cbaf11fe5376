"""Logits of what models return, the check for a graph, and nested inputs leaf by leaf."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from selfkd.distill.outputs import check_graph, map_tensors, take_logits

LOGITS = torch.randn(4, 3)
OTHER = torch.randn(4, 3)
FEATURES = torch.randn(4, 5, 2, 2)
GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])


@dataclass
class Scores:
    scores: Tensor
    loss: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"logits": LOGITS, "other": OTHER},
        OrderedDict(logits=LOGITS),
        UserDict(logits=LOGITS),
        {"out": LOGITS},
        {"loss": torch.tensor(1.0), "scores": LOGITS},
        SequenceClassifierOutput(loss=torch.tensor(1.0), logits=LOGITS, hidden_states=(FEATURES,)),
        {"logits": SequenceClassifierOutput(logits=LOGITS)},
        GoogLeNetOutputs(LOGITS, OTHER, OTHER),
        SimpleNamespace(logits=LOGITS, aux=OTHER),
        Scores(LOGITS, torch.tensor(1.0)),
        (LOGITS,),
        [LOGITS],
        (SequenceClassifierOutput(logits=LOGITS),),
        (LOGITS, (FEATURES, FEATURES)),
        (LOGITS, FEATURES),
        (LOGITS, None),
        (torch.tensor(1.0), LOGITS),
        ([FEATURES, FEATURES], LOGITS),
        (LOGITS, torch.tensor([0, 1, 2, 0])),
    ],
)
def test_logits_are_taken_where_they_are_clear(output: Any) -> None:
    assert take_logits(output, "student_logits") is LOGITS


@pytest.mark.parametrize(
    ("output", "got"),
    [
        ((LOGITS, OTHER), r"tuple of \[4, 3\], \[4, 3\]"),
        ([FEATURES, FEATURES], r"list of \[4, 5, 2, 2\], \[4, 5, 2, 2\]"),
        ((FEATURES, LOGITS), r"tuple of \[4, 5, 2, 2\], \[4, 3\]"),
        ({"a": LOGITS, "b": OTHER}, r"dict of a \[4, 3\], b \[4, 3\]"),
        (BaseModelOutput(last_hidden_state=FEATURES), "BaseModelOutput of last_hidden_state"),
        (SimpleNamespace(logits=None), "SimpleNamespace"),
        ((LOGITS,) * 9, r"tuple of (\[4, 3\], ){6}…"),
        (None, "NoneType"),
        ("logits", "str"),
        (1.5, "float"),
        ((), "tuple"),
    ],
)
def test_an_unclear_output_is_described(output: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"student_logits must be a tensor.*, got {got}.*: give"):
        take_logits(output, "student_logits")
    with pytest.raises(TypeError, match=f"teacher must return a tensor.*, got {got}.*: wrap it in"):
        take_logits(output, "teacher")


def test_a_graph_is_asked_for_where_gradients_are_enabled() -> None:
    layer = nn.Linear(3, 2)
    check_graph(layer(LOGITS), "student_logits")
    check_graph(layer(LOGITS) * 0, "student_logits")  # a gradient may be 0
    with torch.no_grad():
        check_graph(layer(LOGITS), "student_logits")
        without = layer(LOGITS)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    for tensor in (without, layer(LOGITS).detach(), frozen(LOGITS)):
        with pytest.raises(ValueError, match=r"student_logits must have a graph.*use_reentrant"):
            check_graph(tensor, "student_logits")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_feature_inside_a_checkpointed_block(reentrant: bool) -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *args: seen.append(args[2]))
    inputs = LOGITS.clone().requires_grad_()
    checkpoint(nn.Sequential(layer, nn.Tanh()), inputs, use_reentrant=reentrant)
    assert seen[0].requires_grad is not reentrant


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Inputs:
    pixels: Tensor
    size: int


def test_nested_inputs_are_mapped_leaf_by_leaf() -> None:
    value: dict[str, Any] = {
        "a": torch.tensor(1),
        "pair": Pair(torch.tensor(2), [torch.tensor(3), "text", None]),
        "user": UserDict(x=torch.tensor(4)),
        "data": Inputs(torch.tensor(5), 7),
        "fixed": MappingProxyType({"y": torch.tensor(6)}),
        "tuple": (torch.tensor(7),),
        "size": torch.Size([2]),
    }
    mapped = map_tensors(value, lambda tensor: -tensor)
    assert mapped == {
        "a": torch.tensor(-1),
        "pair": Pair(torch.tensor(-2), [torch.tensor(-3), "text", None]),
        "user": UserDict(x=torch.tensor(-4)),
        "data": Inputs(torch.tensor(-5), 7),
        "fixed": {"y": torch.tensor(-6)},
        "tuple": (torch.tensor(-7),),
        "size": torch.Size([2]),
    }
    assert [type(mapped[key]) for key in ("user", "pair")] == [UserDict, Pair]
    assert value["a"] == 1  # the inputs themselves are not changed
    assert value["user"] == UserDict(x=torch.tensor(4))


@pytest.mark.parametrize(
    "value",
    [
        BatchEncoding({"input_ids": torch.tensor([[1, 2]])}),
        SequenceClassifierOutput(logits=torch.tensor([[1, 2]])),
    ],
)
def test_types_of_transformers_are_kept(value: Any) -> None:
    (key,) = value.keys()
    mapped = map_tensors(value, lambda tensor: -tensor)
    assert type(mapped) is type(value)
    assert mapped[key].tolist() == getattr(mapped, key).tolist() == [[-1, -2]]
    assert value[key].tolist() == [[1, 2]]


def test_a_packed_sequence_keeps_its_sizes() -> None:
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    mapped = map_tensors(packed, lambda tensor: -tensor)
    assert mapped.data.tolist() == [-1.0, -1.0, -1.0]
    assert torch.equal(mapped.batch_sizes, packed.batch_sizes)
