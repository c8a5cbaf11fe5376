"""`--plan`: what a run would train, write and take, before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from selfkd.config import (
    Config,
    DataConfig,
    ModelConfig,
    TargetsConfig,
    WriteConfig,
)
from selfkd.experiments.confirm import baselines, pairs_of
from selfkd.experiments.controls import TITLES
from selfkd.experiments.ensemble import arms_of
from selfkd.experiments.given import has_known_training
from selfkd.experiments.members import find_members, trained_networks


@dataclass(frozen=True)
class Planned:
    """Trainings of one kind."""

    title: str
    trainings: int
    patterns: Sequence[str]
    """Patterns of the folders of its trials in the run folder."""
    config: Config
    """Config of these trainings, whose `model` is trained."""
    teachers: Sequence[ModelConfig] = ()
    """Networks of their teachers, some of which may be run at every step."""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    stages: Sequence[Planned]
    teachers: int = 0
    """Number of models whose logits are cached."""
    cached: Mapping[str, int] = field(default_factory=dict)
    """Of these, how many are of each config that is tried, after what its faults begin with, where
    configs differ."""
    writers: int = 0
    """Number of models that write text for students."""
    texts: int = 0
    """Number of texts a training prompt, of all of them together."""
    tried: Sequence[tuple[str, Config, Sequence[ModelConfig]]] = ()
    """Configs that are tried with the networks of their teachers, after what their faults begin
    with."""
    imported: int | None = None
    """Number of members that were trained elsewhere; None where there are no members."""


def plan_generations(config: Config) -> Plan:
    """Return the plan of `selfkd.generations`."""
    rounds, trials, seeds = config.most_rounds, config.search.trials, config.confirm.replicas
    given, known = config.generation_0.path is not None, has_known_training(config)
    stages = []
    if not given:
        stages.append(Planned("generation 0", trials, ["generation_000/trial_*"], config))
    parts = [(1, rounds)] if rounds else []
    if config.is_chain:
        parts = [(number, number) for number in range(1, rounds + 1)]
    at_most = "at most " if config.rounds == "auto" else ""
    for first, last in parts:
        which, patterns, own = _generations(config, first, last)
        patterns = [f"{pattern}/trial_*" for pattern in patterns]
        each, teachers = (last - first + 1) * trials, [config.network(first - 1)]
        stages.append(Planned(f"{at_most}{which}", each, patterns, own, teachers))
    if seeds and known and config.confirm.baseline:
        patterns = ["generation_000/confirm/*"]
        stages.append(Planned("confirmation, generation 0", seeds, patterns, config))
    for path, model in baselines(config, range(1, rounds + 1)).values() if seeds else ():
        patterns, own = [f"{PurePosixPath(path).parent}/confirm/*"], replace(config, model=model)
        title = f"confirmation, {model.title if config.is_chain else 'student'} on labels"
        stages.append(Planned(title, seeds, patterns, own))
    for first, last in parts if seeds else ():
        which, patterns, own = _generations(config, first, last)
        patterns = [f"{pattern}/confirm/*" for pattern in patterns]
        each, teachers = (last - first + 1) * seeds, [config.network(first - 1)]
        stages.append(Planned(f"confirmation, {which}", each, patterns, own, teachers))
    for name in dict.fromkeys(config.controls):
        many = rounds + 1 if name == "seeds" else trials + seeds
        patterns = [f"controls/{name}/**/trial_*"]
        own = replace(config, model=config.network(1))
        stages.append(Planned(f"control: {TITLES[name]}", many, patterns, own))
    teacher = config.distill.teacher
    each = int(teacher[4:]) if teacher.startswith("top:") else 1
    pairs = pairs_of(config)
    tried = [
        (f"generation {number}: " if config.is_chain else "", *pair)
        for number, pair in enumerate(pairs, start=1)
    ]
    return _by_mode(config, Plan(stages, rounds * (each + config.confirm.lineages), tried=tried))


def _generations(config: Config, first: int, last: int) -> tuple[str, list[str], Config]:
    """Return the name of generations of one network, patterns of their folders, and the config."""
    own = replace(config, model=config.network(first))
    if config.is_chain:
        named = f"generation {first}, {own.model.title}"
        return named, [f"generation_{first:03d}"], own
    which = "generation 1" if last == 1 else f"generations 1 to {last}"
    return which, ["generation_*[1-9]*"], own


def plan_ensemble(config: Config) -> Plan:
    """Return the plan of `selfkd.ensemble`."""
    members, student, seeds = _members(config), _student(config), config.confirm.seeds
    trials = config.search.trials
    teachers = trained_networks(config)
    stages = [*members.stages, Planned("student", trials, ["student/trial_*"], student, teachers)]
    if config.confirm.baseline and (config.space(with_teacher=False) or not seeds):
        stages.append(Planned("student from labels only", trials, ["labels/trial_*"], student))
    if seeds:
        arms = arms_of(config)
        title = ("confirmation", "confirmation, both", "confirmation, all three")[arms - 1]
        patterns = ["confirm/*/trial_*"]
        stages.append(Planned(title, arms * seeds, patterns, student, teachers))
    return _by_mode(config, replace(members, stages=stages, tried=[("", config, teachers)]))


def plan_capacity(config: Config) -> Plan:
    """Return the plan of `selfkd.capacity`."""
    members, key = _members(config), config.capacity.key
    stages, trials = list(members.stages), config.search.trials
    searched, teachers = config.capacity.search, trained_networks(config)
    tried = list[tuple[str, Config, Sequence[ModelConfig]]]()
    searches = [wanted for wanted in (True, False) if config.space(with_teacher=wanted)]
    for number, value in enumerate(config.capacity.values):
        tried.append((f"capacity.values {value}: ", config.at({key: value}), teachers))
        own = _student(config.at({key: value}))
        title = f"{key.rpartition('.')[2]} {value}, labels only and distilled"
        patterns = [f"students/*_{number:03d}/trial_*", f"*search_{number:03d}/trial_*"]
        each = 2 * config.confirm.seeds + (trials * len(searches) if searched else 0)
        stages.append(Planned(title, each, patterns, own, teachers))
    return _by_mode(config, replace(members, stages=stages, tried=tried))


def plan_deploy(config: Config) -> Plan:
    """Return the plan of `selfkd.deploy`."""
    options, stages = config.deploy, list[Planned]()
    if options.prune is not None:
        title = f"pruned by {options.prune:.0%}: from labels, distilled, fresh"
        patterns = [f"deploy/*-pruned-{options.prune:g}{options.suffix}/*/trial_*"]
        stages.append(Planned(title, 3 * options.seeds, patterns, config))
    if options.bits is not None:
        title = f"{options.bits}-bit weights: from labels, distilled"
        patterns = [f"deploy/*-bits-{options.bits}{options.suffix}/*/trial_*"]
        stages.append(Planned(title, 2 * options.seeds, patterns, config))
    return _by_mode(config, Plan(stages, 1 if stages else 0))


def plan_study(config: Config) -> Plan:
    """Return the plan of `selfkd.study`."""
    stages, tried = list[Planned](), list[tuple[str, Config, Sequence[ModelConfig]]]()
    cached = dict[tuple[str, DataConfig, TargetsConfig], tuple[int, str]]()
    writing = dict[tuple[str, WriteConfig], int]()
    for name, arm in config.study.arms.items():
        if arm.average:
            continue
        own, seeds = config.at(arm.set), config.arm_seeds(arm)
        others = [config.study.arms[each] for each in arm.teachers if each in config.study.arms]
        teachers = [config.at(other.set).model for other in others]
        stages.append(Planned(name, seeds, [f"arms/{name}/trial_*"], own, teachers))
        tried.append((where := f"study.arms.{name}: ", own, teachers))
        for teacher in arm.teachers if own.reads_cache else ():
            if teacher in config.study.arms:
                number = min(config.arm_seeds(config.study.arms[teacher]), seeds)
            else:
                number = _members(config).teachers
            if own.distill.mode == "tokens":
                key = teacher, own.data, own.targets
                cached[key] = max((number, where), cached.get(key, (0, where)))
            else:
                write = replace(own.write, keep="all")  # of which those that are right are a part
                writing[teacher, write] = max(number, writing.get((teacher, write), 0))
    texts = sum(number * write.samples for (_, write), number in writing.items())
    by_arm = Counter[str]()
    for number, where in cached.values():
        by_arm[where] += number
    return Plan(stages, by_arm.total(), by_arm, sum(writing.values()), texts, tried)


def _by_mode(config: Config, plan: Plan) -> Plan:
    """Return a plan whose teachers write, where students are trained on their text."""
    if config.distill.mode == "tokens":
        return plan
    texts = plan.teachers * config.write.samples
    return replace(plan, teachers=0, writers=plan.teachers, texts=texts)


def _student(config: Config) -> Config:
    return replace(config, model=config.network())


def _members(config: Config) -> Plan:
    """Return the plan of the members of an ensemble."""
    members, stages = config.members, list[Planned]()
    if trained := members.trained():
        model = members.models[0] if members.models else config.model
        own = replace(config, model=model)
        stages.append(Planned("members on labels", trained, ["members/trial_*"], own))
    imported = len(members.checkpoints) + sum(len(find_members(run)) for run in members.runs)
    found = trained + imported
    if "snapshots" in (members.source, *members.compare):
        stages.append(Planned("one run of snapshots", 1, ["snapshots/trial_*"], config))
    if "specialists" in (members.source, *members.compare):
        title = "specialists, not counted: at most a tenth of the classes"
        stages.append(Planned(title, 0, ["specialists/trial_*"], config))
    one = members.source in ("soup", "greedy_soup", "specialists")
    teachers = 1 if one else min(found, members.use or found)
    return Plan(stages, teachers, imported=imported)
