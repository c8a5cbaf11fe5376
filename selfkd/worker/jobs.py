"""The table of what a worker does, from plain data to plain data: check, train, cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfkd.config import ModelConfig, Tree, from_tree
from selfkd.results import Row, to_row
from selfkd.soft_targets.shards import check_shard, write_shard
from selfkd.soft_targets.upkeep import remember_user
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import NO_ROOM
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.tasks.task import Pool
from selfkd.training.device import (
    describe_gpu,
    precision_of,
    prepare_device,
    ran_out,
    saying_memory,
)
from selfkd.training.functions import load_function
from selfkd.training.trial import Trial, run_function
from selfkd.worker import compression, deploy, ensembling, evaluate, teachers


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Do the job that `kind` names; yield what it reports.

    Raises:
        DeviceMemoryError: The memory of the GPU does not do; says what it was taken by.
    """
    with saying_memory(payload.get("config"), kind):
        yield from _JOBS[kind](**payload)


def check(config: Tree, teachers: Sequence[Row] = ()) -> Iterator[Row]:
    """Load the data and try the networks; yield the facts, or the user's mistake.

    Args:
        config: Config of the run.
        teachers: Networks that may teach, with which the further terms of the loss are tried.
    """
    try:
        facts = make_task(config).check(teachers)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if ran_out(error):
            raise
        yield {"fault": str(error)}
        return
    yield {"facts": to_row(facts)}


def describe_device(config: Tree) -> Iterator[Row]:
    """Yield what a worker computes on: `amp` that auto is, and of a GPU its name and memory.

    Args:
        config: Config of the run.
    """
    try:
        device = prepare_device(from_tree(config))
    except ValueError as error:
        yield {"fault": str(error)}
        return
    yield {"amp": precision_of("auto", device), **(describe_gpu() if device != "cpu" else {})}


def check_function(function: str) -> Iterator[Row]:
    """Import a training function; yield its name as a fact, or the user's mistake."""
    try:
        load_function(function)
    except ValueError as error:
        yield {"fault": str(error)}
        return
    yield {"facts": {"function": function}}


def train(
    config: Tree,
    stage: str,
    seed: int,
    model: Tree,
    teachers: Sequence[Mapping[str, Any]],
    targets: str,
    student: str,
    function: str | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Train one student and yield a row an epoch; one with which it is saved has its hash.

    Args:
        config: Config of the trial, values of the search put in.
        stage: Name of its stage, for messages and metadata.
        seed: Seed of initialisation, order and dropout.
        model: Network of the student.
        teachers: `hash`, `checkpoint` and perhaps `weight` of each; none to train on labels.
        targets: Folder of the cached teacher logits.
        student: File to save to.
        function: Reference of a user's training function.
        options: Further arguments of the task's training.
    """
    depends = {"function": function, **options}
    start = options.get("start") or {}
    if "checkpoint" in start:  # by what is in it: a run folder can be moved
        depends["start"] = load_tensors(as_path(start["checkpoint"]))[1]["hash"]
    trial = Trial(
        config=from_tree(config),
        stage=stage,
        seed=seed,
        model=ModelConfig(**model),
        teachers=teachers,
        targets=as_path(targets),
        path=as_path(student),
        more=depends,
    )
    if function is not None:
        yield from run_function(load_function(function), trial)
    else:
        yield from make_task(config).train(trial, **options)


def cache_teacher_logits(
    config: Tree,
    checkpoint: str,
    targets: str,
    view: int,
    shard: int,
    run: str,
    of: Pool = "train",
) -> Iterator[Row]:
    """Cache a teacher's logits of a shard of the training items, unless they are there.

    Args:
        config: Config of the students.
        checkpoint: File of the teacher.
        targets: Folder of the cached teacher logits.
        view: View of the items.
        shard: Number of the shard.
        run: Run folder that uses them.
        of: Whether the items are those of training, or of the transfer set.

    Yields:
        `state`: kept, written, or remade where what was there was damaged.
    """
    task = make_task(config)
    root = as_path(targets)
    origin = {"checkpoint": str(as_path(checkpoint).absolute()), "config": config}
    manifest = task.manifest(task.digest(checkpoint), origin, of=of)
    with _room(root, "the teacher logits"):
        # first of all: a store that is being written must not look like one that nobody uses
        remember_user(root, manifest.teacher, manifest.data, as_path(run))
        found = check_shard(root, manifest, view=view, shard=shard)
        if found != "whole":
            logits = task.predict_batches(checkpoint, manifest.rows(shard), view=view, of=of)
            write_shard(root, manifest, view=view, shard=shard, logits=logits)
    yield {"state": {"whole": "kept", "absent": "written", "damaged": "remade"}[found]}


def export(config: Tree, checkpoint: str, folder: str, card: str) -> Iterator[Row]:
    """Write a model for other programs.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        folder: Folder to write.
        card: Text of its card.
    """
    make_task(config).export(checkpoint, as_path(folder), card)
    yield {"state": "written"}


def write(config: Tree, checkpoint: str, targets: str, shard: int, run: str) -> Iterator[Row]:
    """Write text by a teacher on the training prompts of a shard, unless it is there.

    Args:
        config: Config of the students.
        checkpoint: File of the teacher.
        targets: Folder of all that teachers write.
        shard: Number of the shard.
        run: Run folder that uses it.

    Yields:
        `state`: kept, written, or remade where what was there was damaged; and numbers of texts.
    """
    task, root = make_task(config), as_path(targets)
    with _room(root, "the text of teachers"):
        row = task.write(checkpoint, root, shard=shard, run=as_path(run))
    yield row


@contextmanager
def _room(root: Path, what: str) -> Iterator[None]:
    """Say what to do where the disk of teachers is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"targets.root must have room for {what}, got {root}, which is full: free some, or "
            "resume with --set targets.root=FOLDER on another disk"
        ) from None


_JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "check": check,
    "check_function": check_function,
    "describe_device": describe_device,
    "train": train,
    "cache_teacher_logits": cache_teacher_logits,
    "export": export,
    "write": write,
    **evaluate.JOBS,
    **ensembling.JOBS,
    **deploy.JOBS,
    **compression.JOBS,
    **teachers.JOBS,
}
