"""Ranks that train one student together: shares of batches, and collective operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of ranks; a single one needs no `torch.distributed`.

    >>> Ranks(1, 3).share(10)
    range(3, 6)
    >>> Ranks().share(10)
    range(0, 10)
    """

    rank: int = 0
    """Rank of this process."""
    size: int = 1
    """Number of ranks."""

    @classmethod
    def here(cls) -> Ranks:
        """Return the rank of this process by `torch.distributed`, where that is initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and reports."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Return the share of a rank in a batch; sizes of shares differ by one at most.

        Args:
            count: Images of all ranks.
            rank: Rank; this process's when not given.
        """
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def places(self, count: int) -> Tensor:
        """Return the places in a batch that this rank reads: the first where it has no share.

        >>> Ranks(1, 3).places(10), Ranks(0, 3).places(2)
        (tensor([3, 4, 5]), tensor([0]))
        """
        share = self.share(count) or range(1)
        return torch.arange(share.start, share.stop)

    def weight(self, *counts: int) -> float:
        """Return the fraction of a batch that is this rank's share.

        Args:
            counts: Images of the batch, of each kind that is shared by itself.

        >>> Ranks(0, 2).weight(3), Ranks(0, 2).weight(3, 7)
        (0.3333333333333333, 0.4)
        """
        return sum(len(self.share(count)) for count in counts) / sum(counts)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return a model whose gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        # without it buckets are rebuilt after the first step, and a resumed run would sum the
        # gradients in another order than an uninterrupted one
        keep_buckets = next(model.parameters()).device.type == "cpu"
        return DistributedDataParallel(model, find_unused_parameters=keep_buckets)

    def mean_loss(self, loss: Tensor, *counts: int) -> Tensor:
        """Return a loss whose mean over the ranks is the mean over all images of a batch.

        Args:
            loss: Mean over this rank's share.
            counts: Images of all ranks, of each kind that is shared by itself.
        """
        return loss if self.size == 1 else loss * (self.weight(*counts) * self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the values `[share]` of all ranks."""
        total, count = self.sum(torch.stack([values.sum(), values.new_full((), len(values))]))
        mean: Tensor = total / count
        return mean

    def gather(self, part: Tensor, count: int, *, device: str) -> Tensor:
        """Return the rows of all ranks, in order, on the CPU.

        Args:
            part: Rows of this rank, `[share, …]`.
            count: Number of rows of all ranks.
            device: Device of the collective operation: `cuda` for NCCL, `cpu` for gloo.
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
        """Return the values of all ranks, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Return the value of rank 0."""
        return self.collect(value)[0]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = Ranks()


def smallest_batch(student: nn.Module, *, batch_size: int, images: int, ranks: int = 1) -> int:
    """Return the number of images that a training batch has at least.

    A batch of one has no variance for batch normalisation: two images on each rank that takes the
    statistics of its own share, two in all where they are synchronised, else one.

    Args:
        student: Network to train.
        batch_size: Images a step, over all ranks.
        images: Number of training images.
        ranks: Processes that share each batch.

    Raises:
        ValueError: Batches, or the whole of the images, that are smaller.
    """
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 1
    smallest = 2 if all(isinstance(norm, nn.SyncBatchNorm) for norm in norms) else 2 * ranks
    where = f" on {ranks} workers" if ranks > 1 else ""
    for name, number in (("train.batch_size", batch_size), ("data.train_size", images)):
        if number < smallest:
            raise ValueError(
                f"{name} must be at least {smallest} with batch normalisation{where}, which takes "
                f"means over two images or more, got {number}"
            )
    return smallest
