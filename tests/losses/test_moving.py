"""Tensors on their way to a GPU, and the rows of valid tokens."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda

from selfkd.losses.moving import send, valid_rows

MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_what_is_on_its_device_stays_as_it_is() -> None:
    tensor = torch.ones(2)
    assert send(tensor, "cpu") is tensor


def test_a_copy_to_the_gpu_is_not_waited_for() -> None:
    with fake_cuda() as waits:
        found = send(torch.ones(2), "cuda")

        assert found.device.type == "cuda"
        assert (waits.found, waits.copies) == ([], 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_those_of_the_mask(axis: int) -> None:
    rows = torch.randn((2, 2, 3, 4)[1 - axis :], requires_grad=True)
    found = valid_rows(rows, MASK, axis)
    expected = rows[MASK] if axis == 0 else rows[:, MASK]

    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), rows)
    (other,) = torch.autograd.grad(expected.square().sum(), rows)
    assert torch.equal(gradient, other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mask_on_the_cpu_is_counted_without_a_wait(device: str) -> None:
    with fake_cuda() as waits:
        rows, mask = torch.zeros(2, 3, 4, device="cuda"), MASK.to(device)
        waits.clear()

        found = valid_rows(rows, mask)

        assert found.shape == (3, 4)
        assert bool(waits.found) == (device == "cuda")
