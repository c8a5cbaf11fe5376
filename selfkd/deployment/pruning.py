"""Pruning of whole channels by torch-pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.deployment.quiet import quiet
from selfkd.deployment.reshape import attention_heads, update_attentions
from selfkd.deployment.weights import check_finite

EPSILON = 1e-9
"""Share that rounding errors may make of a channel."""
FEW = 4
"""Number of layers that are named."""


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
        with quiet(), torch.enable_grad():
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


def prune_channels(network: nn.Module, example: Tensor, share: float) -> list[str]:
    """Prune a share of the channels of each layer of any network, in place.

    In a grouped convolution as many go in each group, in an attention as many in each head. The
    classifier's outputs are left whole, and so is `nn.MultiheadAttention`.

    Args:
        network: Network to prune, on the CPU.
        example: Inputs of two items that it is traced with.
        share: Share that is pruned, in (0, 1), rounded up to whole channels.

    Returns:
        Remarks on what was rounded or left whole.

    Raises:
        ValueError: A weight is not finite, a layer would be emptied, or torch-pruning does not
            understand the network.
    """
    import torch_pruning as tp

    check_finite(network)
    network.eval()
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    heads = attention_heads(network)
    before = {name: _describe(layer, heads) for name, layer in layers.items()}
    outputs = classifiers(network, example)
    others = [m for m in network.modules() if isinstance(m, nn.MultiheadAttention)]
    with torch.no_grad():
        wanted = network(example).shape
    try:
        with quiet(), torch.enable_grad():
            pruner = tp.pruner.BasePruner(
                network,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=share - EPSILON,
                ignored_layers=[*outputs, *others],
                root_module_types=[nn.Conv2d, nn.Linear],
                num_heads=dict(heads),
                in_channel_groups={},  # its defaults are shared between pruners
                out_channel_groups={},
            )
            pruner.step()
        update_attentions(network)
        with torch.no_grad():
            found = network(example).shape
    except Exception as error:  # noqa: BLE001  (of the network's own code as well)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        name = type(network).__name__
        raise ValueError(f"--prune: torch-pruning cannot prune {name}: {first}") from None
    if found != wanted:
        raise ValueError(f"--prune must leave logits {list(wanted)} whole, got {list(found)}")
    inner = {n: layer for n, layer in layers.items() if layer not in outputs}
    return list(_remarks(inner, before, [n for n in inner if layers[n] in heads], share))


def _describe(layer: nn.Conv2d | nn.Linear, heads: Mapping[nn.Module, int]) -> tuple[int, int]:
    """Return the number of a layer's outputs, and that of the groups which lose as many each."""
    outputs = len(layer.weight)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 3 * heads.get(layer, 0) or 1
    return outputs, 1 if groups == outputs else groups  # depthwise: each goes with its input


def _remarks(
    layers: Mapping[str, nn.Conv2d | nn.Linear],
    before: Mapping[str, tuple[int, int]],
    attentions: Sequence[str],
    share: float,
) -> Iterator[str]:
    """Yield what became of layers; raise where a share leaves nothing of one."""
    whole, grouped, shares = list[str](), list[str](), set[float]()
    for name, layer in layers.items():
        old, groups = before[name]
        new, size = len(layer.weight), old // groups
        if old == new and size > 1 and int(size * (1 - share + EPSILON)) < 1:
            raise ValueError(
                f"--prune must leave a channel of {name}, which has {size}"
                + (f" in each of {groups} groups" if groups > 1 else "")
                + f": at most {1 - 1 / size:.4g}, got {share:g}"
            )
        if old == new:
            whole.append(name)
            continue
        shares.add(1 - new / old)
        if groups > 1 and name not in attentions:
            grouped.append(name)
    if not shares:
        raise ValueError("--prune must have a layer to prune, and torch-pruning finds none")
    if max(shares) - min(shares) > EPSILON or abs(max(shares) - share) > EPSILON:
        low, high = min(shares), max(shares)
        yield f"--prune {share:g} is rounded to whole channels: {low:.3g} to {high:.3g} of a layer"
    if grouped:
        yield f"grouped convolutions lose as many channels in each group: {_few(grouped)}"
    if found := [name for name in attentions if name not in whole]:
        yield f"all attention heads stay, with fewer dimensions each: {_few(found)}"
    if whole:
        yield f"left whole: {_few(whole)}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def classifiers(network: nn.Module, example: Tensor) -> list[nn.Module]:
    """Return the layers whose outputs are the logits: the last one, and timm's classifiers."""
    called = list[nn.Module]()
    hooks = [
        module.register_forward_hook(lambda layer, *_: called.append(layer))
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    found: Any = getattr(network, "get_classifier", list)()
    known = found if isinstance(found, list | tuple) else [found]
    return list(dict.fromkeys([*called[-1:], *known]))


def most_important(importance: Tensor, count: int) -> list[int]:
    """Return the numbers of the most important channels, in order; of equal ones the first.

    >>> most_important(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2)
    [1, 3]
    """
    order = importance.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())
