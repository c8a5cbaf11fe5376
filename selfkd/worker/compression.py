"""Pruning and rounding of a trained model, to be fine-tuned afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from selfkd.config import ModelConfig, Tree
from selfkd.deployment.low_bits import describe_rounded, plain, round_weights
from selfkd.deployment.named import narrower, prune_to
from selfkd.deployment.pruning import prune_channels
from selfkd.deployment.reshape import PRUNED
from selfkd.distill.outputs import take_logits
from selfkd.models import parameters_count
from selfkd.models.registry import BUILDERS
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.worker.faults import Job, saying_faults

SHARED = ("classes", "mean", "std")
"""Metadata in which a model that is fine-tuned must be as the data are."""


@saying_faults
def prune(config: Tree, checkpoint: str, fraction: float, save: str) -> Iterator[Row]:
    """Prune a share of a model's channels, and save what is left to be fine-tuned.

    A network of selfkd's own becomes the named network of a smaller width.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        fraction: Share of the channels of each layer that is pruned, in (0, 1).
        save: File to save to, from which `train` can start.

    Yields:
        `hash`, `model` (name and args), `parameters`, `parameters_before` and `remarks` on what was
        rounded or left whole.
    """
    task = make_task(config)
    network, facts = task.load(checkpoint)
    model = ModelConfig.of_checkpoint(facts.model)
    example = task.inputs("train", 2, like=checkpoint)
    if model.name in BUILDERS:
        found = narrower(model, fraction)
        model, remarks = found.model, list(found.remarks)
        pruned = task.make(model)
        prune_to(network, pruned, example)
    else:
        pruned = deepcopy(network).cpu()
        remarks = prune_channels(pruned, example, fraction)
        setattr(pruned, PRUNED, fraction)
    digest = task.save(as_path(save), pruned, model, {"pruned_from": facts.hash})
    _check_data(checkpoint, save, "--prune")
    _check_same(pruned, task.load(save)[0], example)
    yield {
        "hash": digest,
        "model": {"name": model.name, "args": model.args},
        "parameters": parameters_count(pruned),
        "parameters_before": parameters_count(network),
        "remarks": remarks,
    }


@saying_faults
def round_checkpoint(config: Tree, checkpoint: str, bits: int, save: str) -> Iterator[Row]:
    """Round the weights of a model's linear layers as `bits` of its training does.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        bits: Number of bits.
        save: File for the rounded model.

    Yields:
        `hash` of the rounded model and `remarks` on what is rounded.
    """
    task = make_task(config)
    network, facts = task.load(checkpoint)
    model, said = ModelConfig.of_checkpoint(facts.model), describe_rounded(network, bits)
    round_weights(network, bits)
    digest = task.save(as_path(save), plain(network), model, {"bits": bits})
    _check_data(checkpoint, save, "--bits")
    yield {"hash": digest, "remarks": [said]}


@torch.no_grad()
def _check_same(pruned: nn.Module, loaded: nn.Module, example: Tensor) -> None:
    """Check that a pruned network computes the same once it is loaded.

    Raises:
        ValueError: It does not: its code has sizes that are not those of its weights.
    """
    logits = [take_logits(each.cpu().eval()(example.cpu()), "model") for each in (pruned, loaded)]
    if not torch.equal(*logits):
        raise ValueError(
            f"{type(pruned).__name__} cannot be pruned: it computes otherwise once it is made "
            "again with fewer channels"
        )


def _check_data(checkpoint: str, made: str, option: str) -> None:
    """Check that a model has the normalisation and the order of classes of the data.

    Args:
        checkpoint: File of the model.
        made: File of a model that was made for the data.
        option: Option for which it must have them.

    Raises:
        ValueError: It has not, so that it cannot be fine-tuned on them.
    """
    facts, data = (load_tensors(as_path(path))[1] for path in (checkpoint, made))
    for key in SHARED:
        if facts.get(key) != data.get(key):
            raise ValueError(
                f"{option} must have a model with the {key} of the data ({data.get(key)}), to be "
                f"fine-tuned on them, got {facts.get(key)}"
            )


JOBS: dict[str, Job] = {"prune": prune, "round_checkpoint": round_checkpoint}
