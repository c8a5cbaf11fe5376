"""Integers of a batch on the CPU, where labels are counted and logits read without a GPU's wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor

HOST = "soft_target_host"
"""Key of a batch with `HostCopies` of it."""


class HostCopies:
    """Integers of a batch as its collate has made them; what moves batches to a GPU leaves them.

    Args:
        batch: Batch on the CPU.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._tensors = {name: value for name, value in batch.items() if _is_integer(value)}
        self._moved: dict[int, tuple[Tensor, int, Tensor]] = {}

    def follow(self, batch: Mapping[str, Any]) -> None:
        """Take down the tensors on the GPU that these are copies of.

        Args:
            batch: The same batch, moved.
        """
        pairs = ((batch.get(name), own) for name, own in self._tensors.items())
        self._moved = {
            id(moved): (moved, moved._version, own)
            for moved, own in pairs
            if _is_integer(moved) and moved.shape == own.shape and not moved.is_inference()
        }

    def of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return inputs with all integers on the CPU; as they are where one has been changed since.

        Args:
            inputs: Tensors of the batch, perhaps by other names.
        """
        found = dict(inputs)
        for name, value in inputs.items():
            if _is_integer(value):
                known = self._moved.get(id(value))
                if known is None or known[0] is not value or known[0]._version != known[1]:
                    return inputs
                found[name] = known[2]
        return found


class HostCollate:
    """Collate that adds `HostCopies` to a batch.

    Args:
        collate: Collate of the items.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        if isinstance(batch, Mapping):
            batch[HOST] = HostCopies(batch)  # type: ignore[index]
        return batch


def follow_host(batch: Mapping[str, Any]) -> None:
    """Let the copies of a batch, where there are any, follow it to its device."""
    if isinstance(copies := batch.get(HOST), HostCopies):
        copies.follow(batch)


def on_host(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return inputs with integers on the CPU where they are known there, else as they are.

    >>> import torch
    >>> batch = {"labels": torch.tensor([3, 1])}
    >>> batch[HOST] = HostCopies(batch)
    >>> moved = {**batch, "labels": batch["labels"].clone()}  # as by a GPU
    >>> follow_host(moved)
    >>> on_host(moved)["labels"] is batch["labels"]
    True
    >>> moved["labels"] += 1
    >>> on_host(moved)["labels"] is moved["labels"]
    True
    """
    copies = inputs.get(HOST)
    return copies.of(inputs) if isinstance(copies, HostCopies) else inputs


def _is_integer(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_floating_point()
