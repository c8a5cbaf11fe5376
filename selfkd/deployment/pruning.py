"""Pruning of whole channels by torch-pruning's dependency graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of layers that must be pruned together, and how important each is."""

    layer: nn.Module
    """Layer whose outputs they are, the first of all."""
    handler: Callable[..., Any]
    """Function of torch-pruning that prunes them there."""
    importance: Tensor
    """Importance `[channels]` of each, with a mean of 1 (0 where all its weights are)."""
    members: tuple[tuple[nn.Module, bool], ...]
    """Layers that are pruned with it, and whether it is their outputs."""


class Graph:
    """Dependency graph of a network, whose channels it prunes in place.

    Args:
        network: Network to prune.
        example: Inputs that it is traced with.
        whole: Layers whose outputs are left whole, the classifier among them.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
        https://arxiv.org/abs/2301.12900
    """

    def __init__(
        self, network: nn.Module, example: Tensor, *, whole: Collection[nn.Module]
    ) -> None:
        import torch_pruning as tp

        check_finite(network)
        self.network = network.eval()
        self.names = {module: name for name, module in network.named_modules()}
        with _quiet(), torch.enable_grad():
            self._graph = tp.DependencyGraph().build_dependency(
                network, example_inputs=example, verbose=False
            )
            self._groups = list(self._graph.get_all_groups(ignored_layers=list(whole)))

    def groups(self) -> Iterator[Group]:
        """Yield the groups of channels that can be pruned, in the order of the layers.

        The importance of a channel is the sum of the squares of its weights, those of batch norm
        and of the layers that read it included, as a mean over these layers.
        """
        import torch_pruning as tp

        importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
        for group in self._groups:
            found = importance(group)
            first = group[0].dep
            yield Group(
                layer=first.target.module,
                handler=first.handler,
                importance=found / found.mean() if found.mean() > 0 else found,
                members=tuple(
                    (dep.target.module, self._graph.is_out_channel_pruning_fn(dep.handler))
                    for dep, _ in group
                ),
            )

    @torch.no_grad()
    def keep(self, group: Group, kept: Sequence[int]) -> None:
        """Prune all channels of a group but some.

        Args:
            group: Group as it was before anything was pruned.
            kept: Numbers of the channels that stay.
        """
        gone = sorted({*range(len(group.importance))} - {*kept})
        if gone:
            self._graph.get_pruning_group(group.layer, group.handler, gone).prune()


def most_important(importance: Tensor, count: int) -> list[int]:
    """Return the numbers of the most important channels, in order; of equal ones the first.

    >>> most_important(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2)
    [1, 3]
    """
    order = importance.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def check_finite(network: nn.Module) -> None:
    """Check that all weights are numbers.

    Raises:
        ValueError: One is not; names it.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"weights must be finite to be pruned, got NaN or infinity in {name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of torch-pruning."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
