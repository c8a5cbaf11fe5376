"""CRD as a term of a distiller: the contrastive loss with its projections and memory banks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfkd.distill.terms import FeatureTerm, pooled
from selfkd.losses.contrast import ContrastiveMemory, crd_loss
from selfkd.losses.features import Projection

NEGATIVES = 16_384
"""Largest number of negatives when none is given, that of the paper."""


@dataclass(frozen=True)
class ContrastTerm(FeatureTerm):
    """Contrastive representation distillation between layers of student and teacher.

    The projections of both are trained, and the memory banks of embeddings belong to their state
    (`distiller.state_dict()`). Maps are pooled to vectors. A call needs the `index` of its items.

    Args:
        images: Number of training items, at least 2.
        labels: Class of each item `[images]`: negatives are of other classes. Any other items
            without.
        dim: Dimension of the embeddings.
        negatives: Number of negatives an item, drawn with replacement; `images`, at most 16,384,
            when not given.
        temperature: Temperature of the loss, above 0.
        momentum: Share of the old row that an update of the banks keeps, in [0, 1).
        seed: Seed of the first rows and of the negatives.

    Raises:
        ValueError: A setting out of range.

    Reference:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
        https://arxiv.org/abs/1910.10699
    """

    images: int = 0
    labels: Tensor | None = None
    dim: int = 128
    negatives: int | None = None
    temperature: float = 0.07
    momentum: float = 0.5
    seed: int = 0
    project: tuple[int, int] | bool | None = True

    def make_projection(self, student: int, teacher: int) -> nn.Module:
        """Return projections and memory for features of so many channels."""
        generator = torch.Generator().manual_seed(self.seed)
        memory = ContrastiveMemory(
            self.images,
            self.dim,
            labels=None if self.labels is None else self.labels.cpu(),
            temperature=self.temperature,
            momentum=self.momentum,
            generator=generator,
        )
        negatives = min(self.images, NEGATIVES) if self.negatives is None else self.negatives
        return Contrast(student, teacher, memory, negatives=negatives, seed=self.seed)

    def compare(
        self,
        student: Tensor,
        teacher: Tensor,
        module: nn.Module | None,
        *,
        index: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the loss of a pair of features."""
        if index is None:
            raise ValueError(
                "index must be given for crd, got None: distiller(student_logits, labels, "
                "inputs=inputs, index=index)"
            )
        if mask is not None or module is None:
            raise ValueError("crd must be of items, one vector each, got tokens")
        loss: Tensor = module(pooled(student), pooled(teacher), index)
        return loss


class Contrast(nn.Module):
    """Embeddings of student and teacher with their memory, whose state is that of the module.

    The banks are read by the backward pass of a step, so they are updated by its embeddings at the
    next one, or when the state is read.

    Args:
        student_channels: Channels of the student's features.
        teacher_channels: Channels of the teacher's features.
        memory: Memory banks.
        negatives: Number of negatives an item.
        seed: Seed of the negatives.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        memory: ContrastiveMemory,
        *,
        negatives: int,
        seed: int,
    ) -> None:
        super().__init__()
        dim = memory.student.shape[1]
        self.student = Projection(student_channels, dim)
        self.teacher = Projection(teacher_channels, dim)
        self._memory, self._negatives, self._seed = memory, negatives, seed
        self._draws = 0
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """Return the loss of vectors `[batch, channels]` of items `[batch]`."""
        self._update()
        dtype = self.student.linear.weight.dtype
        embeddings = self.student(student.to(dtype)), self.teacher(teacher.to(dtype))
        if self._memory.student.device != student.device:
            self._memory.to(student.device)
        contrast = self._memory.draw(index, negatives=self._negatives, generator=self._generator())
        loss = crd_loss(*embeddings, self._memory, contrast)
        if torch.is_grad_enabled():
            self._draws += 1
            self._pending = embeddings[0].detach(), embeddings[1].detach(), contrast
        return loss

    def _generator(self) -> torch.Generator:
        """Return the generator of a step, which is another one in each process."""
        rank = dist.get_rank() if _several() else 0
        seed = (self._seed * 1_000_003 + self._draws) * 1_009 + rank
        return torch.Generator().manual_seed(seed % 2**63)

    @torch.no_grad()
    def _update(self) -> None:
        """Update the banks by the last step, in several processes by the steps of all of them."""
        if self._pending is None:
            return
        student, teacher, contrast = self._pending
        self._pending = None
        if _several():
            if self._memory.log_constants.isnan().any():  # which the first process fixes for all
                state = self._memory.state_dict()
                self._memory.update(student, teacher, contrast)
                state["log_constants"] = self._memory.log_constants.clone()
                dist.broadcast(state["log_constants"], 0)
                self._memory.load_state_dict(state)
            found: list[Any] = [None] * dist.get_world_size()
            rows = (student.cpu(), teacher.cpu(), contrast[:, :2].cpu())
            dist.all_gather_object(found, rows)
            student, teacher, contrast = (
                torch.cat(parts).to(contrast.device) for parts in zip(*found, strict=True)
            )
        self._memory.update(student, teacher, contrast)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the banks and the number of draws."""
        self._update()
        return {**self._memory.state_dict(), "draws": self._draws}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `get_extra_state`."""
        tensors = {name: value for name, value in state.items() if name != "draws"}
        self._memory.load_state_dict(tensors)
        self._draws, self._pending = int(state["draws"]), None


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
