"""What a worker measures of a trained model: accuracy, calibration, fidelity to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from selfkd.analysis import metrics
from selfkd.analysis.statistics import mcnemar, mean_over_images
from selfkd.config import Tree
from selfkd.models import parameters_count
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks.images.task import Bench, Split

SPLITS: tuple[Split, Split] = ("val", "test")  # what is predicted and kept


def score(
    config: Tree,
    student: str,
    predictions: str | None = None,
    teachers: Sequence[Mapping[str, Any]] = (),
    diagnose: bool = False,
) -> Iterator[Row]:
    """Measure a model on the test split, once.

    Args:
        config: of the run.
        student: checkpoint of the model.
        predictions: file that its validation and test logits are saved to, if any.
        teachers: `checkpoint`, perhaps `weight`, of each of its teachers, for the agreement with
            their average.
        diagnose: whether to look at it closely, on both splits: see `diagnoses`.
    """
    bench = Bench(config)
    mark = bench.hash(student)
    seen = bench.config.data.classes
    splits = SPLITS if predictions is not None or diagnose or seen else SPLITS[1:]
    logits = {split: bench.answer(student, split) for split in splits}
    if predictions is not None:
        by_name = {str(split): answers for split, answers in logits.items()}
        save_tensors(as_path(predictions), by_name, {"student": mark})
    size = sum(parameters_count(network) for network in bench.networks(student))
    row = {"hash": mark, "parameters": size, **measure_test(bench, logits)}
    taught: dict[Split, Tensor] = {}
    if teachers:
        weights = [member["weight"] for member in teachers if "weight" in member]
        for split in splits:
            answers = [bench.answer(member["checkpoint"], split) for member in teachers]
            taught[split] = metrics.ensemble_logits(
                torch.stack(answers),
                average=bench.config.distill.average,
                weights=weights or None,
            )
        row["agreement"] = metrics.agreement(logits["test"], taught["test"])
        row["mcnemar"] = compare_errors(logits["test"], taught["test"], bench.labels("test"))
    if seen:
        row["unseen"] = of_unseen(bench, logits, seen)
    if diagnose:
        row["diagnostics"] = diagnoses(bench, logits, taught)
    yield row


def measure_test(bench: Bench, logits: Mapping[Split, Tensor]) -> Row:
    """Return what is measured on the test split."""
    labels = bench.labels("test")
    return {
        "test_accuracy": metrics.accuracy(logits["test"], labels),
        "test_nll": metrics.nll(logits["test"], labels),
        "test_ece": metrics.ece(logits["test"], labels),
    }


def of_unseen(bench: Bench, logits: Mapping[Split, Tensor], seen: Sequence[int]) -> Row:
    """Return what becomes of classes that a student has seen no image of.

    Args:
        bench: has the labels.
        logits: of the student, on validation and test.
        seen: the classes that it was trained on images of.

    Returns:
        The `classes` that it has not seen, the `bias` of `metrics.fit_bias` that is added to
        their logits, fitted on validation, test accuracy by class without and with it, and
        `test_accuracy` with it; and the same of the `biases` of all classes
        (`metrics.fit_biases`), as `all_biased`.
    """
    classes = [label for label in range(bench.data.num_classes) if label not in seen]
    if not classes:
        return {"classes": []}
    bias = metrics.fit_bias(logits["val"], bench.labels("val"), classes=classes)
    labels = bench.labels("test")
    shifted = logits["test"].double()
    shifted[:, classes] += bias
    biases = metrics.fit_biases(logits["val"], bench.labels("val"), classes=classes)
    return {
        "classes": classes,
        "bias": bias,
        "class_accuracy": metrics.class_accuracy(logits["test"], labels),
        "biased_class_accuracy": metrics.class_accuracy(shifted, labels),
        "test_accuracy": metrics.accuracy(shifted, labels),
        "all_biased": {
            "biases": biases,
            "test_accuracy": metrics.accuracy(
                logits["test"].double() + torch.tensor(biases), labels
            ),
        },
    }


def compare_errors(student: Tensor, teacher: Tensor, labels: Tensor) -> Row:
    """Return how many images only one of two models has right, and McNemar's exact p.

    >>> from selfkd.worker.evaluate import compare_errors
    >>> one, other = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    >>> compare_errors(one, other, torch.tensor([0, 0, 0]))
    {'only_student': 3, 'only_teacher': 0, 'p': 0.25}
    """
    by_student = student.argmax(dim=-1) == labels
    by_teacher = teacher.argmax(dim=-1) == labels
    only_student = int((by_student & ~by_teacher).sum())
    only_teacher = int((by_teacher & ~by_student).sum())
    p = mcnemar(only_student, only_teacher)
    return {"only_student": only_student, "only_teacher": only_teacher, "p": p}


def diagnoses(
    bench: Bench, logits: Mapping[Split, Tensor], taught: Mapping[Split, Tensor]
) -> dict[str, Row]:
    """Return calibration, and fidelity to the teacher if there is one, of each split.

    Args:
        bench: has the labels.
        logits: of the model, by split.
        taught: of its teacher.
    """
    temperature = metrics.fit_temperature(logits["val"], bench.labels("val"))
    names = [str(name) for name in bench.data.class_names]
    return {
        split: diagnosis(
            answers,
            bench.labels(split),
            names=names,
            temperature=temperature,
            taught=taught.get(split),
        )
        for split, answers in logits.items()
    }


def diagnosis(
    logits: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str],
    temperature: float,
    taught: Tensor | None = None,
) -> Row:
    """Return calibration, and fidelity to the teacher if there is one.

    Args:
        logits: `[rows, classes]` of the model.
        labels: `[rows]`.
        names: of the classes.
        temperature: that was fitted on validation.
        taught: `[rows, classes]` of its teacher.
    """
    scaled = logits.double() / temperature
    predicted = logits.argmax(dim=-1)
    row: Row = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels),
        "brier": metrics.brier(logits, labels),
        "ece": metrics.ece(logits, labels),
        "scaled": {
            "temperature": temperature,
            "nll": metrics.nll(scaled, labels),
            "brier": metrics.brier(scaled, labels),
            "ece": metrics.ece(scaled, labels),
        },
        "reliability": metrics.reliability(logits, labels),
        "class_accuracy": metrics.class_accuracy(logits, labels),
        "confusions": metrics.confusions(predicted, labels, names=names),
        "agreement": None,
        "kl": None,
        "teacher_confusions": [],
    }
    if taught is not None:
        repeated = predicted == taught.argmax(dim=-1)
        row |= {
            "agreement": metrics.agreement(logits, taught),
            "kl": metrics.mean_kl(taught, logits),
            "teacher_confusions": metrics.confusions(
                predicted[repeated], labels[repeated], names=names
            ),
        }
    return row


def contrast(config: Tree, ensembles: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """Compare ensembles on the test images, from saved predictions.

    Args:
        config: of the run.
        ensembles: `hash` and file of `predictions` of the members of each.

    Yields:
        `accuracy` of each with its interval over images, `differences`: the first one's less
        each one's, image by image, and how many `images`.
    """
    bench = Bench(config)
    labels = bench.labels("test")
    hits = []
    for members in ensembles:
        logits = torch.stack([load_predictions(member)["test"] for member in members])
        right = metrics.ensemble_logits(logits).argmax(dim=-1) == labels
        hits.append(right.double().numpy())
    yield {
        "accuracy": [asdict(mean_over_images(each)) for each in hits],
        "differences": [asdict(mean_over_images(hits[0] - each)) for each in hits],
        "images": len(labels),
    }


def load_predictions(member: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a model's saved logits by split.

    Raises:
        ValueError: they are another model's.
    """
    logits, facts = load_tensors(as_path(member["predictions"]))
    if facts["student"] != member["hash"]:
        raise ValueError(f"{member['predictions']} was written by another model")
    return logits


JOBS: dict[str, Callable[..., Iterator[Row]]] = {"score": score, "contrast": contrast}
