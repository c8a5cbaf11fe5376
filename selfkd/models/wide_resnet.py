"""Wide residual networks (WRN) for CIFAR, with dropout inside the blocks."""

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .classifier import Classifier


class PreActBlock(nn.Module):
    """Residual block with batch norm and ReLU before each of two 3x3 convolutions.

    Dropout is applied between them. A shortcut that changes shape is a 1x1 convolution of the
    activated input.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = BatchNormAct2d(in_chans)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.norm2 = BatchNormAct2d(out_chans)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)
        self.shortcut = (
            None
            if in_chans == out_chans and stride == 1
            else nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[batch, in_chans, h, w]` to `[batch, out_chans, h / stride, w / stride]`."""
        active = self.norm1(inputs)
        shortcut = inputs if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.drop(self.norm2(self.conv1(active))))
        return residual + shortcut


def make_wide_resnet(
    *,
    depth: int = 28,
    k: int = 10,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
    drop_rate: float = 0.0,
) -> Classifier:
    """WRN-`depth`-`k`: stages of `16k`, `32k` and `64k` channels, `depth = 6n + 4` layers.

    Args:
        depth: Number of convolutions in the longest path, `6n + 4`: 10, 16, 22, 28, 40, ...
        k: Widening factor.
        num_classes: Number of classes.
        in_chans: Channels of the inputs `[batch, in_chans, height, width]`.
        img_size: Size of the inputs, ignored: any will do. All networks here accept it.
        drop_rate: Dropout rate between the two convolutions of a block (0.3 or 0 in the paper).

    Raises:
        ValueError: A depth that is not `6n + 4`, or a widening factor below 1.

    Reference:
        Zagoruyko, Komodakis, "Wide Residual Networks", 2016, https://arxiv.org/abs/1605.07146

    >>> import torch
    >>> make_wide_resnet(depth=10, k=1)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    blocks: list[nn.Module] = [nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)]
    chans = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(PreActBlock(chans, 16 * k * 2**stage, stride, drop_rate))
            chans = 16 * k * 2**stage
    blocks.append(BatchNormAct2d(chans))
    return Classifier(nn.Sequential(*blocks), chans, num_classes=num_classes, in_chans=in_chans)
