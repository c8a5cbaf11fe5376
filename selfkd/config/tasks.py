"""Keys that one task alone has, and checks across the settings of language models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from selfkd.config.schema import (
    HF,
    OF_ALL_LOGITS,
    AugmentConfig,
    Config,
    choices_of_terms,
    flat,
    from_tree,
    locate_key,
    without_default_temperature,
)
from selfkd.config.space import Distribution

OF_TASK = {
    "images": (
        *("data.download", "data.classes", "data.label_noise", "data.image_size"),
        *("data.in_memory", "data.crop", "data.flip", "data.jitter", "data.views"),
        *(f"data.augment.{key.name}" for key in fields(AugmentConfig)),
        *("data.repeats", "data.test_size"),
        *("train.warmup_epochs", "train.momentum", "deploy.prune"),
    ),
    "text": (
        *("data.context", "data.tokenizer", "data.rationales", "data.rationale_weight"),
        *("train.steps", "train.warmup_steps", "train.accumulate", "targets.samples"),
        *("distill.mode", "distill.on_policy", "distill.divergence"),
        *(f"write.{key}" for key in ("temperature", "top_p", "samples", "keep", "seed")),
    ),
}
"""Keys of one task alone."""
_NAMES_OF_TEXT = {
    "data.name": ("pydoc", "docstrings", "arithmetic", "text"),
    "model.name": ("selfkd_gpt", HF),
}
"""Data sets and models of language models."""
_OF_LOGITS = (
    *("distill.temperature", "distill.alpha", "distill.average", "distill.live"),
    *("distill.on_policy", "distill.divergence", "targets.top_k", "targets.samples"),
)
"""Keys of distillation by logits alone."""
FREE = (
    *("data.train_size", "data.classes", "data.label_noise"),
    *("data.crop", "data.flip", "data.jitter", "data.augment", "data.views", "data.repeats"),
    *("data.rationales", "data.rationale_weight"),
    "data.transfer",
)
"""What an arm of a study may change of the data: its training items, their labels and views, and
the transfer set."""
INSIDE = ("data.transfer.", "data.augment.")
"""Beginnings of further keys that it may."""
CACHED = ("targets.top_k", "targets.samples")
"""What an arm of a study may change of the cached teacher logits."""
SIZES = ("data.train_size", "data.val_size")
FUSED = ("adagrad", "adam", "adamw", "momentum", "nesterov", "sgd")
"""Optimisers that have a fused step."""


def sampled_faults(config: Config, sources: Mapping[str, str], why: str) -> Iterator[str]:
    """Yield faults of settings that samples of a teacher cannot go with.

    The default range of T in the search space is none: it is left out there.

    Args:
        config: Config to check.
        sources: Where dotted keys were given, for messages.
        why: Why there are samples, in words.
    """
    key, search = "distill.temperature", config.search
    given: dict[str, Any] = {key: config.distill.temperature}
    given |= {f"search.points.{n}.{key}": p.get(key, 1) for n, p in enumerate(search.points or ())}
    arms = config.study.arms
    given |= {f"study.arms.{name}.set.{key}": arm.set.get(key, 1) for name, arm in arms.items()}
    for name, temperature in given.items():
        if temperature != 1 and (name == key or temperature != given[key]):  # said once
            yield f"{locate_key(name, sources)}: must be 1, got {temperature}: {why}"
    spec = without_default_temperature(search.space).get(key, {"choice": [1]})
    if spec not in ({"choice": [1]}, {"uniform": [1, 1]}):
        where = locate_key(f"search.space.{key}", sources)
        yield f"{where}: must be left out, got {spec}: {why}"
    if "logits" in values_of(config, "distill.average", arms=True):
        where = locate_key("distill.average", sources)
        yield f"{where}: must be probabilities, got logits, which are not cached: {why}"
    if others := _other_divergences(config, arms=True):
        where = locate_key("distill.divergence", sources)
        yield f"{where}: must be forward_kl, got {others}: {why}"
    needing = [name for name in OF_ALL_LOGITS if name in config.controls]
    if needing:
        where = locate_key("controls", sources)
        yield f"{where}: {' and '.join(needing)} need all logits: {why}"
    for name, arm in arms.items():
        if arm.target_transform in OF_ALL_LOGITS.values():
            yield f"study.arms.{name}: {arm.target_transform} needs all logits: {why}"


def task_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults of keys that another task has, and of what a task does not do."""
    yield from _fused_faults(config, sources)
    default, given = flat(from_tree({"task": config.task})), flat(config)
    other = "images" if config.task == "text" else "text"
    for key in OF_TASK[other]:
        if given[key] != default[key]:
            where = locate_key(key, sources)
            yield f"{where}: only with task {other}, got {given[key]!r} with task {config.task}"
    search = config.search
    spaces = {"space": search.space, "labels_only_space": search.labels_only_space}
    spaces |= {f"points.{number}": point for number, point in enumerate(search.points or ())}
    for name, space in spaces.items():
        for key in space:
            if key in OF_TASK[other]:
                where = locate_key(f"search.{name}", sources)
                yield f"{where}: {key} is only with task {other}"
    if config.task != "text":
        for key, names in _NAMES_OF_TEXT.items():
            if given[key] in names:
                where = locate_key(key, sources)
                yield f"{where}: {given[key]} is only with task text: --task text"
        return
    for key in SIZES:
        if given[key] is not None and (fault := size_fault(config)):
            yield f"{locate_key(key, sources)}: {fault}, got {given[key]}"
    yield from _traces_faults(config, sources)
    for source in ("snapshots", "specialists"):
        if source in (config.members.source, *config.members.compare):
            where = locate_key("members", sources)
            yield f"{where}: {source} are only with task images"
    yield from (f"{locate_key(k, sources)}: {fault}" for k, fault in loss_faults(config))
    if config.resources.workers > 1:
        where, workers = locate_key("resources.workers", sources), config.resources.workers
        yield f"{where}: must be 1 with task text, got {workers}"
    yield from (f"{locate_key(k, sources)}: {fault}" for k, fault in steps_faults(config))


def steps_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys and faults of the number of steps of a language model."""
    if config.task != "text":
        return
    steps, warmup, epochs = config.train.steps, config.train.warmup_steps, config.train.epochs
    if warmup >= steps:
        yield "train.warmup_steps", f"must be less than train.steps ({steps}), got {warmup}"
    if epochs > steps:
        yield "train.epochs", f"must be at most train.steps ({steps}), got {epochs}"


def size_fault(config: Config) -> str | None:
    """Return why there are no numbers of items to choose, if there are none."""
    if config.task == "images" or config.data.name == "arithmetic":
        return None
    return f"only with data.name arithmetic or task images, not with {config.data.name}"


def _traces_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults of what has no meaning where students are trained on the text of teachers."""
    if config.distill.mode == "tokens":
        return
    default, given = flat(from_tree({"task": "text"})), flat(config)
    why = "has no effect with distill.mode traces"
    if (transfer := config.transfer) is not None:
        yield f"{locate_key('data.transfer', sources)}: {why}, got {transfer.name}"
    for key in _OF_LOGITS:
        if given[key] != default[key]:
            yield f"{locate_key(key, sources)}: {why}, got {given[key]!r}"
        if key in config.search.space:
            yield f"{locate_key(f'search.space.{key}', sources)}: {why}"
        if any(key in point for point in config.search.points or ()):
            yield f"{locate_key('search.points', sources)}: {key} {why}"


def arm_faults(config: Config, changed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield keys and faults of an arm of a study on text.

    Args:
        config: Config of the arm.
        changed: Keys that the arm sets itself.
    """
    yield from loss_faults(config)
    if config.targets.samples is not None and config.distill.temperature != 1:
        value = config.distill.temperature
        yield (
            "targets.samples",
            f"only with distill.temperature 1, got {value:g}",
        )
    default, given = flat(from_tree({"task": "text"})), flat(config)
    if config.distill.mode == "tokens":
        for key in changed:
            if key.startswith("write."):
                yield key, f"only with distill.mode traces, got {given[key]!r}"
        return
    for key in _OF_LOGITS:  # others of the study's own are those of its other arms
        if given[key] != default[key] and key in (*changed, "distill.live"):
            yield key, f"has no effect with distill.mode traces, got {given[key]!r}"


def loss_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys and faults of the loss on text: what it needs of the teacher and is not there."""
    distill, targets = config.distill, config.targets
    given = [key for key in ("top_k", "samples") if getattr(targets, key) is not None]
    shares = [
        share for share in values_of(config, "distill.on_policy") if isinstance(share, int | float)
    ]
    if any(shares) and not distill.live:
        yield (
            "distill.on_policy",
            "needs distill.live=true, as no teacher logits of what a student writes are cached, "
            f"got {max(shares):g}",
        )
    for key in given:
        if distill.live:
            value = getattr(targets, key)
            yield f"targets.{key}", f"not with distill.live=true, which caches none, got {value}"
    others = _other_divergences(config)
    if "top_k" in given and not distill.live and others:
        yield (
            "distill.divergence",
            f"must be forward_kl, got {others}, which needs all logits: leave out targets.top_k "
            "or set distill.live=true",
        )


def transform_faults(config: Config, transform: str) -> Iterator[str]:
    """Yield what a transform of teacher logits cannot go with."""
    others = _other_divergences(config)
    if transform == "hard" and others:
        yield (
            f"needs distill.divergence forward_kl, got {others}: others are without bound where a "
            "teacher gives all probability to one class"
        )
    if transform == "class_mean" and config.data.transfer is not None:
        yield "needs the label of each item: leave out data.transfer"


def _other_divergences(config: Config, *, arms: bool = False) -> str:
    """Return the names of the divergences, searched or set, that need all logits."""
    found = {str(name) for name in values_of(config, "distill.divergence", arms=arms)}
    return ", ".join(sorted(found - {"forward_kl"}))


def tries_teachers(config: Config) -> bool:
    """Say whether there is something that is to be tried with the networks of teachers."""
    starts = values_of(config, "train.init")
    return any(choices_of_terms(config)) or any(start != "fresh" for start in starts)


_LAST = "train.channels_last"
_OF_STEP = {_LAST, "train.fused", "train.optimizer"}


def _fused_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults of a fused step that is asked for and that an optimiser does not have.

    Args:
        config: Config to check.
        sources: Where dotted keys were given, for messages.
    """
    places: dict[str, Mapping[str, Any]] = {"": {}}
    places |= {f"study.arms.{name}.set: ": arm.set for name, arm in config.study.arms.items()}
    for place, own in places.items():

        def found(key: str, own: Mapping[str, Any] = own) -> list[Any]:
            return [own[key]] if key in own else values_of(config, key)

        if place and not own.keys() & _OF_STEP:  # of which nothing new is to be said
            continue
        if config.task == "text" and True in found(_LAST):
            where = f"{place}{_LAST}" if place else locate_key(_LAST, sources)
            yield f"{where}: must be false with task text, got true"
        without = [each for each in found("train.optimizer") if each not in FUSED]
        if True in found("train.fused") and without:
            where = f"{place}train.fused" if place else locate_key("train.fused", sources)
            yield (
                f"{where}: must be false with train.optimizer {without[0]}, which has no fused "
                f"step, got true: {', '.join(FUSED)} have one"
            )


def values_of(config: Config, key: str, *, arms: bool = False) -> list[Any]:
    """Return the value of a key, those of its search space, or its ends, and those of points.

    Args:
        config: Config to look in.
        key: Dotted key.
        arms: Whether those of a study's arms are wanted as well.
    """
    found = [flat(config)[key]]
    with suppress(KeyError, ValueError):  # of a distribution that is refused elsewhere
        spec = Distribution.parse(config.search.space[key])
        found += spec.values if spec.kind == "choice" else [spec.at(0.0), spec.at(1.0)]
    found += [point[key] for point in config.search.points or () if key in point]
    if arms:
        found += [arm.set[key] for arm in config.study.arms.values() if key in arm.set]
    return found
