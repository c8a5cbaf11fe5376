"""`--plan`: what a run would train, write and take, before anything starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from selfkd.analysis.verdicts import count, short
from selfkd.cli.terminal import make_console, print_sentences, print_table
from selfkd.config import (
    ARRAYS,
    Config,
    DataConfig,
    ModelConfig,
    Tree,
    WriteConfig,
    to_tree,
    uses_pretrained,
)
from selfkd.config.tasks import tries_teachers
from selfkd.errors import ConfigError
from selfkd.execution.jobs import load_entry
from selfkd.experiments.confirm import baselines, pairs_of
from selfkd.experiments.controls import TITLES
from selfkd.experiments.ensemble import mixes_transfer
from selfkd.experiments.given import has_known_training
from selfkd.experiments.members import check_sources, find_members, trained_networks
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import Table
from selfkd.reporting.words import describe_live, duration
from selfkd.results import Facts, Row, TrialResult, from_row
from selfkd.storage.rows import load_row

ENTRY = "selfkd.worker.jobs:run_job"
STEPS = 25  # of a part that is timed, where epochs are parts of the steps
BATCHES, EPOCHS, SECONDS = 8, 40, 1.0  # batches of an epoch that is timed; ends of the timing
NETWORKS = 8  # networks that are timed at most


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
    if seeds and known:
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
    if config.space(with_teacher=False) or not seeds:
        stages.append(Planned("student from labels only", trials, ["labels/trial_*"], student))
    if seeds:
        arms = 3 if mixes_transfer(config) else 2
        title = "confirmation, all three" if arms == 3 else "confirmation, both"
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
    cached, writing = dict[tuple[str, DataConfig], int](), dict[tuple[str, WriteConfig], int]()
    for name, arm in config.study.arms.items():
        if arm.average:
            continue
        own, seeds = config.at(arm.set), config.arm_seeds(arm)
        others = [config.study.arms[each] for each in arm.teachers if each in config.study.arms]
        teachers = [config.at(other.set).model for other in others]
        stages.append(Planned(name, seeds, [f"arms/{name}/trial_*"], own, teachers))
        tried.append((f"study.arms.{name}: ", own, teachers))
        for teacher in arm.teachers if own.reads_cache else ():
            if teacher in config.study.arms:
                number = min(config.arm_seeds(config.study.arms[teacher]), seeds)
            else:
                number = _members(config).teachers
            if own.distill.mode == "tokens":
                cached[teacher, own.data] = max(number, cached.get((teacher, own.data), 0))
            else:
                write = replace(own.write, keep="all")  # of which those that are right are a part
                writing[teacher, write] = max(number, writing.get((teacher, write), 0))
    texts = sum(number * write.samples for (_, write), number in writing.items())
    return Plan(stages, sum(cached.values()), sum(writing.values()), texts, tried)


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
        stages.append(Planned("specialists", 0, ["specialists/trial_*"], config))
    one = members.source in ("soup", "greedy_soup", "specialists")
    teachers = 1 if one else min(found, members.use or found)
    return Plan(stages, teachers, imported=imported)


def print_plan(
    plan: Plan, name: str, config: Config, folder: RunFolder, function: str | None
) -> None:
    """Print what is left of a run, and about how long that takes.

    Args:
        plan: What the whole run does.
        name: Name of the command.
        config: Config of the run.
        folder: Run folder, which need not be there.
        function: Reference of a user's training function.

    Raises:
        ConfigError: The data or the models are not as the config says.
    """
    # of a worker, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(int(config.resources.cpu), 1)))
    console, facts = make_console(), _check(config, function)
    if plan.imported is not None:
        check_sources(config, facts, plan.imported)
    for where, own, teachers in plan.tried:
        if function is None and (own != config or tries_teachers(own)):
            _check(own, function, teachers, where=where)
    done = [_done(folder, stage.patterns) for stage in plan.stages]
    left = [max(s.trainings - len(d), 0) for s, d in zip(plan.stages, done, strict=True)]
    rows = [
        (stage.title, *_counts(stage.trainings, len(found)), f"{n * _length(stage.config):,}")
        for stage, found, n in zip(plan.stages, done, left, strict=True)
    ]
    whole = sum(n * _length(s.config) for s, n in zip(plan.stages, left, strict=True))
    totals = _counts(sum(s.trainings for s in plan.stages), sum(map(len, done)))
    rows.append(("all", *totals, f"{whole:,}"))
    head = ("stage", "trainings", "done", "steps" if config.steps_by_part else "epochs")
    table = Table(head, tuple(rows), rules=(len(rows) - 1,))
    print_sentences(console, [f"plan of selfkd.{name}, of which nothing is started:"])
    print_table(console, table.without_empty())
    lines = [f"network: {config.model.title}"] if config.data.name == ARRAYS else []
    if plan.writers and not function:
        lines.append(_describe_text(plan, facts))
    if not function and (plan.teachers or not plan.writers):
        lines.append(_describe_cache(config, plan, facts))
    if facts.transfer and config.data.transfer is not None:
        share = 1 / (1 - config.data.transfer.weight)
        lines.append(
            f"mixed:   steps of students with teachers have {share:.3g} times as many items with "
            "the transfer set, which the time below leaves out"
        )
    lines += [f"live:    {said}" for said in describe_live(config)]
    lines += describe_on_policy(plan, left)
    lines.append(_describe_time(config, plan, left, done, facts, function))
    print_sentences(console, [*lines, "next:    the same without --plan"])


def _length(config: Config) -> int:
    """Return the steps of a training where epochs are parts of them, else its epochs."""
    return config.train.steps if config.steps_by_part else config.train.epochs


def _counts(trainings: int, done: int) -> tuple[str, str]:
    return f"{trainings:,}", f"{done:,}" if done else ""


def _done(folder: RunFolder, patterns: Sequence[str]) -> list[TrialResult]:
    """Return the results of trials that a run has had."""
    return [
        load_row(TrialResult, path)
        for pattern in patterns
        if folder.exists()
        for path in folder.path.glob(f"{pattern}/result.json")
    ]


def _job(kind: str, **payload: Any) -> list[Row]:
    """Do a worker's job in this process."""
    return list(load_entry(ENTRY)(kind, payload))


def _check(
    config: Config,
    function: str | None,
    teachers: Sequence[ModelConfig] = (),
    *,
    where: str = "",
) -> Facts:
    if function is None:
        tree = to_tree(config)
        tree["resources"]["gpu"] = 0.0  # where the run is started there may be some
        models = [{"name": model.name, "args": model.args} for model in teachers]
        (row,) = _job("check", config=tree, teachers=models)
    else:
        (row,) = _job("check_function", function=function)
    if "fault" in row:
        raise ConfigError(f"{where}{row['fault']}")
    return from_row(Facts, row["facts"])


def _describe_text(plan: Plan, facts: Facts) -> str:
    """Return how many texts teachers are to write in words."""
    return (
        f"written: {plan.texts * facts.prompts:,} texts by {count(plan.writers, 'model')} on "
        f"{facts.prompts:,} training prompts"
    )


def _describe_cache(config: Config, plan: Plan, facts: Facts) -> str:
    """Return the size of the cached teacher logits in words."""
    if not config.reads_cache:
        return "cached:  no teacher logits, as teachers are run at each step"
    if facts.cached is None or not plan.teachers:
        return "cached:  no teacher logits"
    pools = [facts.items["train"], facts.transfer]
    each, which = facts.cached.row_bytes, f"{pools[0]:,} {facts.unit}"
    if facts.transfer:
        which += f" and {facts.transfer:,} of the transfer set"
    views = f" in {facts.views} views" if facts.views > 1 else ""
    return (
        f"cached:  {short(plan.teachers * sum(pools) * facts.views * each)}B of teacher logits, of "
        f"{count(plan.teachers, 'model')} for {which}{views}: {facts.cached.words}, {each:,} bytes "
        "each"
    )


def describe_on_policy(plan: Plan, left: Sequence[int]) -> list[str]:
    """Return in words what students write themselves, in the stages that are left."""
    found = dict[tuple[int, float], list[str]]()
    for stage, number in zip(plan.stages, left, strict=True):
        share, train = stage.config.distill.on_policy, stage.config.train
        if number and share:
            texts = round(share * train.steps) * train.batch_size * train.accumulate
            found.setdefault((texts, share), []).append(stage.title)
    everywhere = all(stage.config.distill.on_policy for stage in plan.stages)
    lines = []
    for (texts, share), titles in found.items():
        which = "with a teacher" if everywhere else f"of {', '.join(titles)}"
        lines.append(
            f"written: {short(texts)} texts by each student {which}, in {share:.0%} of its steps; "
            "such a step takes two to four times as long as one on labels, which the time below "
            "leaves out"
        )
    return lines


def _describe_time(
    config: Config,
    plan: Plan,
    left: Sequence[int],
    done: Sequence[Sequence[TrialResult]],
    facts: Facts,
    function: str | None,
) -> str:
    """Return about how long the trainings that are left take, and what that stands on."""
    if not sum(left):
        return "time:    nothing is left to train"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(min(int(cpus / config.resources.cpu), sum(left)), 1)
    known = [row.train_seconds for rows in done for row in rows if row.status == "completed"]
    if known:
        mean = sum(known) / len(known)
        seconds, basis = mean * sum(left), f"by the {len(known)} that are done"
    elif why := _unmeasured(config, facts, function):
        return f"time:    no guess, as {why}"
    else:
        waiting = [stage for stage, n in zip(plan.stages, left, strict=True) if n]
        run_live = [own for stage in waiting for own in _live(stage)]
        networks = {_digest(own): own for own in [*(s.config for s in waiting), *run_live]}
        timed = list(networks.values())[:NETWORKS]
        each = {_digest(own): _epoch_seconds(own, facts) for own in timed}
        mean = sum(each.values()) / len(each)

        def epoch(stage: Planned) -> float:
            forward = sum(each.get(_digest(own), mean) for own in _live(stage)) / 3
            return each.get(_digest(stage.config), mean) + forward

        seconds = sum(
            n * stage.config.train.epochs * epoch(stage)
            for stage, n in zip(plan.stages, left, strict=True)
        )
        of = "" if len(each) == 1 else f" of {len(each)} networks"
        basis = f"by short epochs{of} that were timed just now, on the CPUs of one worker"
    at_most = "at most " if config.rounds == "auto" or config.search.scheduler == "asha" else ""
    return (
        f"time:    {at_most}about {_roughly(seconds / workers)} of training on "
        f"{count(workers, 'worker')} of this machine, {basis}; starting Ray, caching logits and "
        "testing come on top, and workers that share memory or cores are slower"
    )


def _roughly(seconds: float) -> str:
    return f"{max(round(seconds), 1)} s" if seconds < 90 else duration(max(seconds, 120))


def _live(stage: Planned) -> list[Config]:
    """Return configs of the teachers that a stage's students run at every step."""
    if not stage.config.distill.runs_teacher:
        return []
    return [replace(stage.config, model=model) for model in stage.teachers]


def _digest(own: Config) -> str:
    return repr((own.model, own.train.batch_size, own.train.optimizer, own.data))


def _unmeasured(config: Config, facts: Facts, function: str | None) -> str | None:
    """Return why no epoch is timed, if none is."""
    resources = config.resources
    if function is not None:
        return "the trainings are those of your own function"
    if resources.gpu:
        return "the trials are to have GPUs, and this process would be timed without"
    if resources.workers > 1:
        return "several workers share a training"
    return "the networks start from pretrained weights" if uses_pretrained(config) else None


def _epoch_seconds(config: Config, facts: Facts) -> float:
    """Return the seconds of an epoch, by some of a few batches in this process."""
    whole_train, whole_val = facts.items["train"], facts.items["val"]
    few = max(BATCHES * config.train.batch_size, 2 * facts.outputs)
    train, val = min(whole_train, few), min(whole_val, few)
    tree: Tree = to_tree(config)
    tree["data"] |= {"train_size": train, "val_size": val}
    tree["train"] |= {"epochs": 1 + EPOCHS, "warmup_epochs": 0}
    if steps := config.steps_by_part:
        few = min(steps, STEPS)
        tree["train"] |= {"steps": few * (1 + EPOCHS), "warmup_steps": 0}
    tree["checkpoint"] = {"seconds": None, "epochs": None}
    with tempfile.TemporaryDirectory() as folder:
        times = [0.0]  # the first epoch warms up
        for row in load_entry(ENTRY)("train", _training(config, tree, Path(folder))):
            times.append(row["seconds"])
            if len(times) > 3 and times[-1] - times[1] > SECONDS:
                break
    seconds = (times[-1] - times[1]) / (len(times) - 2)
    if steps:
        return float(seconds * steps / few)  # each with a whole validation, so too much
    # a validation item costs a forward pass, a third of what a training item does
    return float(seconds * (whole_train + whole_val / 3) / (train + val / 3))


def _training(config: Config, tree: Tree, folder: Path) -> Mapping[str, Any]:
    return {
        "config": tree,
        "stage": "plan",
        "seed": 0,
        "model": {"name": config.model.name, "args": config.model.args},
        "teachers": [],
        "targets": str(folder),
        "student": str(folder / "student.safetensors"),
    }
