"""What is measured of a classifier: accuracy, calibration, fidelity to its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from selfkd.analysis import metrics
from selfkd.results import Biases, Bin, Confusion, Diagnostics, Unseen
from selfkd.tasks.task import Split


def measure(predicted: Mapping[Split, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the metrics of logits and labels by split.

    >>> measure({"val": (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))})["val_accuracy"]
    1.0
    """
    found = {}
    for split, (logits, labels) in predicted.items():
        found[f"{split}_accuracy"] = metrics.accuracy(logits, labels)
        found[f"{split}_nll"] = metrics.nll(logits, labels)
        if split == "test":
            found["test_ece"] = metrics.ece(logits, labels)
            found["test_errors"] = float(_errors(logits, labels))
    return found


def _errors(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=-1) != labels).sum())


def measure_unseen(
    logits: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    *,
    seen: Sequence[int],
    classes: int,
) -> Unseen:
    """Return what becomes of classes that a student was trained on no image of.

    Args:
        logits: Logits `[images, classes]` on validation and on test.
        labels: Labels `[images]` of the same.
        seen: Classes that it was trained on images of.
        classes: Number of classes.

    Returns:
        The unseen classes, the `bias` of `metrics.fit_bias` that is added to their logits, fitted
        on validation, test accuracy by class without and with it, and test accuracy with it; and
        test accuracy with the biases of all classes (`metrics.fit_biases`).
    """
    others = [label for label in range(classes) if label not in seen]
    if not others:
        return Unseen(classes=())
    bias = metrics.fit_bias(logits[0], labels[0], classes=others)
    shifted = logits[1].double()
    shifted[:, others] += bias
    biases = metrics.fit_biases(logits[0], labels[0], classes=others)
    biased = logits[1].double() + torch.tensor(biases)
    return Unseen(
        classes=tuple(others),
        bias=bias,
        class_accuracy=tuple(metrics.class_accuracy(logits[1], labels[1])),
        biased_class_accuracy=tuple(metrics.class_accuracy(shifted, labels[1])),
        metrics=_tested(shifted, labels[1]),
        all_biased=Biases(biases=tuple(biases), metrics=_tested(biased, labels[1])),
    )


def _tested(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "test_accuracy": metrics.accuracy(logits, labels),
        "test_errors": float(_errors(logits, labels)),
    }


def diagnosis(
    logits: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str],
    temperature: float,
    teacher_logits: Tensor | None = None,
) -> Diagnostics:
    """Return calibration, and fidelity to the teacher where there is one.

    Args:
        logits: Logits `[images, classes]` of the model.
        labels: Labels `[images]`.
        names: Names of the classes.
        temperature: Temperature that was fitted on validation.
        teacher_logits: Logits `[images, classes]` of its teacher.
    """
    scaled = logits.double() / temperature
    predicted = logits.argmax(dim=-1)
    found = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels),
        "brier": metrics.brier(logits, labels),
        "ece": metrics.ece(logits, labels),
    }
    repeated: Sequence[Confusion] = ()
    if teacher_logits is not None:
        same = predicted == teacher_logits.argmax(dim=-1)
        found["agreement"] = metrics.agreement(logits, teacher_logits)
        found["kl"] = metrics.mean_kl(teacher_logits, logits)
        repeated = _confusions(predicted[same], labels[same], names)
    return Diagnostics(
        metrics=found,
        scaled={
            "temperature": temperature,
            "nll": metrics.nll(scaled, labels),
            "brier": metrics.brier(scaled, labels),
            "ece": metrics.ece(scaled, labels),
        },
        reliability=tuple(Bin(**row) for row in metrics.reliability(logits, labels)),
        class_accuracy=tuple(metrics.class_accuracy(logits, labels)),
        confusions=tuple(_confusions(predicted, labels, names)),
        teacher_confusions=tuple(repeated),
    )


def _confusions(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> list[Confusion]:
    return [Confusion(**row) for row in metrics.confusions(predicted, labels, names=names)]
