"""What a worker measures of trained models, alone and averaged, whatever they predict."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.analysis.statistics import bootstrap_interval, mcnemar
from selfkd.config import Tree
from selfkd.losses import Average, ensemble_logits
from selfkd.models import parameters_count
from selfkd.results import Evaluation, McNemar, Row, to_row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.tasks.task import SPLITS, Split, Task


def evaluate(
    config: Tree,
    student: str,
    predictions: str | None = None,
    teachers: Sequence[Mapping[str, Any]] = (),
    diagnose: bool = False,
    validate: bool = False,
) -> Iterator[Row]:
    """Evaluate a model on the test split, once, and on validation where it is needed.

    Args:
        config: Config of its data.
        student: File of the model.
        predictions: File for its validation and test logits, if they are kept.
        teachers: `hash`, `checkpoint`, perhaps `weight` and file of `predictions`, of each of its
            teachers, for the agreement with their average.
        diagnose: Whether to look at calibration and confusions, on both splits, and at what it
            generates.
        validate: Whether to evaluate it on validation even so.
    """
    task = make_task(config)
    digest = task.digest(student)
    whole = predictions is not None or diagnose or validate
    splits = SPLITS if whole else task.evaluated
    logits: dict[Split, Tensor] = {split: task.predict(student, split) for split in splits}
    if predictions is not None:
        by_name = {str(split): own for split, own in logits.items()}
        save_tensors(as_path(predictions), by_name, {"student": digest})
    found = task.evaluate(logits, task.networks(student))
    teacher_logits: dict[Split, Tensor] = {}
    compared = None
    if teachers:
        average = task.config.distill.average
        for split in splits:
            members = [_predicted(task, member, split) for member in teachers]
            teacher_logits[split] = average_logits(members, teachers, average)
        found |= task.fidelity(logits["test"], teacher_logits["test"])
        hits = task.hits(logits["test"], "test", task.networks(student))
        if hits is not None:
            of_teachers = task.hits(
                teacher_logits["test"],
                "test",
                _networks(task, teachers),
                average=average,
                weights=weights_of(teachers),
            )
            compared = None if of_teachers is None else compare_errors(hits, of_teachers)
    if diagnose:
        found |= task.measure_samples(student, teachers)
    yield to_row(
        Evaluation(
            hash=digest,
            parameters=sum(parameters_count(network) for network in task.networks(student)),
            metrics=found,
            mcnemar=compared,
            unseen=task.unseen(logits),
            diagnostics=task.diagnose(logits, teacher_logits) if diagnose else {},
        )
    )


def _predicted(task: Task, teacher: Mapping[str, Any], split: Split) -> Tensor:
    """Return a teacher's logits: those that its own evaluation has saved, else predicted."""
    with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
        return load_predictions(teacher)[split]
    return task.predict(teacher["checkpoint"], split)


def average_logits(
    logits: Sequence[Tensor], members: Sequence[Mapping[str, Any]], average: Average
) -> Tensor:
    """Return the logits of an average of models.

    Args:
        logits: Logits `[items, outputs]` of each model.
        members: Rows of the models, with a `weight` where they differ.
        average: What is averaged.
    """
    stacked = torch.stack(list(logits))
    return ensemble_logits(stacked, average=average, weights=weights_of(members))


def _networks(task: Task, members: Sequence[Mapping[str, Any]]) -> Iterator[nn.Module]:
    """Yield the networks of models, loaded where they are asked for."""
    for member in members:
        yield from task.networks(member["checkpoint"])


def weights_of(members: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the weights of the models of an average; None where all are alike."""
    return [member["weight"] for member in members if "weight" in member] or None


def compare_errors(student: Tensor, teacher: Tensor) -> McNemar:
    """Return how many items only one of two models has right, and McNemar's exact p.

    Args:
        student: Whether each item is right, bool `[items]`.
        teacher: The same of the other model.

    >>> one, other = torch.tensor([True] * 3), torch.tensor([False] * 3)
    >>> compare_errors(one, other)
    McNemar(only_student=3, only_teacher=0, p=0.25)
    """
    only_student = int((student & ~teacher).sum())
    only_teacher = int((teacher & ~student).sum())
    p = mcnemar(only_student, only_teacher)
    return McNemar(only_student=only_student, only_teacher=only_teacher, p=p)


def average(config: Tree, ensembles: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Evaluate averages of several models, from their saved predictions.

    Args:
        config: Config of their data.
        ensembles: `members` (`hash`, `checkpoint`, file of `predictions`, perhaps `weight`) and
            `average` of each.

    Yields:
        `rows`, one each.
    """
    task = make_task(config)
    rows = []
    for ensemble in ensembles:
        members = ensemble["members"]
        saved = [load_predictions(member) for member in members]
        mean: dict[Split, Tensor] = {
            split: average_logits([own[split] for own in saved], members, ensemble["average"])
            for split in SPLITS
        }
        digest = "+".join(member["hash"] for member in members)
        found = task.evaluate(
            mean,
            _networks(task, members),
            average=ensemble["average"],
            weights=weights_of(members),
        )
        rows.append(to_row(Evaluation(hash=digest, metrics=found)))
    yield {"rows": rows}


def contrast(config: Tree, ensembles: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """Compare ensembles by the task's metric on the test items, from saved predictions.

    Args:
        config: Config of their data.
        ensembles: `hash`, `checkpoint` and file of `predictions` of the members of each.

    Yields:
        `values` of each with their intervals over items, and `differences`: the first one's less
        each one's, item by item.
    """
    task = make_task(config)
    scores = []
    for members in ensembles:
        logits = [load_predictions(member)["test"] for member in members]
        mean = average_logits(logits, members, "probabilities")
        scores.append(task.scores(mean, "test", _networks(task, members)).numpy())
    yield {
        "values": [asdict(bootstrap_interval(each)) for each in scores],
        "differences": [asdict(bootstrap_interval(scores[0] - each)) for each in scores],
    }


def examples(config: Tree, models: Sequence[Mapping[str, Any]], most: int) -> Iterator[Row]:
    """Find the test items that tell two models apart, from saved predictions, with pictures.

    Args:
        config: Config of their data.
        models: `hash` and file of `predictions` of both.
        most: Number of items of either kind.

    Yields:
        `counts`, `gained` and `lost`, see `Examples`; none where items are no pictures.
    """
    task = make_task(config)
    if not task.pictures("test", [0]):
        yield {}
        return
    labels = task.labels("test")
    logits = [load_predictions(model)["test"].double() for model in models]
    hits = [task.scores(own, "test") > 0 for own in logits]
    probabilities = torch.stack([own.softmax(dim=-1) for own in logits])
    confidence, predicted = probabilities.max(dim=-1)
    change = probabilities.gather(-1, labels.expand(2, -1)[..., None])[..., 0].diff(dim=0)[0]
    found: Row = {}
    counts = []
    for name, right in (("gained", hits[1] & ~hits[0]), ("lost", hits[0] & ~hits[1])):
        places = right.nonzero()[:, 0]
        counts.append(len(places))
        chosen = places[change[places].abs().argsort(descending=True, stable=True)][:most].tolist()
        pictures = task.pictures("test", chosen)
        found[name] = [
            {
                "item": item,
                "label": int(labels[item]),
                "predicted": predicted[:, item].tolist(),
                "confidence": confidence[:, item].tolist(),
                "picture": base64.b64encode(picture).decode(),
            }
            for item, picture in zip(chosen, pictures, strict=True)
        ]
    yield found | {"counts": counts}


def load_predictions(member: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a model's saved logits by split.

    Raises:
        ValueError: They are another model's.
    """
    logits, facts = load_tensors(as_path(member["predictions"]))
    if facts["student"] != member["hash"]:
        raise ValueError(f"{member['predictions']} was written by another model")
    return logits


JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "evaluate": evaluate,
    "average": average,
    "contrast": contrast,
    "examples": examples,
}
