"""Networks whose layers have fewer channels than their name says: pruned ones, made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

PRUNED = "pruned"
"""Attribute of such a network, and key of its checkpoint's metadata: the share that was pruned."""
MOST = 100
"""Largest number of times that the weights may be fewer than those of the network of that name."""


def reshape(network: nn.Module, tensors: Mapping[str, Tensor], share: float) -> nn.Module:
    """Cut the layers of a network to the shapes of other tensors, in place; return it.

    The first values of its own weights are kept, as a fresh initialisation.

    Args:
        network: Network as its name says.
        tensors: Tensors of a pruned one, by name.
        share: Share of its channels that was pruned.

    Raises:
        ValueError: They are not those of the network with fewer channels.
    """
    for name, tensor in network.state_dict().items():
        shape = list(tensor.shape)
        new = list(tensors[name].shape) if name in tensors else []
        if len(new) != len(shape) or any(not 0 < a <= b for a, b in zip(new, shape, strict=True)):
            raise ValueError(f"{name} of a pruned network must be at most {shape}, got {new}")
        if new != shape:
            _set(network, name, tensor[tuple(slice(size) for size in new)].clone())
    for module in network.modules():
        _update(module)
    update_attentions(network)
    setattr(network, PRUNED, share)
    return network


def check_size(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that a network is not so much larger than a pruned one that making it is a risk.

    Raises:
        ValueError: It is.
    """
    full = sum(tensor.numel() for tensor in network.state_dict().values())
    left = sum(tensor.numel() for tensor in tensors.values())
    if full > MOST * left:
        raise ValueError(
            f"a pruned network must have at least 1/{MOST} of the {full} weights of the network "
            f"of its name, got {left}"
        )


def pruned_share(network: nn.Module) -> float | None:
    """Return the share of its channels that a network was pruned by; None of any other."""
    share: float | None = getattr(network, PRUNED, None)
    return share


def attention_heads(network: nn.Module) -> dict[nn.Module, int]:
    """Return the number of heads of each layer of queries, keys and values, as timm has them."""
    return {module.qkv: module.num_heads for module in _attentions(network)}


def update_attentions(network: nn.Module) -> None:
    """Make the sizes of the heads those of their weights; their numbers stay."""
    for module in _attentions(network):
        module.attn_dim = len(module.qkv.weight) // 3
        module.head_dim = module.attn_dim // module.num_heads
        module.scale = module.head_dim**-0.5


def _attentions(network: nn.Module) -> Iterator[Any]:
    known = ("num_heads", "head_dim", "attn_dim", "scale")
    for module in network.modules():
        numbers = [getattr(module, key, None) for key in known]
        if isinstance(getattr(module, "qkv", None), nn.Linear) and None not in numbers:
            yield module


def _set(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = network.get_submodule(path)
    if own in module._parameters:
        old = module.get_parameter(own)
        module._parameters[own] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[own] = tensor


def _update(module: nn.Module) -> None:
    """Make the sizes that a layer knows of itself those of its weights."""
    if isinstance(module, _ConvNd):
        outputs, inputs = module.weight.shape[:2]
        if module.transposed:
            outputs, inputs = inputs, outputs
        if module.groups == module.out_channels:  # depthwise
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm) and module.weight is not None:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
