"""Tasks: one package for each kind of data, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from selfkd.storage.remote import as_path

if TYPE_CHECKING:
    from torch import nn

    from selfkd.config import Tree
    from selfkd.losses import Average
    from selfkd.tasks.task import Predictor, Task


def make_task(config: Tree) -> Task:
    """Return the task of a config.

    Raises:
        ConfigError: What it takes is not installed.
    """
    if config.get("task") == "text":
        from selfkd.tasks.text.task import TextTask

        return TextTask(config)
    from selfkd.tasks.images.task import ImageTask  # torch and timm: only where work is done

    return ImageTask(config)


def load_predictor(checkpoint: str, make: Callable[[], nn.Module] | None = None) -> Predictor:
    """Return a trained model without its data.

    Args:
        checkpoint: File of the model.
        make: Function that makes its network, where it is of none that is known by its name.

    Raises:
        ValueError: The file is damaged, or its network cannot be made.
    """
    if _is_text(checkpoint):
        from selfkd.tasks.text.loaded import load_language_model

        return load_language_model(checkpoint)
    from selfkd.tasks.images.loaded import load_classifier

    return load_classifier(checkpoint, make)


def load_ensemble(
    checkpoints: Sequence[str], *, average: Average, weights: Sequence[float] | None
) -> Predictor:
    """Return the average of trained models.

    Args:
        checkpoints: File of each model.
        average: What is averaged.
        weights: Weight of each; all alike when not given.

    Raises:
        ValueError: A file is damaged, or its network cannot be made.
    """
    if _is_text(checkpoints[0]):
        from selfkd.tasks.text.loaded import load_mean

        return load_mean(checkpoints, average=average, weights=weights)
    from selfkd.tasks.images.loaded import load_average

    return load_average(checkpoints, average=average, weights=weights)


def is_known(metadata: Mapping[str, Any]) -> bool:
    """Say whether the network of a checkpoint is made by its name: a task has trained it."""
    return "classes" in metadata or "task" in metadata


def _is_text(checkpoint: str) -> bool:
    from selfkd.storage.checkpoint import load_tensors

    path = as_path(checkpoint)
    return path.suffix == ".safetensors" and load_tensors(path)[1].get("task") == "text"
