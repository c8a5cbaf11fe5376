"""Densely connected networks (DenseNet) for CIFAR, as in the born-again paper."""

import torch
from timm.layers import BatchNormAct2d
from timm.models.densenet import DenseTransition
from torch import Tensor, nn

from .classifier import Classifier


class DenseLayer(nn.Module):
    """Layer of a dense block: appends `growth_rate` channels to its input.

    With `bottleneck`, a 1x1 convolution to `4 * growth_rate` channels precedes the 3x3 one.
    """

    def __init__(
        self, in_chans: int, growth_rate: int, *, bottleneck: bool, drop_rate: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            layers += [
                BatchNormAct2d(in_chans),
                nn.Conv2d(in_chans, 4 * growth_rate, 1, bias=False),
            ]
            in_chans = 4 * growth_rate
        self.layers = nn.Sequential(
            *layers,
            BatchNormAct2d(in_chans),
            nn.Conv2d(in_chans, growth_rate, 3, padding=1, bias=False),
            nn.Dropout(drop_rate),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[batch, in_chans, h, w]` to `[batch, in_chans + growth_rate, h, w]`."""
        return torch.cat([inputs, self.layers(inputs)], dim=1)


def make_densenet(
    *,
    depth: int = 100,
    growth_rate: int = 12,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
    drop_rate: float = 0.0,
) -> Classifier:
    """DenseNet-`depth`-`growth_rate` of three dense blocks; DenseNet-BC by default.

    Each block has `(depth - 4) // 3` layers, half of that with bottlenecks, rounded down.

    Args:
        depth: Number of weighted layers, `6n + 4` with bottlenecks, else `3n + 4`; a number between
            two of these is rounded down.
        growth_rate: Channels that each layer adds (`k`).
        bottleneck: Whether a 1x1 convolution precedes each 3x3 one (the B of BC).
        compression: Share of channels that a transition keeps, in (0, 1] (below 1: the C of BC).
        num_classes: Number of classes.
        in_chans: Channels of the inputs `[batch, in_chans, height, width]`.
        img_size: Size of the inputs, ignored: any from 4x4 will do. All networks here accept it.
        drop_rate: Dropout rate after each 3x3 convolution (0.2 in the paper, without augmentation).

    Raises:
        ValueError: A depth too small for one layer a block, a growth rate below 1, or a
            compression outside (0, 1].

    References:
        Huang et al., "Densely Connected Convolutional Networks", 2017,
        https://arxiv.org/abs/1608.06993;
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770

    >>> import torch
    >>> make_densenet(depth=10, growth_rate=4)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """
    layers = (depth - 4) // (6 if bottleneck else 3)
    if layers < 1:
        raise ValueError(f"depth must be at least {10 if bottleneck else 7}, got {depth}")
    if growth_rate < 1:
        raise ValueError(f"growth_rate must be at least 1, got {growth_rate}")
    if not 0 < compression <= 1:
        raise ValueError(f"compression must be in (0, 1], got {compression}")
    chans = 2 * growth_rate if bottleneck and compression < 1 else 16
    modules: list[nn.Module] = [nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)]
    for block in range(3):
        if block > 0:
            out_chans = int(chans * compression)
            modules.append(DenseTransition(chans, out_chans))
            chans = out_chans
        for _ in range(layers):
            modules.append(
                DenseLayer(chans, growth_rate, bottleneck=bottleneck, drop_rate=drop_rate)
            )
            chans += growth_rate
    modules.append(BatchNormAct2d(chans))
    return Classifier(nn.Sequential(*modules), chans, num_classes=num_classes, in_chans=in_chans)
