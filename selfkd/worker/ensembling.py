"""What a worker does with several trained models: take them in, measure, blend, time them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.benchmark import Timer

from selfkd.analysis import metrics
from selfkd.config import CheckpointConfig, ModelConfig, Tree, parse_yaml
from selfkd.distill.averaging import average_weights, fit_weights, greedy_soup
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks.images.specialists import cluster_classes
from selfkd.tasks.images.task import Bench, Split
from selfkd.training.fit import evaluate
from selfkd.worker.evaluate import SPLITS, load_predictions, measure_test

TIMED_SECONDS = 0.5
CLUSTER_TEMPERATURE = 4.0


def adopt(config: Tree, save: str, source: Tree | None = None) -> Iterator[Row]:
    """Take in a model that was trained elsewhere; yield its measures, or the user's mistake.

    Args:
        config: of the run.
        save: its checkpoint here; of another run's model it is there already.
        source: the `CheckpointConfig` of a foreign file.
    """
    bench = Bench(config)
    try:
        if source is not None:
            _adopt_file(bench, CheckpointConfig(**source), as_path(save))
        _, facts = bench.load(save)
        logits = bench.answer(save, "val")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        yield {"fault": str(error)}
        return
    yield {
        "hash": facts["hash"],
        "model": facts["model"],
        "seen": facts.get("fingerprint") == bench.data.fingerprint,
        "val_accuracy": metrics.accuracy(logits, bench.labels("val")),
        "val_nll": metrics.nll(logits, bench.labels("val")),
    }


def _adopt_file(bench: Bench, source: CheckpointConfig, save: Path) -> None:
    model = ModelConfig(name=source.model, args=source.args)
    names = list(bench.data.class_names)
    if source.classes is not None:
        listed = parse_yaml(Path(source.classes).read_text(), source.classes)
        if not isinstance(listed, list):
            raise ValueError(f"{source.classes} must be a list of class names, got {listed!r}")
        names = [str(name) for name in listed]
        if sorted(names) != sorted(bench.data.class_names):
            raise ValueError(
                f"{source.path} must tell {bench.data.name}'s {bench.data.num_classes} classes "
                f"apart, got {len(names)} others in {source.classes}"
            )
    network = bench.make(model)
    try:
        network.load_state_dict(load_state_dict(source.path))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - reading what is no checkpoint may end in any error
        first = str(error).strip().splitlines()
        raise ValueError(
            f"{source.path} must fit {source.model!r} with {source.args} for "
            f"{bench.data.num_classes} classes: {' '.join(first[:2])}"
        ) from None
    more: Row = {"classes": names, "fingerprint": None, "from": source.path}
    if source.mean is not None:
        more |= {"mean": source.mean, "std": source.std}
    bench.save(save, network, model, more)


def measure(config: Tree, ensembles: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Measure averages of several models, from their saved predictions, one row each.

    Args:
        config: of the run.
        ensembles: `members` (`hash`, file of `predictions`, perhaps `weight`) and `average` of
            each; one member is measured as it is.
    """
    bench = Bench(config)
    rows = []
    for ensemble in ensembles:
        saved = [load_predictions(member) for member in ensemble["members"]]
        weights = _weights(ensemble["members"])
        mean: dict[Split, Tensor] = {
            split: metrics.ensemble_logits(
                torch.stack([logits[split] for logits in saved]),
                average=ensemble.get("average", "probabilities"),
                weights=weights,
            )
            for split in SPLITS
        }
        labels = bench.labels("val")
        rows.append(
            {
                "val_accuracy": metrics.accuracy(mean["val"], labels),
                "val_nll": metrics.nll(mean["val"], labels),
                **measure_test(bench, mean),
            }
        )
    yield {"rows": rows}


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    return [row["weight"] for row in rows] if "weight" in rows[0] else None


def weigh(config: Tree, checkpoints: Sequence[str]) -> Iterator[Row]:
    """Fit the weights of an ensemble on validation; yield them."""
    bench = Bench(config)
    logits = torch.stack([bench.answer(checkpoint, "val") for checkpoint in checkpoints])
    average = bench.config.distill.average
    yield {"weights": fit_weights(logits, bench.labels("val"), average=average)}


def soup(config: Tree, checkpoints: Sequence[str], save: str, greedy: bool) -> Iterator[Row]:
    """Average the weights of models of one architecture; yield the hash of what comes out.

    Args:
        config: of the run.
        checkpoints: the best on validation first.
        save: file for the average.
        greedy: take only those that do not make `search.metric` worse.
    """
    bench = Bench(config)
    states, facts = zip(*(load_tensors(as_path(path)) for path in checkpoints), strict=True)
    if any(other["model"] != facts[0]["model"] for other in facts):
        names = ", ".join(json.dumps(other["model"]) for other in facts)
        raise ValueError(f"a soup must be of members of the same model, got {names}")
    network, _ = bench.load(checkpoints[0])

    def pour(state: Mapping[str, Tensor]) -> nn.Module:
        network.load_state_dict(state)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            batches = bench.data.batches("train", batch_size=500, device=bench.device)
            update_bn((inputs for inputs, _, _ in batches), network)
        return network

    search = bench.config.search

    def value(state: dict[str, Tensor]) -> float:
        measured = evaluate(pour(state), bench.data, device=bench.device)
        found = measured[search.metric.removeprefix("val_")]
        return found if search.mode == "max" else -found

    taken = list(range(len(states)))
    if greedy:
        mean, taken = greedy_soup(states, value)
    else:
        mean = average_weights(states)
    model = ModelConfig.of_checkpoint(facts[0]["model"])
    more = {"soup": [facts[number]["hash"] for number in taken]}
    yield {"hash": bench.save(as_path(save), pour(mean), model, more), "taken": taken}


def cluster(config: Tree, checkpoint: str, clusters: int) -> Iterator[Row]:
    """Cluster the classes that a generalist confuses; yield lists of classes."""
    bench = Bench(config)
    # softened: a confident network's errors are too few to see which classes it confuses
    probabilities = (bench.answer(checkpoint, "val") / CLUSTER_TEMPERATURE).softmax(dim=1)
    found = cluster_classes(probabilities, clusters=clusters, seed=bench.config.seed)
    yield {"classes": [list(classes) for classes in found]}


def cost(config: Tree, models: Sequence[Sequence[str]], batches: Sequence[int]) -> Iterator[Row]:
    """Time the answers of models, or of several models one after the other, on one thread.

    Args:
        config: of the run.
        models: checkpoints of the networks that one answer takes, for each.
        batches: numbers of images asked for at once.

    Yields:
        `rows`: for each, its `parameters` and milliseconds an image by batch.
    """
    bench = Bench(config)
    rows = []
    for checkpoints in models:
        networks = [network.eval() for path in checkpoints for network in bench.networks(path)]
        row: Row = {"parameters": sum(p.numel() for n in networks for p in n.parameters())}
        for batch in batches:
            size = (batch, bench.data.in_chans, bench.data.image_size, bench.data.image_size)
            inputs = torch.zeros(size, device=bench.device)
            row[f"ms_{batch}"] = _seconds(networks, inputs) * 1000 / batch
        rows.append(row)
    yield {"rows": rows}


@torch.inference_mode()
def _seconds(networks: Sequence[nn.Module], inputs: Tensor) -> float:
    timer = Timer(
        "for network in networks: network(inputs)",
        globals={"networks": networks, "inputs": inputs},
        num_threads=1,
    )
    return float(timer.blocked_autorange(min_run_time=TIMED_SECONDS).median)


JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "adopt": adopt,
    "measure": measure,
    "weigh": weigh,
    "soup": soup,
    "cluster": cluster,
    "cost": cost,
}
