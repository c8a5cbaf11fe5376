"""Multilayer perceptron, as in the first distillation experiments on MNIST."""

import math

from timm.layers import to_2tuple
from torch import nn

from .classifier import Classifier


def make_mlp(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int | tuple[int, int] = 28,
    width: int = 800,
    depth: int = 2,
    drop_rate: float = 0.0,
    input_drop_rate: float = 0.0,
) -> Classifier:
    """Multilayer perceptron of `depth` hidden layers of `width` ReLU units on the flattened image.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the inputs `[batch, in_chans, height, width]`; or, with an `img_size`
            of 1, features of inputs `[batch, in_chans]`.
        img_size: Height and width of the inputs.
        width: Units of a hidden layer.
        depth: Number of hidden layers; 0 is multinomial logistic regression.
        drop_rate: Dropout rate after each hidden layer.
        input_drop_rate: Dropout rate on the pixels.

    Raises:
        ValueError: A width below 1 or a depth below 0.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531 (student 2x800, teacher 2x1200 with dropout).

    >>> import torch
    >>> make_mlp(width=32, depth=1)(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    >>> make_mlp(width=32, in_chans=4, img_size=1)(torch.zeros(5, 4)).shape
    torch.Size([5, 10])
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if depth < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    units = in_chans * math.prod(to_2tuple(img_size))
    layers: list[nn.Module] = [nn.Flatten(), nn.Dropout(input_drop_rate)]
    for _ in range(depth):
        layers += [nn.Linear(units, width), nn.ReLU(), nn.Dropout(drop_rate)]
        units = width
    return Classifier(
        nn.Sequential(*layers), units, num_classes=num_classes, in_chans=in_chans, global_pool=""
    )
