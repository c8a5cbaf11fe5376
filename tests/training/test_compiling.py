"""Graphs of compiled trainings: counted, and warned of once where they are many."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn

from selfkd.results import Row
from selfkd.training import compiling
from selfkd.training.compiling import MOST_GRAPHS, Graphs


def test_each_new_graph_is_counted() -> None:
    torch._dynamo.reset()
    model = torch.compile(nn.Linear(3, 2), backend="eager", dynamic=False)
    model(torch.ones(1, 3))
    graphs, row = Graphs(compiled=True), Row()
    for size in (2, 3, 2):
        model(torch.ones(size, 3))

    graphs.add_to(row)

    assert row == {"compiled_graphs": 2}


def test_too_many_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([1, 1 + MOST_GRAPHS, 2 + MOST_GRAPHS, 3 + MOST_GRAPHS])
    monkeypatch.setattr(compiling, "_made", lambda: next(made))
    graphs = Graphs(compiled=True)
    few, many, more = Row(), Row(note="kept"), Row()
    for row in (few, many, more):
        graphs.add_to(row)

    assert few == {"compiled_graphs": MOST_GRAPHS}
    assert many["note"].startswith(f"kept; torch.compile has made {MOST_GRAPHS + 1} graphs")
    assert more == {"compiled_graphs": MOST_GRAPHS + 2}
