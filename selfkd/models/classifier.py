"""Base module of the reference networks: features, then timm's classification head."""

from timm.layers import ClassifierHead
from torch import Tensor, nn


class Classifier(nn.Module):
    """Features and a linear classifier, with the attributes and methods of timm's models.

    Convolutions are initialised from He et al.'s normal distribution (fan out), all other layers by
    torch's defaults, with torch's global generator: call `torch.manual_seed` before.

    Args:
        features: Module from inputs to feature maps `[batch, num_features, height, width]`, or to
            `[batch, num_features]` with `global_pool=""`.
        num_features: Number of channels or features that `features` returns.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the inputs.
        drop_rate: Dropout rate before the classifier.
        global_pool: Name of the pooling in timm; `""` for none.

    Reference:
        He et al., "Delving Deep into Rectifiers", 2015, https://arxiv.org/abs/1502.01852

    >>> import torch
    >>> model = Classifier(nn.Conv2d(3, 8, 3), 8, num_classes=10, in_chans=3)
    >>> model(torch.zeros(2, 3, 6, 6)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        *,
        num_classes: int,
        in_chans: int,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.features = features
        self.head: nn.Module = ClassifierHead(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, inputs: Tensor) -> Tensor:
        """Features of the inputs, before pooling and classifier."""
        features: Tensor = self.features(inputs)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[batch, classes]`, or the pooled features with `pre_logits`."""
        outputs: Tensor = self.head(features, pre_logits=pre_logits)
        return outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[batch, classes]`."""
        return self.forward_head(self.forward_features(inputs))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` classes; 0 leaves it out."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)  # type: ignore[operator]
