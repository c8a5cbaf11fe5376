"""Residual networks (ResNet) for CIFAR: three stages, shortcuts without parameters."""

from timm.layers import ConvNormAct
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Classifier


class ZeroPadShortcut(nn.Module):
    """Shortcut of the paper's option A: every second pixel, and zeros for the new channels."""

    def __init__(self, extra_chans: int) -> None:
        super().__init__()
        self.extra_chans = extra_chans

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[batch, c, h, w]` to `[batch, c + extra_chans, h / 2, w / 2]`, halves rounded up."""
        return F.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra_chans))


def make_resnet(
    *,
    depth: int = 20,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
    width: int = 16,
    drop_rate: float = 0.0,
) -> Classifier:
    """CIFAR ResNet of `depth = 6n + 2` layers: stages of `width`, 2 and 4 times `width` channels.

    Shortcuts are the paper's option A (zero padding), so they add no parameters.

    Args:
        depth: Number of weighted layers, `6n + 2`: 8, 20, 32, 56, ...
        num_classes: Number of classes.
        in_chans: Channels of the inputs `[batch, in_chans, height, width]`.
        img_size: Size of the inputs, ignored: any will do. All networks here accept it.
        width: Channels of the first stage.
        drop_rate: Dropout rate before the classifier.

    Raises:
        ValueError: A depth that is not `6n + 2`, or a width below 1.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2,
        https://arxiv.org/abs/1512.03385

    >>> import torch
    >>> make_resnet(depth=8, width=4)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    blocks: list[nn.Module] = [ConvNormAct(in_chans, width, 3)]
    chans = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            halve = stage > 0 and block == 0
            out_chans = width * 2**stage
            shortcut = ZeroPadShortcut(out_chans - chans) if halve else None
            blocks.append(BasicBlock(chans, out_chans, 2 if halve else 1, shortcut))
            chans = out_chans
    return Classifier(
        nn.Sequential(*blocks),
        chans,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )
