"""Checks of augmentation: what views cannot go with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from selfkd.config.schema import (
    ARRAYS,
    AUGMENTED_VIEWS,
    AugmentConfig,
    Config,
    choices_of_terms,
)
from selfkd.distill.loss_names import LOSSES
from selfkd.errors import ConfigError

_OF_LABELS = {
    "confidence": "weights the cross-entropy with one label an image",
    "virtual": "is made of one label an image",
    "class_mean": "is of one label an image",
}
"""Transforms of teacher logits that mixed images do not go with, and why."""
_CONTROLS = {"cwtm": "confidence", "teacher_free": "virtual", "class_mean": "class_mean"}


def augment_faults(config: Config, *, distils: bool) -> Iterator[tuple[str, str]]:
    """Yield keys and faults of the views of a config.

    Args:
        config: Config to check, or that of an arm of a study.
        distils: Whether students with teachers are trained.
    """
    data = config.data
    if data.name == ARRAYS or config.task == "text":  # neither has views, as other checks say
        return
    if data.views == "fresh" and distils and config.reads_cache:
        yield (
            "data.views",
            "must be a number where teacher logits are cached, got fresh: set distill.live=true, "
            "which runs the teacher at each step, or data.views=N, whose logits take N times the "
            "space",
        )
    if data.test_size is not None and data.transfer is not None:
        yield (
            "data.test_size",
            f"must be left out with data.transfer, whose images are compared with those of test, "
            f"got {data.test_size}",
        )
    if data.flip and data.augment.flip is False:
        yield (
            "data.augment.flip",
            "must be true with data.flip true, got False: set data.flip=false",
        )
    yield from _repeats_faults(config)
    yield from _idle_faults(data.augment)
    if not data.augment.mixes:
        return
    for control in config.controls:
        if why := _CONTROLS.get(control):
            yield "controls", f"{control} {_OF_LABELS[why]}: {_WAY}"
    if name := _named(config, labels=True):
        yield "distill.terms", f"must be without {name}, which has one label an image: {_WAY}"


def check_views(config: Config) -> None:
    """Check that the views of a config go with students of teachers.

    Raises:
        ConfigError: With every fault.
    """
    faults = [f"{key}: {fault}" for key, fault in augment_faults(config, distils=True)]
    if faults:
        raise ConfigError("\n".join(faults))


def transform_fault(config: Config, transform: str) -> str | None:
    """Return why a transform of teacher logits cannot go with the views of a config, if so."""
    if not config.data.augment.mixes or transform not in _OF_LABELS:
        return None
    return f"{_OF_LABELS[transform]}: {_WAY}"


_WAY = "leave it out, or set data.augment.mixup and data.augment.cutmix to 0"


def _repeats_faults(config: Config) -> Iterator[tuple[str, str]]:
    data, repeats = config.data, config.data.repeats
    if repeats == 1:
        return
    if not is_augmented(config):
        yield "data.repeats", f"must be 1 without augmentation, got {repeats}: set data.augment"
    views = AUGMENTED_VIEWS if data.views is None else data.views
    if isinstance(views, int) and views < repeats:
        default = ", the number when not given" if data.views is None else ""
        yield "data.repeats", f"must be at most data.views ({views}{default}), got {repeats}"
    if config.train.batch_size % repeats:
        size = config.train.batch_size
        yield "train.batch_size", f"must be a multiple of data.repeats ({repeats}), got {size}"
    if config.transfer is not None:
        yield "data.repeats", f"must be 1 with data.transfer, got {repeats}"
    if name := _named(config, labels=False):
        yield "distill.terms", f"must be without {name}, which has each image once, with repeats"


def _idle_faults(augment: AugmentConfig) -> Iterator[tuple[str, str]]:
    """Yield faults of keys that say how to do what is not done."""
    default, way = AugmentConfig(), "set data.augment.operations=randaugment, or leave it out"
    for key in ("count", "magnitude"):
        value = getattr(augment, key)
        if value != getattr(default, key) and augment.value("operations") != "randaugment":
            yield f"data.augment.{key}", f"must be of operations randaugment, got {value}: {way}"
    share = augment.mix_probability
    if share and not (augment.value("mixup") or augment.value("cutmix")):
        way = "set data.augment.mixup or data.augment.cutmix, or leave it out"
        yield (
            "data.augment.mix_probability",
            f"must be of images that are mixed, got {share}: {way}",
        )


def is_augmented(config: Config) -> bool:
    """Say whether views of an image differ."""
    data = config.data
    further = data.augment
    known = data.flip or data.jitter or data.crop not in (None, 1)
    shape = further.preset != "none" or further.flip or further.value("operations") != "none"
    return bool(known or shape or further.color or further.hue or further.value("erase")) or (
        further.mixes
    )


def _named(config: Config, *, labels: bool) -> str | None:
    """Return a term of the loss that has an embedding an image, or takes its label."""
    named = {name for name, loss in LOSSES.items() if loss.memory or (labels and loss.labels)}
    found = [
        str(term.get("name"))
        for terms in choices_of_terms(config)
        for term in terms
        if isinstance(term, Mapping)
    ]
    return next((name for name in found if name in named), None)
