"""Checks across settings, which no single value shows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any

from selfkd.config.augment import augment_faults, transform_fault
from selfkd.config.schema import (
    OF_ALL_LOGITS,
    OF_TEACHERS,
    TERM_WEIGHT,
    Config,
    ModelConfig,
    choices_of_terms,
    did_you_mean,
    known_keys,
    leaves,
    locate_key,
    to_tree,
    with_its_terms,
)
from selfkd.config.space import Distribution, is_finite
from selfkd.config.tasks import (
    CACHED,
    FREE,
    INSIDE,
    OF_TASK,
    SIZES,
    arm_faults,
    sampled_faults,
    size_fault,
    steps_faults,
    task_faults,
    transform_faults,
    values_of,
)
from selfkd.config.terms import terms_faults
from selfkd.errors import ConfigError
from selfkd.results import OWN

# keys that all trials of a run share, so that they cannot be searched
_FIXED = (
    *("task", "rounds", "rounds_max", "seed", "name", "storage", "data", "targets", "confirm"),
    "write",
    *(
        "generation_0",
        "controls",
        "search",
        "resources",
        "checkpoint",
        "tracking",
        "capacity",
        "study",
        "deploy",
    ),
)

MEMBERS = "members"
"""Name of the teachers of a study that come from elsewhere."""
_FIXED_KEYS = (
    *("distill.teacher", "distill.live", "distill.mode"),
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
    if config.search.metric in OWN:
        where = locate_key("search.metric", sources)
        yield f"{where}: must be a metric, got {config.search.metric}, which selfkd sets itself"
    yield from _evidence_faults(config, sources)
    yield from task_faults(config, sources)
    yield from (f"{locate_key(key, sources)}: {fault}" for key, fault in terms_faults(config))
    distils = bool(config.most_rounds) and not config.study.arms
    for key, fault in augment_faults(config, distils=distils):
        yield f"{locate_key(key, sources)}: {fault}"
    for key, value in leaves(to_tree(config), ""):
        if not key.startswith("search.") and not _has_finite_numbers(value):
            yield f"{locate_key(key, sources)}: must have finite numbers, got {value!r}"
    members = config.members
    for checkpoint in members.checkpoints:
        if (checkpoint.mean is None) != (checkpoint.std is None):
            where = locate_key("members.checkpoints", sources)
            yield f"{where}: must have mean and std or neither, got one of {checkpoint.path}"
    given = config.generation_0
    if (given.mean is None) != (given.std is None):
        where = locate_key("generation_0", sources)
        yield f"{where}: must have mean and std or neither, got one of them"
    if config.train.init != "fresh" and (given.classes or given.mean):
        where = locate_key("train.init", sources)
        yield (
            f"{where}: must be fresh with generation_0.classes or mean, whose weights are for "
            "another order or normalisation than that of the students"
        )
    if config.targets.top_k is not None and "logits" in values_of(config, "distill.average"):
        where = locate_key("targets.top_k", sources)
        yield f"{where}: cannot go with distill.average logits: an average needs all logits"
    if config.targets.samples is not None:
        yield from sampled_faults(config, sources, "targets.samples are drawn at T = 1")
    if config.targets.samples is not None and config.targets.top_k is not None:
        where = locate_key("targets.samples", sources)
        yield f"{where}: cannot go with targets.top_k: give one of them"
    if config.train.init != "fresh" and members.source == "specialists":
        where = locate_key("train.init", sources)
        yield f"{where}: must be fresh with specialists, whose networks are others than the student"
    if config.distill.live and "specialists" in (members.source, *members.compare):
        where = locate_key("distill.live", sources)
        yield f"{where}: must be false with specialists, whose logits are cached, got True"
    if config.search.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        where = locate_key("search.algorithm", sources)
        yield f"{where}: optuna is not installed: pip install 'selfkd[optuna]'"
    resources = config.resources
    if resources.gpu % 1 and (resources.workers > 1 or resources.gpu > 1):  # Ray refuses 1.5
        where = locate_key("resources.gpu", sources)
        when = "with several resources.workers" if resources.workers > 1 else "above 1"
        yield f"{where}: must be whole {when}, got {resources.gpu:g}"
    epochs, warmup = config.train.epochs, config.train.warmup_epochs
    if warmup >= epochs:
        where = locate_key("train.warmup_epochs", sources)
        yield f"{where}: must be less than train.epochs ({epochs}), got {warmup}"
    tried = list[Mapping[str, Any]]()
    for number, point in enumerate(config.search.points or ()):
        if point in tried:  # as by default most of them are
            continue
        tried.append(point)
        where = locate_key(f"search.points.{number}", sources)
        yield from (f"{where}: {fault}" for fault in _point_faults(config, point))
    for name in ("space", "labels_only_space"):
        space: dict[str, Any] = getattr(config.search, name)
        for key, spec in space.items():
            where = locate_key(f"search.{name}.{key}", sources)
            if name == "labels_only_space" and key.startswith(OF_TEACHERS):
                yield f"{where}: cannot be searched on labels only: there is no teacher"
            else:
                yield from (f"{where}: {fault}" for fault in _entry_faults(config, key, spec))


def _has_finite_numbers(value: Any) -> bool:
    """Say whether a value of any shape, such as `params`, has no NaN: it differs from itself."""
    if isinstance(value, Mapping):
        return all(map(_has_finite_numbers, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_has_finite_numbers, value))
    return not isinstance(value, float) or is_finite(value)


def _evidence_faults(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield faults of the settings for replication and controls."""
    lineages, given = config.confirm.lineages, ("--set", "command line")
    seeds, key = config.confirm.replicas, "lineages" if lineages else "seeds"
    later, earlier = (
        given.index(source) if (source := sources.get(f"confirm.{name}")) in given else -1
        for name in ("seeds", "lineages")
    )
    if lineages and later > earlier:
        yield (
            f"{locate_key('confirm.seeds', sources)}: {lineages} whole lineages take the place of "
            "seeds: raise confirm.lineages, or give confirm.lineages=0 as well in a new run"
        )
    where = locate_key(f"confirm.{key}", sources)
    if config.confirm.lineages and config.distill.teacher.startswith("top:"):
        yield (
            f"{where}: must be 0 with distill.teacher {config.distill.teacher}, as a lineage has "
            f"one model of each generation, got {config.confirm.lineages}"
        )
    if config.rounds == "auto" and seeds < 3:
        yield f"{where}: must be at least 3 with rounds auto: fewer are no evidence, got {seeds}"
    if config.controls and not seeds:
        yield f"{where}: must be at least 1 with controls, which are replicated too, got {seeds}"
    if not config.confirm.baseline:
        where = locate_key("confirm.baseline", sources)
        needed = {
            "rounds auto, which stops by it": config.rounds == "auto",
            "controls, which stand beside it": bool(config.controls),
            "confirm.lineages, which begin with it": lineages > 0,
        }
        for what, is_needed in needed.items():
            if is_needed:
                yield f"{where}: must be true with {what}, got false"
    if config.controls and not config.most_rounds:
        where = locate_key("rounds", sources)
        yield f"{where}: must be at least 1 with controls, which need generation 1, got 0"
    for name, transform in OF_ALL_LOGITS.items():
        if name in config.controls:
            where = locate_key("controls", sources)
            yield from (f"{where}: {name} {fault}" for fault in transform_faults(config, transform))
    distill, top_k = config.distill, config.targets.top_k
    if distill.live or top_k is not None or distill.mode == "traces":
        where = locate_key("controls", sources)
        for name in OF_ALL_LOGITS:
            if name in config.controls:
                traces = ", distill.mode traces" if config.task == "text" else ""
                yield (
                    f"{where}: {name} needs cached teacher logits of all classes: leave out "
                    f"distill.live{traces} and targets.top_k, or {name}"
                )
    if any(choices_of_terms(config)):
        where = locate_key("controls", sources)
        for name in (*OF_ALL_LOGITS, "teacher_free"):
            if name in config.controls:
                yield f"{where}: {name} has no further terms: leave out distill.terms, or {name}"


def _needs_all_logits(config: Config) -> Iterator[str]:
    """Yield why not all teacher logits are cached."""
    given = {
        "distill.live": config.distill.live,
        "distill.mode traces": config.distill.mode == "traces",
        "targets.top_k": config.targets.top_k is not None,
    }
    if found := [key for key, value in given.items() if value]:
        yield f"needs cached teacher logits of all classes: leave out {' and '.join(found)}"


def _key_faults(config: Config, key: str) -> Iterator[str]:
    """Yield why a key cannot differ from trial to trial, if it cannot."""
    known = [k for k in known_keys() if "." in k and k.split(".")[0] not in _FIXED]
    free = re.compile(rf"((model|student)\.args|params)\.\w+|{TERM_WEIGHT.pattern}")
    if key.split(".")[0] in _FIXED or key in _FIXED_KEYS:
        yield "cannot be searched: all trials of a run share it"
    elif config.is_chain and key.split(".")[0] == "student":
        yield "cannot be searched with a list of students, whose networks are fixed"
    elif key not in known and not free.fullmatch(key):
        yield f"is no config key{did_you_mean(key, known)}"


def _point_faults(config: Config, point: Mapping[str, Any]) -> Iterator[str]:
    faults = [f"{key} {fault}" for key in point for fault in _key_faults(config, key)]
    if not point:
        faults = ["must have at least one key, got {}"]
    yield from faults
    if not faults:
        try:
            at = config.at(dict(point))
        except ConfigError as error:
            yield from str(error).splitlines()
        else:
            yield from _new_steps_faults(config, at)


def _entry_faults(config: Config, key: str, spec: Any) -> Iterator[str]:
    if faults := list(_key_faults(config, key)):
        yield from faults
        return
    try:
        distribution = Distribution.parse(spec)
    except ValueError as error:
        yield str(error)
        return
    ends, found = (distribution.at(0.0), distribution.at(1.0)), list[str]()
    for value in distribution.values if distribution.kind == "choice" else ends:
        try:
            at = config.at(with_its_terms(config, {key: value}))
        except ConfigError as error:
            found += [line.removeprefix(f"{key}: ") for line in str(error).splitlines()]
        else:
            found += _new_steps_faults(config, at)
    yield from dict.fromkeys(found)  # what both ends have is said once


def _new_steps_faults(config: Config, at: Config) -> Iterator[str]:
    """Yield the faults of the steps of a point that the config itself does not have."""
    if not any(steps_faults(config)):
        yield from (f"{key}: {fault}" for key, fault in steps_faults(at))


def check_capacity(config: Config) -> None:
    """Check the settings of a capacity curve.

    Raises:
        ConfigError: With every fault.
    """
    _raise(_capacity_faults(config))


def _capacity_faults(config: Config) -> Iterator[str]:
    capacity = config.capacity
    root = capacity.key.partition(".")[0]
    wanted = "student" if config.student is not None else "model"
    if root != wanted:
        why = "as there is a student" if config.student else "as student is not given"
        yield f"capacity.key must begin with {wanted}., {why}, got {capacity.key}"
    known = [value for value in capacity.values if type(value) in (int, float, str)]
    odd = [value for value in capacity.values if type(value) not in (int, float, str)]
    if odd:
        yield f"capacity.values must be numbers or words, got {odd}"
    if len(set(known)) < len(known):
        yield f"capacity.values must be different ones, got {capacity.values}"
    if capacity.key in {**config.search.space, **config.search.labels_only_space}:
        yield f"search.space must not hold capacity.key, got {capacity.key} in both"
    yield from no_generations(config)
    if config.confirm.seeds < 1:
        yield f"confirm.seeds must be at least 1, got {config.confirm.seeds}"
    if not config.confirm.baseline:
        yield "confirm.baseline must be true: a capacity curve is of gains over it, got false"
    if config.train.init == "teacher":
        yield f"train.init must be fresh for students of other sizes, got {config.train.init}"
    for value in known:
        try:
            config.at({capacity.key: value})
        except ConfigError as error:
            yield f"capacity.values: {error}"


def check_study(config: Config) -> None:
    """Check the arms and contrasts of a study.

    Raises:
        ConfigError: With every fault.
    """
    _raise(_study_faults(config))


def _study_faults(config: Config) -> Iterator[str]:
    arms, before, models = config.study.arms, list[str](), dict[str, ModelConfig]()
    foreign = OF_TASK["images" if config.task == "text" else "text"]
    if config.student is not None and not config.is_chain:
        named = config.network().name
        yield f"student: not of a study, got {named}: set model, or it in an arm"
    if not arms:
        yield "study.arms must have at least one arm, got none: see tune_configs/anchors/"
    yield from no_generations(config)
    if config.confirm.seeds < 1:
        yield f"confirm.seeds must be at least 1, got {config.confirm.seeds}"
    if not config.confirm.baseline:
        yield "confirm.baseline must be true: a study trains the arms it names, got false"
    for name, arm in arms.items():
        where = f"study.arms.{name}"
        if name == MEMBERS or not name.replace("_", "").replace("-", "").isalnum():
            yield f"{where}: a name must be of letters, digits, - and _, and not {MEMBERS}"
        for other in (*arm.teachers, *arm.average):
            if other == MEMBERS and other in arm.teachers:
                if not (config.members.runs or config.members.checkpoints):
                    yield f"{where}.teacher: {MEMBERS} must be given, by --from RUN"
            elif other not in before:
                known = ", ".join([MEMBERS, *before])
                yield f"{where}: must name arms that stand before it ({known}), got {other!r}"
            elif 1 < config.arm_seeds(arms[other]) < config.arm_seeds(arm):
                yield f"{where}: {other} must have 1 seed or at least as many as {name}"
        if arm.average and (arm.set or arm.teachers):
            yield f"{where}: must have average alone, with nothing to train, or no average"
        transform = arm.target_transform
        if transform in OF_ALL_LOGITS.values() and not arm.teachers:
            yield f"{where}.teacher must be given with target_transform {transform}"
        if transform == "virtual" and arm.teachers:
            yield (
                f"{where}.teacher must not be given with target_transform virtual, "
                f"got {arm.teacher!r}"
            )
        for key in arm.set:
            free = key.split(".")[0] in ("model", "train", "distill", "write")
            free |= key in (*FREE, *CACHED) or key.startswith(INSIDE)
            if not free:
                known = f"model, train, distill, write or of {', '.join((*FREE, *CACHED))}"
                yield f"{where}.set: must be keys of {known}, got {key}"
            elif key in foreign:
                yield f"{where}.set: {key} is not with task {config.task}"
            elif key in SIZES and (fault := size_fault(config)):
                yield f"{where}.set: {key} is {fault}"
        try:
            own = config.at(arm.set)
        except ConfigError as error:
            yield from (f"{where}.set: {line}" for line in str(error).splitlines())
        else:
            if own.task == "text":
                faults = (*steps_faults(own), *arm_faults(own, arm.set))
                yield from (f"{where}.set: {key}: {fault}" for key, fault in faults)
            views = augment_faults(own, distils=bool(arm.teachers))
            for key, fault in (*terms_faults(own), *views):
                yield f"{where}.set: {key}: {fault}"
            if odd := transform_fault(own, transform):
                yield f"{where}: {transform} {odd}"
            if transform in OF_ALL_LOGITS.values():
                found = (*_needs_all_logits(own), *transform_faults(own, transform))
                yield from (f"{where}: {transform} {fault}" for fault in found)
            if transform != "none" and own.distill.terms:
                yield f"{where}: target_transform {transform} has no further terms: leave out " + (
                    "distill.terms"
                )
            others = [models[each] for each in arm.teachers if each in models]
            if own.train.init == "teacher" and any(model != own.model for model in others):
                yield f"{where}.set: train.init must be fresh where its teacher is another model"
            models[name] = own.model
        before.append(name)
    for number, compared in enumerate(config.study.compare):
        for name in filter(None, (compared.arm, compared.to, compared.reference)):
            if name not in arms and not (name == MEMBERS and name == compared.reference):
                yield f"study.compare.{number}: must name arms ({', '.join(arms)}), got {name!r}"


def check_chain(config: Config) -> None:
    """Check that a list of students has one network a generation, and a map of layers one teacher.

    Raises:
        ConfigError: It has more or fewer.
    """
    init, lineage = config.train.init, config.distill.teacher == "lineage"
    if isinstance(init, Mapping) and len(config.students) == 1 < config.most_rounds and not lineage:
        raise ConfigError(
            "rounds: must be 1 with a map of layers in train.init, as later generations have "
            f"students for teachers, got {config.rounds}: every_other and first suit all of them"
        )
    if not config.is_chain:
        return
    networks = len(config.students)
    if config.rounds == "auto":
        raise ConfigError(
            f"rounds: must be {networks}, the number of networks in the list student, got auto"
        )
    if networks != config.rounds:
        raise ConfigError(
            f"student: must be one network, or a list of as many as rounds ({config.rounds}), got "
            f"{networks}: set rounds={networks}, or list {config.rounds}"
        )
    if "seeds" in config.controls:
        raise ConfigError(
            "controls: seeds must be left out with a list of students: an ensemble of unlike "
            "networks has no equal of seeds"
        )


def no_generations(config: Config) -> Iterator[str]:
    """Yield the faults of settings of generations where there are none."""
    if config.is_chain:
        named = ", ".join(model.name for model in config.students)
        yield (
            f"student: must be one network, as a list is of selfkd.generations only, got {named}"
        )
    if config.generation_0.path is not None:
        yield f"generation_0.path: of selfkd.generations only, got {config.generation_0.path}"
    if config.confirm.lineages:
        yield f"confirm.lineages: of selfkd.generations only, got {config.confirm.lineages}"


def _raise(faults: Iterator[str]) -> None:
    if found := list(faults):
        raise ConfigError("\n".join(found))
