"""Reference networks for small images, registered with timm when this package is imported.

selfkd_mlp        flatten, `depth` hidden layers of `width` units
selfkd_cnn        three convolutions with batch norm
selfkd_resnet8    CIFAR ResNet; also selfkd_resnet20, selfkd_resnet32, selfkd_resnet56
selfkd_preresnet20   the same with norm and activation first: WRN-22-1, whose depth counts shortcuts
selfkd_wrn28      WRN-28-10; `depth` and `k` make any other
selfkd_densenet   DenseNet-BC-100-12; `depth` and `growth_rate` make any other
"""

from .cnn import make_cnn as make_cnn
from .densenet import make_densenet as make_densenet
from .mlp import make_mlp as make_mlp
from .registry import known_args as known_args
from .registry import make_model as make_model
from .registry import parameters_count as parameters_count
from .registry import reserved_args as reserved_args
from .resnet import make_resnet as make_resnet
from .wide_resnet import make_wide_resnet as make_wide_resnet
