"""Printing of a plan: what is left of a run, what is cached, and about how long that takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfkd.analysis.verdicts import count, short
from selfkd.cli.plan import Plan, Planned
from selfkd.cli.terminal import make_console, print_sentences, print_table
from selfkd.config import Config, ModelConfig, Tree, to_tree, uses_pretrained
from selfkd.config.tasks import tries_teachers
from selfkd.errors import ConfigError
from selfkd.execution.jobs import load_entry
from selfkd.experiments.members import check_sources
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.tables import Table
from selfkd.reporting.words import describe_live, duration
from selfkd.results import Facts, Row, TrialResult, from_row
from selfkd.storage.rows import load_row

ENTRY = "selfkd.worker.jobs:run_job"
STEPS = 25  # of a part that is timed, where epochs are parts of the steps
BATCHES, EPOCHS, SECONDS = 8, 40, 1.0  # batches of an epoch that is timed; ends of the timing
NETWORKS = 8  # networks that are timed at most
_IMAGES = "images: "  # how the note on views begins


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
    tried = dict[str, Facts]()
    if plan.imported is not None:
        check_sources(config, facts, plan.imported)
    for where, own, teachers in plan.tried:
        new = function is None and (own != config or tries_teachers(own))
        tried[where] = _check(own, function, teachers, where=where) if new else facts
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
    lines = [f"network: {config.model.title}"] if config.inputs == "features" else []
    lines += _describe_images(tried or {"": facts})
    if plan.writers and not function:
        lines.append(_describe_text(plan, facts))
    if not function and (plan.teachers or not plan.writers):
        lines.append(_describe_cache(config, plan, facts, tried))
    if facts.transfer and config.data.transfer is not None:
        share = 1 / (1 - config.data.transfer.weight)
        lines.append(
            f"mixed:   steps of students with teachers have {share:.3g} times as many items with "
            "the transfer set, which the time below leaves out"
        )
    lines += [f"live:    {said}" for said in describe_live(config)]
    lines += describe_on_policy(plan, left)
    lines += _describe_gpu(config.resources.gpu)
    lines.append(_describe_time(config, plan, left, done, facts, function))
    print_sentences(console, [*lines, "next:    the same without --plan"])


def _describe_gpu(share: float) -> list[str]:
    """Return what a trial has of a GPU.

    >>> _describe_gpu(0.25), _describe_gpu(0)
    (['gpu:     4 trials share one, each with at most 25% of its memory'], [])
    """
    if share <= 0:
        return []
    if share >= 1:
        return [f"gpu:     {share:g} for each worker"]
    many = int(1 / share)
    return [f"gpu:     {many} trials share one, each with at most {share:.0%} of its memory"]


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


def _describe_images(found: Mapping[str, Facts]) -> list[str]:
    """Return how images are augmented and at which sizes; of several arms, of which.

    Args:
        found: Facts by what the faults of their configs begin with.
    """
    which = dict[str, list[str]]()
    for where, facts in found.items():
        (said,) = [note for note in facts.notes if note.startswith(_IMAGES)] or [""]
        which.setdefault(said, []).append(where.removesuffix(": ").rpartition(".")[2])
    if len(which) == 1:
        return [said for said in which if said]
    return [f"{_IMAGES}{', '.join(names)}: {said.removeprefix(_IMAGES) or 'no data.augment'}"
            for said, names in which.items()]  # fmt: skip


def _span(values: Iterable[int]) -> str:
    """Return a number, or the smallest and the largest of several.

    >>> _span([1, 1]), _span([100, 4000, 1000])
    ('1', '100 to 4,000')
    """
    ordered = sorted(set(values))
    return " to ".join(f"{end:,}" for end in dict.fromkeys([ordered[0], ordered[-1]]))


def _describe_cache(config: Config, plan: Plan, facts: Facts, tried: Mapping[str, Facts]) -> str:
    """Return the size of the cached teacher logits in words."""
    if not config.reads_cache:
        return "cached:  no teacher logits, as teachers are run at each step"
    of = [(tried[where], number) for where, number in plan.cached.items()]
    cached = [(own, own.cached, n) for own, n in of or [(facts, plan.teachers)] if own.cached and n]
    if not cached:
        return "cached:  no teacher logits"
    size = sum(
        number * (own.items["train"] + own.transfer) * own.views * form.row_bytes
        for own, form, number in cached
    )
    which = f"{_span(own.items['train'] for own, *_ in cached)} {facts.unit}"
    if any(own.transfer for own, *_ in cached):
        which += f" and {_span(own.transfer for own, *_ in cached)} of the transfer set"
    views = _span(own.views for own, *_ in cached)
    which += "" if views == "1" else f" in {views} views"
    forms = {f"{form.words}, {form.row_bytes:,} bytes each" for _, form, _ in cached}
    return (
        f"cached:  {short(size)}B of teacher logits, of {count(plan.teachers, 'model')} for "
        f"{which}: {' or '.join(sorted(forms))}"
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
