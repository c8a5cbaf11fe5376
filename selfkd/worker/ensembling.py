"""What a worker does with several trained models: import, average, fit weights, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.config import CheckpointConfig, ModelConfig, Tree
from selfkd.distill.soups import average_weights, fit_weights, greedy_soup
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.training.device import ran_out

TIMED_SECONDS = 0.2


def import_checkpoint(config: Tree, save: str, source: Tree | None = None) -> Iterator[Row]:
    """Import a model that was trained elsewhere; yield its metrics, or the user's mistake.

    Args:
        config: Config of the run.
        save: Its checkpoint here; that of another run's model is there already.
        source: The `CheckpointConfig` of a file from elsewhere.

    Yields:
        `hash`, `model`, `metrics` on validation, whether it was trained on the `same_data`, and a
        `said`, what the user is to know of the file.
    """
    task = make_task(config)
    said = None
    try:
        if source is not None:
            said = task.import_weights(CheckpointConfig(**source), as_path(save))
        _, facts = task.load(save)
        logits = task.predict(save, "val")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if ran_out(error):
            raise
        yield {"fault": str(error)}
        return
    yield {
        "hash": facts.hash,
        "model": facts.model,
        "same_data": facts.fingerprint == task.fingerprint,
        "metrics": task.evaluate({"val": logits}, task.networks(save)),
        "said": said,
    }


def fit_ensemble_weights(config: Tree, checkpoints: Sequence[str]) -> Iterator[Row]:
    """Fit the weights of an ensemble on validation; yield them."""
    task = make_task(config)
    logits = torch.stack([task.predict(checkpoint, "val") for checkpoint in checkpoints])
    average = task.config.distill.average
    yield {"weights": fit_weights(logits, task.labels("val"), average=average)}


def average_checkpoints(
    config: Tree, checkpoints: Sequence[str], save: str, greedy: bool
) -> Iterator[Row]:
    """Average the weights of models of one architecture; yield the hash of what comes out.

    Args:
        config: Config of the run.
        checkpoints: Files of the models, the best on validation first.
        save: File for the average.
        greedy: Take only those that do not make `search.metric` worse.
    """
    task = make_task(config)
    states, facts = zip(*(load_tensors(as_path(path)) for path in checkpoints), strict=True)
    if any(other["model"] != facts[0]["model"] for other in facts):
        names = ", ".join(json.dumps(other["model"]) for other in facts)
        raise ValueError(f"a soup must be of members of the same model, got {names}")
    network, _ = task.load(checkpoints[0])
    model = ModelConfig.of_checkpoint(facts[0]["model"])
    search = task.config.search

    def load_weights(state: Mapping[str, Tensor]) -> nn.Module:
        network.load_state_dict(state)
        task.refresh(network)
        return network

    def value(state: dict[str, Tensor]) -> float:
        own = load_weights(state)
        found = task.evaluate({"val": task.predict_with(own, "val")}, [own])[search.metric]
        return found if search.mode == "max" else -found

    taken = list(range(len(states)))
    if greedy:
        mean, taken = greedy_soup(states, value)
    else:
        mean = average_weights(states)
    more = {"soup": [facts[number]["hash"] for number in taken]}
    yield {"hash": task.save(as_path(save), load_weights(mean), model, more), "taken": taken}


def cluster_outputs(config: Tree, checkpoint: str, clusters: int) -> Iterator[Row]:
    """Cluster the outputs that a model confuses; yield the clusters."""
    yield {"clusters": make_task(config).confusable(checkpoint, clusters)}


def time(config: Tree, models: Sequence[Sequence[str]], batches: Sequence[int]) -> Iterator[Row]:
    """Time the predictions of models, or of several one after the other, on one thread.

    Args:
        config: Config of the run.
        models: Checkpoints of the networks that one prediction takes, for each.
        batches: Numbers of items that are predicted at once.

    Yields:
        `rows`: for each, its `parameters` and milliseconds an item by batch.
    """
    task = make_task(config)
    rows = []
    for checkpoints in models:
        networks = [network.eval() for path in checkpoints for network in task.networks(path)]
        row: Row = {"parameters": sum(p.numel() for n in networks for p in n.parameters())}
        for batch in batches:
            row[f"ms_{batch}"] = _seconds(networks, task.example(batch)) * 1000 / batch
        rows.append(row)
    yield {"rows": rows}


@torch.inference_mode()
def _seconds(networks: Sequence[nn.Module], inputs: Any) -> float:
    from torch.utils.benchmark import Timer  # slow to import

    timer = Timer(
        "for network in networks: network(inputs)",
        globals={"networks": networks, "inputs": inputs},
        num_threads=1,
    )
    return float(timer.blocked_autorange(min_run_time=TIMED_SECONDS).median)


JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "import_checkpoint": import_checkpoint,
    "fit_ensemble_weights": fit_ensemble_weights,
    "average_checkpoints": average_checkpoints,
    "cluster_outputs": cluster_outputs,
    "time": time,
}
