"""Random float64 batches for the tests of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).mul_(2)


def pair(
    student: Sequence[int], teacher: Sequence[int] | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return features of a student, which require a gradient, and of a teacher; float64."""
    return randn(*student, seed=seed).requires_grad_(), randn(*(teacher or student), seed=seed + 1)
