"""Pruning of selfkd's own networks, each to the named network of a smaller width."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from selfkd.config import ModelConfig
from selfkd.deployment.pruning import Graph, Group, most_important
from selfkd.models.registry import BUILDERS
from selfkd.models.resnet import ZeroPadShortcut

WIDTHS = {"selfkd_densenet": "growth_rate", "selfkd_wrn28": "k", "selfkd_preresnet20": "k"}
"""Argument that sets the number of channels, where it is not `width`."""


@dataclass(frozen=True)
class Narrower:
    """The named network that pruning leads to."""

    model: ModelConfig
    remarks: tuple[str, ...] = ()
    """What was rounded, in words."""


def narrower(model: ModelConfig, share: float) -> Narrower:
    """Return the named network that is left when a share of the channels of another is pruned.

    Args:
        model: One of selfkd's own networks.
        share: Share that is pruned, in (0, 1), rounded to the nearest width.

    Raises:
        ValueError: No width below its own is left, or none of its layers can be pruned.

    >>> narrower(ModelConfig(name="selfkd_cnn", args={"width": 8}), 0.3).model.args
    {'width': 6}
    """
    key = WIDTHS.get(model.name, "width")
    parameters = inspect.signature(BUILDERS[model.name]).parameters
    width = model.args.get(key, parameters[key].default)
    named = f"{model.name} of {key} {width}"
    if model.name == "selfkd_mlp" and model.args.get("depth", parameters["depth"].default) == 0:
        raise ValueError(f"--prune must have a hidden layer to prune, got {model.name} of depth 0")
    # a WRN of k 1 is another network: its first stage has no convolution on its shortcut
    least = 2 if key == "k" else 1
    layer, channels = _narrowest(model.name, width)
    if width <= least:
        raise ValueError(
            f"--prune cannot be had of {named}, the narrowest that it can lead to: its layer "
            f"{layer} has {channels} channels"
        )
    left = math.floor(width * (1 - share) + 0.5)
    if not least <= left < width:
        raise ValueError(
            f"--prune must be in [{1 / width:.4g}, {1 - least / width:.4g}] for {named}, which "
            f"would keep {channels * left // width} of the {channels} channels of {layer}, got "
            f"{share:g}"
        )
    remarks: tuple[str, ...] = ()
    if not math.isclose(left, width * (1 - share)):
        said = f"{left} of {width}" + ("" if key == "k" else " channels")
        remarks = (f"--prune {share:g} of {key} {width} is rounded to {said}",)
    return Narrower(ModelConfig(name=model.name, args={**model.args, key: left}), remarks)


def _narrowest(name: str, width: int) -> tuple[str, int]:
    """Return the name and the channels of the narrowest layer that is pruned."""
    layers = {
        "selfkd_mlp": ("features.2", width),
        "selfkd_densenet": ("features.1.layers", width),
        "selfkd_wrn28": ("features.1.conv1", 16 * width),
        "selfkd_preresnet20": ("features.1.conv1", 16 * width),
    }
    return layers.get(name, ("features.0.conv", width))


def prune_to(network: nn.Module, target: nn.Module, example: Tensor) -> nn.Module:
    """Prune one of selfkd's networks to the widths of another, and load the weights into that.

    Which channels stay is chosen by importance, as in `Graph.groups`. Stages of a CIFAR ResNet,
    whose shortcuts put zeros behind the old channels, share them: a channel of the first stage is
    kept or pruned in all, by the sum of its importance there, and later stages choose among the new
    ones alone.

    Args:
        network: Network to prune, left as it is.
        target: Network of the same name and a smaller width, whose weights are replaced.
        example: Inputs that the network is traced with.

    Returns:
        The pruned network, which computes bit for bit what `target` does.

    Raises:
        ValueError: A weight is not finite.
    """
    pruned = deepcopy(network).cpu()
    shortcuts = _replace_shortcuts(pruned)
    graph = Graph(pruned, example.cpu(), whole=[pruned.get_submodule("head.fc")])
    groups = list(graph.groups())
    chain = _chain(groups, list(shortcuts))
    for group in groups:
        if group not in chain:
            graph.keep(group, most_important(group.importance, _size(group, graph, target)))
    kept, old = list[int](), 0
    for number, group in enumerate(chain):
        size = len(group.importance)
        shared = torch.stack([each.importance[old:size] for each in chain[number:]])
        new = most_important(shared.sum(dim=0), _size(group, graph, target) - len(kept))
        kept += [old + channel for channel in new]
        graph.keep(group, kept)
        old = size
    for shortcut, block in shortcuts.items():
        block.downsample = ZeroPadShortcut(shortcut.out_channels - shortcut.in_channels)
    target.load_state_dict(pruned.state_dict())
    return pruned


def _replace_shortcuts(network: nn.Module) -> dict[nn.Conv2d, nn.Module]:
    """Put convolutions in place of shortcuts whose zeros the graph does not see; return them.

    Their weights are zero, so that they count nothing towards the importance of a channel.
    """
    found = {}
    for block in [*network.modules()]:
        if isinstance(block, BasicBlock) and isinstance(block.downsample, ZeroPadShortcut):
            channels, width = block.conv1.in_channels, block.conv2.out_channels
            block.downsample = nn.Conv2d(channels, width, 1, 2, bias=False)
            nn.init.zeros_(block.downsample.weight)
            found[block.downsample] = block
    return found


def _chain(groups: Sequence[Group], shortcuts: Sequence[nn.Module]) -> list[Group]:
    """Return the groups of stages that zero-padded shortcuts link, the first stage first."""
    inputs = [(shortcut, False) for shortcut in shortcuts]
    outputs = [(shortcut, True) for shortcut in shortcuts[-1:]]
    return [
        next(group for group in groups if member in group.members) for member in inputs + outputs
    ]


def _size(group: Group, graph: Graph, target: nn.Module) -> int:
    """Return the number of a group's channels in a network of another width."""
    for layer, outputs in group.members:
        if outputs and isinstance(layer, nn.Conv2d | nn.Linear):
            there = target.get_submodule(graph.names[layer])
            if isinstance(there, nn.Conv2d | nn.Linear):
                return len(there.weight)
    raise AssertionError(f"no layer has the channels of {graph.names[group.layer]}")
