"""Registration of the reference networks with timm, and `make_model` for any timm model name."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

from .classifier import Classifier
from .cnn import make_cnn
from .densenet import make_densenet
from .mlp import make_mlp
from .resnet import make_resnet
from .wide_resnet import make_wide_resnet

BUILDERS: dict[str, Callable[..., Classifier]] = {
    "selfkd_mlp": make_mlp,
    "selfkd_cnn": make_cnn,
    "selfkd_resnet8": partial(make_resnet, depth=8),
    "selfkd_resnet20": partial(make_resnet, depth=20),
    "selfkd_resnet32": partial(make_resnet, depth=32),
    "selfkd_resnet56": partial(make_resnet, depth=56),
    "selfkd_preresnet20": partial(make_wide_resnet, depth=22, k=1),  # 22 counts two 1x1 shortcuts
    "selfkd_wrn28": make_wide_resnet,
    "selfkd_densenet": make_densenet,
}
"""Functions that make the reference networks, by name."""

default_cfgs: dict[str, dict[str, object]] = {
    name: {
        "input_size": (1, 28, 28) if name == "selfkd_mlp" else (3, 32, 32),
        "num_classes": 10,
        "mean": (0.0,) if name == "selfkd_mlp" else (0.0, 0.0, 0.0),
        "std": (1.0,) if name == "selfkd_mlp" else (1.0, 1.0, 1.0),
        "classifier": "head.fc",
    }
    for name in BUILDERS
}
"""Configurations of the reference networks for timm, without pretrained weights."""


def make_model(
    name: str,
    args: Mapping[str, object] | None = None,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
) -> nn.Module:
    """Make a network by its name in timm's registry, the reference networks included.

    It is initialised with torch's global generator: call `torch.manual_seed` before. Nothing is
    downloaded unless `args` has `pretrained`.

    Args:
        name: Name of a timm model, such as `resnet18` or `resnet50.a1_in1k`, or one of
            `selfkd_mlp`, `selfkd_cnn`, `selfkd_resnet8` (20, 32, 56), `selfkd_preresnet20`,
            `selfkd_wrn28`, `selfkd_densenet`.
        args: Further keyword arguments of the network, which override those below.
        num_classes: Number of classes.
        in_chans: Channels of the inputs.
        image_size: Height and width of the inputs. Passed to `selfkd_` networks only, as
            `img_size`, because most timm models accept any size; for those that do not, put
            `img_size` in `args`.

    Returns:
        A module from `[batch, in_chans, image_size, image_size]` to logits `[batch, classes]`.

    Raises:
        ValueError: An unknown name, or `args` that the network does not accept.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = make_model("selfkd_mlp", {"width": 64}, num_classes=10, in_chans=1, image_size=8)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    _check_name(name)
    known: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if name in BUILDERS:
        known["img_size"] = image_size
    given = dict(args or {})
    for key in given:
        if key not in known_args(name) | reserved_args():
            close = ", ".join(difflib.get_close_matches(key, known_args(name)))
            raise ValueError(
                f"model.args must be arguments of {name!r}, got {key!r}"
                + (f": did you mean {close}?" if close else "")
            )
    try:
        model: nn.Module = timm.create_model(name, **{**known, **given})
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model.args must suit {name!r}, got {given}: {error}") from error
    return model


@lru_cache(maxsize=64)
def known_args(name: str) -> frozenset[str]:
    """Names of the arguments of a network's class and of its factory function.

    >>> sorted(known_args("selfkd_cnn"))
    ['drop_rate', 'img_size', 'in_chans', 'num_classes', 'width']
    """
    if name in BUILDERS:
        return frozenset(_parameters(BUILDERS[name]))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = timm.create_model(name)  # the registry does not know the class
    factory = timm.model_entrypoint(name.partition(".")[0])
    return frozenset([*_parameters(type(network)), *_parameters(factory)]) - reserved_args()


@lru_cache(maxsize=1)
def reserved_args() -> frozenset[str]:
    """Names of timm's own arguments, for the source and the loading of pretrained weights."""
    return frozenset([*_parameters(timm.create_model), *_parameters(build_model_with_cfg)])


def _parameters(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the names of a function's parameters and of the fields of dataclass parameters."""
    function = function.func if isinstance(function, partial) else function
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield parameter.name
        if dataclasses.is_dataclass(parameter.annotation):
            yield from (field.name for field in dataclasses.fields(parameter.annotation))


def parameters_count(model: nn.Module) -> int:
    """Number of parameters of a model, frozen ones included.

    >>> parameters_count(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _check_name(name: str) -> None:
    if "." not in name and timm.is_model(name):
        return
    names: list[str] = timm.list_models(include_tags="." in name)  # sorts a thousand: 10 ms
    if name in names:
        return
    close = ", ".join(difflib.get_close_matches(name, names))
    hint = f"did you mean {close}?" if close else "timm.list_models() has them all"
    raise ValueError(f"model.name must be a timm model name, got {name!r}: {hint}")


def _register(name: str, build: Callable[..., Classifier]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: object) -> Any:
        return build_model_with_cfg(build, name, pretrained, **kwargs)

    entrypoint.__name__ = name
    globals()[name] = entrypoint  # timm adds the name to this module's __all__
    register_model(entrypoint)


for _name, _build in BUILDERS.items():
    _register(_name, _build)
