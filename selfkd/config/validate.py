"""Checks across settings, which no single value shows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any

from selfkd.config.schema import OF_TEACHERS, Config, did_you_mean, known_keys, locate_key
from selfkd.config.space import Distribution
from selfkd.errors import ConfigError

# keys that all trials of a run share, so that they cannot be searched
_FIXED = (
    *("rounds", "rounds_max", "seed", "name", "storage", "data", "targets", "confirm"),
    *("controls", "search", "resources", "checkpoint", "tracking", "capacity", "study"),
)


_FIXED_KEYS = (
    *("distill.teacher", "distill.live"),
    *(f"members.{key}" for key in ("count", "models", "same_init", "runs", "checkpoints")),
    "members.compare",
)


def settings_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults between settings, such as a search space with values that the config refuses.

    Args:
        config: Config to check.
        sources: Where dotted keys were given, for messages.
    """
    teacher, trials = config.distill.teacher, config.search.trials
    if teacher.startswith("top:") and int(teacher[4:]) > trials:
        where = locate_key("distill.teacher", sources)
        yield f"{where}: must be at most top:{trials}, the number of trials, got {teacher!r}"
    yield from _evidence_faults(config, sources)
    members = config.members
    for checkpoint in members.checkpoints:
        if (checkpoint.mean is None) != (checkpoint.std is None):
            where = locate_key("members.checkpoints", sources)
            yield f"{where}: must have mean and std or neither, got one of {checkpoint.path}"
    averages = (config.distill.average, str(config.search.space.get("distill.average")))
    if config.targets.top_k is not None and any("logits" in average for average in averages):
        where = locate_key("targets.top_k", sources)
        yield f"{where}: cannot go with distill.average logits: an average needs all logits"
    if config.distill.live and "specialists" in (members.source, *members.compare):
        where = locate_key("distill.live", sources)
        yield f"{where}: must be false with specialists, whose logits are cached, got True"
    if config.search.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        where = locate_key("search.algorithm", sources)
        yield f"{where}: optuna is not installed: pip install 'selfkd[optuna]'"
    resources = config.resources
    if resources.workers > 1 and resources.gpu % 1:
        where = locate_key("resources.gpu", sources)
        yield f"{where}: must be whole with several resources.workers, got {resources.gpu:g}"
    epochs, warmup = config.train.epochs, config.train.warmup_epochs
    if warmup >= epochs:
        where = locate_key("train.warmup_epochs", sources)
        yield f"{where}: must be less than train.epochs ({epochs}), got {warmup}"
    for name in ("space", "labels_only_space"):
        space: dict[str, Any] = getattr(config.search, name)
        for key, spec in space.items():
            where = locate_key(f"search.{name}.{key}", sources)
            if name == "labels_only_space" and key.startswith(OF_TEACHERS):
                yield f"{where}: cannot be searched on labels only: there is no teacher"
            else:
                yield from (f"{where}: {fault}" for fault in _entry_faults(config, key, spec))


def _evidence_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults of the settings for replication and controls."""
    seeds, where = config.confirm.seeds, locate_key("confirm.seeds", sources)
    if config.rounds == "auto" and seeds < 2:
        yield f"{where}: must be at least 2 with rounds auto: one seed is no evidence, got {seeds}"
    if config.controls and not seeds:
        yield f"{where}: must be at least 1 with controls, which are replicated too, got {seeds}"
    if config.controls and not config.most_rounds:
        where = locate_key("rounds", sources)
        yield f"{where}: must be at least 1 with controls, which need generation 1, got 0"
    if config.distill.live or config.targets.top_k is not None:
        where = locate_key("controls", sources)
        for name in ("dkpp", "cwtm"):
            if name in config.controls:
                yield (
                    f"{where}: {name} needs cached teacher logits of all classes: leave out "
                    f"distill.live and targets.top_k, or {name}"
                )


def _entry_faults(config: Config, key: str, spec: Any) -> Iterator[str]:
    known = [k for k in known_keys() if "." in k and k.split(".")[0] not in _FIXED]
    if key.split(".")[0] in _FIXED or key in _FIXED_KEYS:
        yield "cannot be searched: all trials of a run share it"
        return
    if key not in known and not re.fullmatch(r"((model|student)\.args|params)\.\w+", key):
        yield f"is no config key{did_you_mean(key, known)}"
        return
    try:
        distribution = Distribution.parse(spec)
    except ValueError as error:
        yield str(error)
        return
    ends = (distribution.at(0.0), distribution.at(1.0))
    for value in distribution.values if distribution.kind == "choice" else ends:
        try:
            config.at({key: value})
        except ConfigError as error:
            yield from (line.removeprefix(f"{key}: ") for line in str(error).splitlines())
