"""Predictions where a GPU has less memory than their batches need."""

from __future__ import annotations

import pytest
import torch
from predictions import predict
from torch import Tensor, nn

from selfkd.config import load_config, to_tree
from selfkd.data import Data, Split
from selfkd.tasks import make_task
from selfkd.tasks.text.task import TextTask

IMAGES = 23


class Small(nn.Module):
    """Network of a GPU that has the memory for so many items at once."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most
        self.sizes = list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found: Tensor = self.network(inputs)
        return found


def images() -> Data:
    pixels = torch.arange(IMAGES * 4, dtype=torch.uint8).view(IMAGES, 1, 2, 2)
    split = Split(pixels, torch.arange(IMAGES) % 3)
    return Data("own", split, split, split, ("a", "b", "c"), 2, (0.5,), (0.25,), "own")


@pytest.mark.parametrize("rows", [None, range(5, 21)])
def test_batches_are_halved_until_the_memory_does(rows: range | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    expected = predict(network, images(), "val", rows=rows)
    small = Small(network, 3).train()

    found = predict(small, images(), "val", rows=rows)

    torch.testing.assert_close(found, expected)
    assert len(found) == len(rows or range(IMAGES))
    assert max(small.sizes[-4:]) <= 3
    assert small.training


def test_memory_for_no_image_at_all_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        predict(Small(nn.Flatten(), 0), images(), "val")


def test_a_batch_that_fits_is_yielded_once() -> None:
    small = Small(nn.Flatten(), 8)

    def less_each_time(inputs: Tensor) -> Tensor:
        small.most = 2  # after a batch of more has been predicted
        return inputs.flatten(1)

    small.network.forward = less_each_time  # type: ignore[method-assign]
    found = predict(small, images(), "train")

    torch.testing.assert_close(found, predict(nn.Flatten(), images(), "train"))


def test_windows_of_text_are_halved_too() -> None:
    config = load_config(
        settings=["data={name: arithmetic, train_size: 64, val_size: 40}"], flags={"task": "text"}
    )
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    network = task.make(config.model)
    small = Small(network, 7)

    torch.testing.assert_close(task.logits(small, "val"), task.logits(network, "val"))
    assert max(small.sizes[-3:]) <= 7
