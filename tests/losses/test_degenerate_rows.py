"""Losses that normalise rows: rows of zeros, equal rows, a single row and equal features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selfkd.losses import (
    ContrastiveMemory,
    attention_transfer,
    cosine_embedding,
    crd_loss,
    dist_loss,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    standardized_loss,
)

BATCH, DIM = 8, 16


def crd(student: Tensor, teacher: Tensor) -> Tensor:
    memory = ContrastiveMemory(40, DIM, generator=torch.Generator().manual_seed(0))
    contrast = memory.draw(
        torch.arange(len(student)), negatives=5, generator=torch.Generator().manual_seed(1)
    )
    return crd_loss(student, teacher, memory, contrast)


def as_maps(loss: Callable[..., Tensor], power: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: loss(
        student.view(-1, 4, 2, 2), teacher.view(-1, 4, 2, 2), power=power
    )


def of_logits(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: loss(student, teacher, temperature=2.0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pkt": pkt,
    "similarity_preserving": similarity_preserving,
    "cosine_embedding": cosine_embedding,
    "crd": crd,
    "attention_transfer": as_maps(attention_transfer, 2),
    "attention_transfer of power 1": as_maps(attention_transfer, 1),
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "dist_loss": of_logits(dist_loss),
    "standardized_loss": of_logits(standardized_loss),
}


def zero_row(rows: Tensor) -> Tensor:
    return rows.index_fill(0, torch.tensor([2]), 0.0)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows,
    "a row of zeros": zero_row,
    "two rows of zeros": lambda rows: rows.index_fill(0, torch.tensor([2, 5]), 0.0),
    "a row of nearly zeros": lambda rows: torch.cat([rows[:2], 1e-30 * rows[2:3], rows[3:]]),
    "two equal rows": lambda rows: torch.cat([rows[:1], rows[:-1]]),
    "one row": lambda rows: rows[:1],
    "one row of zeros": lambda rows: 0 * rows[:1],
    "all equal": lambda rows: rows[:1].repeat(len(rows), 1),
    "all ones": torch.ones_like,
    "all zeros": torch.zeros_like,
}


def make_rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH, DIM, generator=generator)
    return student, teacher


@pytest.mark.parametrize("of_teacher", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_of_ordinary_size(name: str, change: str, *, of_teacher: bool) -> None:
    student, teacher = make_rows()
    changed = CHANGES[change](student)
    changed_teacher = CHANGES[change](teacher) if of_teacher else teacher[: len(changed)]
    changed.requires_grad_()
    loss = LOSSES[name](changed, changed_teacher)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, changed)
    assert gradient.norm(dim=-1).max() < 10


@pytest.mark.parametrize("name", ["pkt", "cosine_embedding", "crd"])
def test_a_row_of_zeros_gets_no_gradient_and_leaves_those_of_others(name: str) -> None:
    student, teacher = make_rows()
    row = zero_row(student).requires_grad_()
    loss = LOSSES[name](row, teacher)
    (gradient,) = torch.autograd.grad(loss, row)
    assert (gradient[2] == 0).all()
    assert (gradient[[0, 1, 3, 4, 5, 6, 7]].norm(dim=-1) > 1e-5).all()


@pytest.mark.parametrize("name", ["pkt", "similarity_preserving", "cosine_embedding", "crd"])
def test_second_derivatives_with_a_row_of_zeros_are_finite(name: str) -> None:
    student, teacher = make_rows()
    rows = zero_row(student).requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](rows, teacher), rows, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), rows)
    assert second.isfinite().all()
    assert second.norm(dim=-1).max() < 10
