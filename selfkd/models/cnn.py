"""Small convolutional network for quick experiments on small images."""

from timm.layers import ConvNormAct
from torch import nn

from .classifier import Classifier


def make_cnn(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
    width: int = 32,
    drop_rate: float = 0.0,
) -> Classifier:
    """CNN of three 3x3 convolutions of 1, 2 and 4 times `width` channels, with batch norm.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the inputs `[batch, in_chans, height, width]`.
        img_size: Size of the inputs, ignored: any from 4x4 will do. All networks here accept it.
        width: Channels of the first convolution.
        drop_rate: Dropout rate before the classifier.

    Raises:
        ValueError: A width below 1.

    >>> import torch
    >>> make_cnn(width=4, in_chans=1)(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    features = nn.Sequential(
        ConvNormAct(in_chans, width, 3),
        nn.MaxPool2d(2),
        ConvNormAct(width, 2 * width, 3),
        nn.MaxPool2d(2),
        ConvNormAct(2 * width, 4 * width, 3),
    )
    return Classifier(
        features, 4 * width, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )
