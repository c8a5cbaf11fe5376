"""Settings that decide the speed of a step and its rounding: their defaults, by device and network.

The driver resolves them once, into the run's config.yaml, so that every worker computes the same
bits. `python tests/benchmarks/step.py --table` measures what the table is made from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from selfkd.config.schema import Config, ModelConfig, flat
from selfkd.config.tasks import FUSED, values_of

Kind = Literal["mlp", "convolutional", "transformer", "text", "other"]
"""Kind of a network: what takes the time of its step."""
SPEED_KEYS = ("channels_last", "fused")
"""Settings of `train` that the table has defaults of."""
_CONVOLUTIONAL = re.compile(
    r"selfkd_|(wide_|pre|se|legacy_se|sk|ec|tv_|gc|gluon_)?res(ne[txs]|net)|resnet|densenet|vgg|repvgg|"
    r"(tf_)?(efficientnet|mobilenet|mixnet)|mnasnet|regnet|convnext|dla|hrnet|inception|xception|"
    r"ghostnet|dpn|nfnet|cspresnet|cspdarknet|darknet|rexnet|spnasnet|fbnet|hardcorenas|selecsls"
)
_TRANSFORMER = re.compile(
    r"hf$|vit_|deit|beit|swin|eva|cait|xcit|volo|tnt|twins|pvt|crossvit|flexivit|samvit|hiera"
)


class Speed(NamedTuple):
    """Values of the settings."""

    channels_last: bool
    fused: bool


TABLE: Mapping[tuple[str, Kind], Speed] = {
    ("cpu", "mlp"): Speed(channels_last=False, fused=True),
    ("cpu", "convolutional"): Speed(channels_last=True, fused=True),
    ("cpu", "transformer"): Speed(channels_last=False, fused=True),
    ("cpu", "text"): Speed(channels_last=False, fused=False),  # 1 to 2 % of a step
    ("cpu", "other"): Speed(channels_last=False, fused=True),
    ("cuda", "mlp"): Speed(channels_last=False, fused=True),
    ("cuda", "convolutional"): Speed(channels_last=True, fused=True),
    ("cuda", "transformer"): Speed(channels_last=False, fused=True),
    ("cuda", "text"): Speed(channels_last=False, fused=True),
    ("cuda", "other"): Speed(channels_last=False, fused=True),
}
"""Defaults by device and kind of network."""


def kind_of(model: ModelConfig, task: str = "images") -> Kind:
    """Return the kind of a network, by its name: the driver makes none.

    Args:
        model: Network.
        task: Task that it is of.

    >>> names = ("selfkd_mlp", "resnet18.a1_in1k", "vit_tiny_patch16_224", "maxvit_tiny_rw_224")
    >>> [kind_of(ModelConfig(name=name)) for name in names]
    ['mlp', 'convolutional', 'transformer', 'other']
    """
    if task == "text":
        return "text"
    if model.name == "selfkd_mlp":
        return "mlp"
    if _TRANSFORMER.match(model.name):
        return "transformer"
    return "convolutional" if _CONVOLUTIONAL.match(model.name) else "other"


def with_speed(config: Config, stored: Config | None = None) -> Config:
    """Return a config whose settings of speed are values: those of the table where none is given.

    Of several networks, channels are last where one is convolutional; the others train as they
    would without. An optimiser that has no fused step gets none.

    Args:
        config: Config of a run.
        stored: Config that the run was started with, whose values take the place of the table's,
            and of what workers decide.

    >>> train = with_speed(Config()).train
    >>> train.channels_last, train.fused
    (True, True)
    """
    train = config.train
    absent = [key for key in SPEED_KEYS if getattr(train, key) is None]
    if stored is not None:
        absent += ["amp"] if train.amp == "auto" else []
        absent += ["tf32"] if train.tf32 is None else []
    if not absent:
        return config
    source = of_table(config) if stored is None else flat(stored)
    values = {key: source[f"train.{key}"] for key in absent}
    new: Any = values
    return dataclasses.replace(config, train=dataclasses.replace(train, **new))


def of_table(config: Config) -> dict[str, bool]:
    """Return the settings of speed that a run has where none is given, by dotted key."""
    device = "cuda" if config.resources.gpu > 0 else "cpu"
    models = (config.model, *config.students, *config.members.models)
    found = [TABLE[device, kind_of(model, config.task)] for model in models]
    fused = all(name in FUSED for name in values_of(config, "train.optimizer", arms=True))
    return {
        "train.channels_last": any(own.channels_last for own in found),
        "train.fused": fused and all(own.fused for own in found),
    }
