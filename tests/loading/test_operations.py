"""Operations, against counts by hand, of single networks and of the models of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from selfkd import budget
from selfkd.loading.costs import open_finished, trained_items
from selfkd.loading.operations import count_operations, operations_of
from selfkd.models import make_model

CONV = 2 * (3 * 3 * 3) * 8 * 16 * 16  # 3 to 8 channels, 16 x 16 pixels
INPUT, WIDTH, CLASSES = 64, 8, 10
MLP = 2 * (INPUT * WIDTH + WIDTH * CLASSES)


@pytest.mark.parametrize(
    ("network", "shape", "forward", "backward"),
    [
        (nn.Linear(10, 20), (1, 10), 400, 400),  # the first layer's inputs need no gradient
        (nn.Linear(10, 20), (7, 10), 2800, 2800),
        (nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), (1, 10), 600, 800),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten()),
         (1, 3, 16, 16), CONV, CONV),
    ],
)  # fmt: skip
def test_counts_are_those_by_hand(
    network: nn.Module, shape: Sequence[int], forward: int, backward: int
) -> None:
    inputs = torch.zeros(*shape)
    network.eval()
    assert count_operations(network, inputs) == forward
    assert count_operations(network, inputs, training=True) == forward + backward
    assert all(parameter.grad is None for parameter in network.parameters())


class Attention(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.requires_grad_(torch.is_grad_enabled())
        found = nn.functional.scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)
        return found.flatten(1)


def test_attention_is_counted_where_it_is_computed_by_one_kernel() -> None:
    heads, length, width = 4, 32, 16
    forward = 2 * 2 * heads * length * length * width
    inputs = torch.zeros(1, heads, length, width)
    assert count_operations(Attention(), inputs) == forward
    assert count_operations(Attention(), inputs.clone(), training=True) == 3 * forward


def test_a_deep_network_costs_three_forward_passes_to_train_but_for_its_first_layer() -> None:
    network = make_model("selfkd_cnn", {"width": 8}, num_classes=10, in_chans=1, image_size=8)
    inputs = torch.zeros(1, 1, 8, 8)
    forward = count_operations(network.eval(), inputs)
    step = count_operations(network, inputs, training=True)
    assert 2.5 * forward < step < 3 * forward


def test_an_ensembles_teacher_costs_its_members_and_training_all_that_was_trained(
    compressed: Path,
) -> None:
    run = open_finished(str(compressed))
    found = operations_of(run)
    assert (found.student, found.teacher) == (MLP, 2 * MLP)
    step = 2 * MLP + 2 * WIDTH * CLASSES  # gradients of weights, and of the hidden layer
    assert (found.student_step, found.teacher_step) == (step, 2 * step)
    items = run.facts.items["train"]
    assert trained_items(run) == (2 * 2 * items, 2 * items, 2 * items)  # two trials, two epochs


def test_generations_are_of_one_size(lineage: Path) -> None:
    found = operations_of(open_finished(str(lineage)))
    assert found.teacher == found.student == MLP
    assert found.teacher_step == found.student_step


def test_a_budget_has_a_column_of_hours_and_one_of_operations(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert budget.main(["--from", str(compressed), "--format", "json", "--rate", "10/s"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = found["operations"]
    items = open_finished(str(compressed)).facts.items["train"]
    assert found["of"] == "hours"
    assert own["caching"] == 2 * MLP * items
    assert own["training"] == 2 * own["search"] > 0
    assert own["break_even"] == pytest.approx(own["distilling"] / MLP)
    assert own["days"] == pytest.approx(own["break_even"] / 864_000)
    assert any("of the teacher's test accuracy" in note for note in found["notes"])
    assert budget.main(["--from", str(compressed)]) == 0
    head = capsys.readouterr().out.splitlines()[1]
    assert head.split() == ["hours", "operations"]


def test_what_cannot_be_counted_is_said(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "command", "data.json", "summary.json"):
        (tmp_path / name).write_bytes((compressed / name).read_bytes())
    assert budget.main(["--from", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "operations are not counted: the student has no file student.safetensors" in output
