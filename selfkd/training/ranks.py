"""The processes that train one student together: how they share batches and what they agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The place of this process among them; one process alone needs no `torch.distributed`.

    >>> Ranks(1, 3).share(10)
    range(3, 6)
    >>> Ranks().share(10)
    range(0, 10)
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Return this process's place, by `torch.distributed` where that was initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and reports."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Return which of `count` images are a rank's: parts that differ by one at most."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def weight(self, count: int) -> float:
        """Return this rank's share of `count` images, by which its mean counts."""
        return len(self.share(count)) / count

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients that are the means over the ranks'."""
        if self.size == 1:
            return model
        # else its buckets are divided anew after the first step, and a resumed run would add up
        # the ranks' gradients in another order than one that was not stopped
        keep_buckets = next(model.parameters()).device.type == "cpu"
        return DistributedDataParallel(model, find_unused_parameters=keep_buckets)

    def mean_loss(self, loss: Tensor, count: int) -> Tensor:
        """Return a loss whose mean over the ranks is the mean over all `count` images.

        Args:
            loss: mean over this rank's share.
            count: images of all ranks.
        """
        return loss if self.size == 1 else loss * (self.weight(count) * self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `[share]` values over all ranks."""
        total, count = self.sum(torch.stack([values.sum(), values.new_tensor(len(values))]))
        mean: Tensor = total / count
        return mean

    def gather(self, part: Tensor, count: int, *, device: str) -> Tensor:
        """Return all `count` rows, of which this rank has its share; on the CPU.

        Args:
            part: `[share, …]`.
            count: rows of all ranks.
            device: that the ranks talk over.
        """
        if self.size == 1:
            return part
        sizes = [len(self.share(count, rank)) for rank in range(self.size)]
        padding = [0, 0] * (part.ndim - 1) + [0, max(sizes) - len(part)]
        padded = F.pad(part, padding).to(device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)]).cpu()

    def collect(self, value: Any) -> list[Any]:
        """Return every rank's value, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Return the first rank's value."""
        return self.collect(value)[0]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the first one's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
