"""Pruning of a trained model's channels, to be fine-tuned afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from selfkd.config import ModelConfig, Tree
from selfkd.deployment.named import narrower, prune_to
from selfkd.models import parameters_count
from selfkd.models.registry import BUILDERS
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task

SHARED = ("classes", "mean", "std")
"""Metadata in which a model that is fine-tuned must be as the data are."""


def prune(config: Tree, checkpoint: str, fraction: float, save: str) -> Iterator[Row]:
    """Prune a share of a model's channels, and save what is left to be fine-tuned.

    A network of selfkd's own becomes the named network of a smaller width.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        fraction: Share of the channels of each layer that is pruned, in (0, 1).
        save: File to save to, from which `train` can start.

    Yields:
        `hash`, `model` (name and args), `parameters`, `parameters_before` and `remarks` of what was
        rounded or left whole; or the user's mistake.
    """
    task = make_task(config)
    try:
        network, facts = task.load(checkpoint)
        model = ModelConfig.of_checkpoint(facts.model)
        if model.name not in BUILDERS:
            raise ValueError(f"--prune is for selfkd's own networks, got {model.name}")
        found = narrower(model, fraction)
        target = task.make(found.model)
        prune_to(network, target, task.example(2))
        more = {"pruned_from": facts.hash, "pruned": fraction}
        digest = task.save(as_path(save), target, found.model, more)
        _check_data(load_tensors(as_path(checkpoint))[1], load_tensors(as_path(save))[1])
    except ValueError as error:
        yield {"fault": str(error)}
        return
    yield {
        "hash": digest,
        "model": {"name": found.model.name, "args": found.model.args},
        "parameters": parameters_count(target),
        "parameters_before": parameters_count(network),
        "remarks": list(found.remarks),
    }


def _check_data(facts: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Check that a model has the normalisation and the order of classes of the data.

    Args:
        facts: Metadata of the model.
        data: Metadata of a model that was made for the data.

    Raises:
        ValueError: It has not, so that it cannot be fine-tuned on them.
    """
    for key in SHARED:
        if facts.get(key) != data.get(key):
            raise ValueError(
                f"--prune must have a model with the {key} of the data ({data.get(key)}), to be "
                f"fine-tuned on them, got {facts.get(key)}"
            )


JOBS: dict[str, Callable[..., Iterator[Row]]] = {"prune": prune}
