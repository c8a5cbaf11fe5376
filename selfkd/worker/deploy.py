"""What a worker does to deploy a model: export, quantise, measure and time files of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.analysis.statistics import bootstrap_interval
from selfkd.config import Tree
from selfkd.deployment import versions
from selfkd.deployment.cpu import describe_cpu
from selfkd.deployment.export import check_weights, export_onnx
from selfkd.deployment.latency import speed_up, time_together
from selfkd.deployment.low_bits import write_low_bits
from selfkd.deployment.predictor import write_predictor
from selfkd.deployment.quantise import quantise
from selfkd.deployment.session import OnnxNetwork
from selfkd.distill.outputs import take_logits
from selfkd.errors import describe_error
from selfkd.losses import Average
from selfkd.models import parameters_count
from selfkd.results import Row, Timing, to_row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import NO_ROOM, fetch, replace, sha256
from selfkd.storage.remote import as_path
from selfkd.storage.temporary import TemporaryFolder
from selfkd.tasks import make_task
from selfkd.tasks.task import SPLITS, Split, Task
from selfkd.training.functions import load_function
from selfkd.worker.evaluate import compare_errors, weights_of
from selfkd.worker.faults import Job, saying_faults

CHECKED = 1000
"""Inputs on which an exported graph is compared with its network."""
TOLERANCE = 1e-3
"""Largest difference of a logit, in units of the largest logit, that rounding explains."""
_AT_ONCE = 64
_TRIED = 3
"""Inputs that a user's network is tried with."""


class Source:
    """What is deployed: a network by its checkpoint, an average of several, or a user's own.

    Args:
        config: Config of its data.
        members: `checkpoint`, perhaps `hash` and `weight`, of each network.
        average: What is averaged.
        make_model: Reference of the function that makes a user's network.

    Raises:
        ValueError: A file is damaged, or another one than the run's row of it says.
    """

    def __init__(
        self,
        config: Tree,
        members: Sequence[Mapping[str, Any]],
        average: Average = "probabilities",
        make_model: str | None = None,
    ) -> None:
        self.task: Task = make_task(config)
        self._checkpoints = [str(member["checkpoint"]) for member in members]
        self._average, self._weights = average, weights_of(members)
        self._make_model = make_model
        for member in members:
            _check_hash(str(member["checkpoint"]), member.get("hash"))

    @property
    def like(self) -> str | None:
        """Checkpoint whose normalisation and order of outputs it has; None of a user's network."""
        return None if self._make_model else self._checkpoints[0]

    @property
    def name(self) -> str:
        """What makes the network, for messages."""
        return "model" if self._make_model is None else f"--make-model {self._make_model}"

    @property
    def model(self) -> Row:
        """Name and arguments of the network; none of a user's own, or of several."""
        alone = self._make_model is None and len(self._checkpoints) == 1
        return self.task.load(self._checkpoints[0])[1].model if alone else {}

    def network(self) -> nn.Module:
        """Return the network on the CPU, where it is exported and timed, in eval mode."""
        if self._make_model is not None:
            network = _load_own(self._make_model, self._checkpoints[0]).eval()
            _try(network, self.task.inputs("val", _TRIED), self)
            return network
        network = self.task.combined(
            self._checkpoints, average=self._average, weights=self._weights
        )
        return network.eval().cpu()


def _check_hash(checkpoint: str, known: str | None) -> None:
    """Check that a checkpoint is the model that the run wrote down."""
    if known is None or as_path(checkpoint).suffix == ".json":  # which names its parts
        return
    found = load_tensors(as_path(checkpoint))[1]["hash"]
    if found != known:
        raise ValueError(
            f"{checkpoint} must be the model of its run, of hash {known}, got another of hash "
            f"{found}: put it back, or deploy it by --checkpoint"
        )


def _load_own(reference: str, checkpoint: str) -> nn.Module:
    """Return a user's network with the weights of a checkpoint."""
    make = load_function(reference, flag="--make-model")
    try:
        network = make()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--make-model must name a function that makes the network without arguments, got "
            f"{reference}: {describe_error(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--make-model must return a torch.nn.Module, got {type(network).__name__}"
        )
    try:
        network.load_state_dict(load_tensors(as_path(checkpoint))[0])
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"--make-model must make the network of {checkpoint}: {first}") from None
    return network.float()  # as it is exported


@saying_faults
def export(config: Tree, path: str, **source: Any) -> Iterator[Row]:
    """Export a model as an ONNX file, and compare it with torch's.

    Args:
        config: Config of its data.
        path: File to write.
        source: Further arguments of `Source`.

    Yields:
        `bytes` and `sha256` of the file, name and arguments of the network as `model`, where it is
        made by them, `parameters`, the number of `inputs` that were compared and the largest
        `difference` of their logits; or the user's mistake as `fault`.
    """
    own = Source(config, **source)
    network, interface = own.network(), own.task.interface()
    inputs, target = own.task.inputs("val", CHECKED, like=own.like), as_path(path)
    _try(network, inputs[:2], own)
    with TemporaryFolder() as temporary:
        file = temporary.path / target.name
        export_onnx(network, inputs[:2], interface, file)
        difference = _largest_difference(network, OnnxNetwork(file), inputs)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the exported graph of {path} must give the logits of its network, got a "
                f"difference of {difference:.2g} of the largest on {len(inputs):,} inputs: an "
                "operator is random, or has another meaning in ONNX"
            )
        yield {
            **_put(file, target),
            "model": own.model,
            "parameters": parameters_count(network),
            "inputs": len(inputs),
            "difference": difference,
        }


def _try(network: nn.Module, inputs: Tensor, source: Source) -> None:
    """Check that a network takes the data's inputs, and gives logits of its outputs."""
    config, name = source.task.config, source.name
    check_weights(network)
    try:
        logits = _logits(network, inputs)
    except Exception as error:
        raise ValueError(
            f"{name} must take the {source.task.interface().input} of data.name {config.data.name} "
            f"{list(inputs.shape[1:])}, which it does not: {error}"
        ) from error
    outputs = source.task.check().outputs
    if logits.shape[-1:] != (outputs,) or logits.shape[:1] != inputs.shape[:1]:
        raise ValueError(
            f"{name} must give {outputs} logits for each of {len(inputs)} inputs of data.name "
            f"{config.data.name}, got {list(logits.shape)}: --set data.name=… names the data that "
            "it was trained on"
        )
    if logits.isnan().any():
        raise ValueError(
            f"{name} must give logits that are numbers, got NaN for the first inputs of data.name "
            f"{config.data.name}"
        )


@torch.no_grad()
def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    return take_logits(network(inputs), "model").float()


def _largest_difference(network: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """Return the largest difference of two networks' logits, in units of the largest logit.

    It is NaN where a logit is, and infinite where one alone is.
    """
    found, largest = torch.zeros(()), torch.zeros(())
    for part in torch.split(inputs, _AT_ONCE):
        logits, others = _logits(network, part), _logits(other, part)
        apart = (logits - others).abs().where(logits != others, 0.0)
        found = torch.maximum(found, apart.max())  # which keeps NaN
        largest = torch.maximum(largest, logits.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return float(found / largest.clamp(min=1e-30))


def _put(file: Path, target: Path) -> Row:
    """Put a file into the run folder; return its size and its hash.

    Raises:
        OSError: There is no room for it; says how much is needed.
    """
    size = file.stat().st_size
    try:
        replace(target, partial(shutil.copyfile, file))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"the run folder must have room for {size:,} bytes of {target}, and is full: free some "
            "and run the command again, which goes on from what is done"
        ) from None
    return {"bytes": size, "sha256": sha256(file)}


@saying_faults
def quantise_file(
    config: Tree, exported: str, path: str, calibration: int, **source: Any
) -> Iterator[Row]:
    """Quantise an exported file by operator.

    Args:
        config: Config of its data.
        exported: Exported file.
        path: File to write.
        calibration: Largest number of training inputs on which ranges are measured.
        source: Further arguments of `Source`.

    Yields:
        `bytes` and `sha256` of the file, and numbers of its `operators` in int8 by kind.
    """
    own, target = Source(config, **source), as_path(path)
    inputs = own.task.calibration(calibration, like=own.like)
    with TemporaryFolder() as temporary:
        file = temporary.path / target.name
        found = quantise(fetch(as_path(exported)), file, inputs, own.task.interface())
        yield {**_put(file, target), "operators": found}


@saying_faults
def lower_bits(config: Tree, exported: str, path: str, bits: int) -> Iterator[Row]:
    """Write an exported file with the weights of its matrix products in low bits.

    Args:
        config: Config of its data.
        exported: Exported file, of rounded weights.
        path: File to write.
        bits: Number of bits.

    Yields:
        `bytes` and `sha256` of the file, and numbers of its `operators` in low bits by kind.
    """
    with TemporaryFolder() as temporary:
        file = temporary.path / as_path(path).name
        found = write_low_bits(fetch(as_path(exported)), file, bits)
        yield {**_put(file, as_path(path)), "operators": found}


@saying_faults
def predictor(config: Tree, checkpoint: str, folder: str, file: str) -> Iterator[Row]:
    """Write what predicts with the files of a folder.

    Args:
        config: Config of their data.
        checkpoint: Checkpoint of the network that they are of.
        folder: Folder of the files.
        file: Name of the one that predicts, when told no other.

    Yields:
        `files`, their names.
    """
    task = make_task(config)
    facts = load_tensors(as_path(checkpoint))[1]
    place = as_path(folder)
    found = write_predictor(place, facts, task.interface(), task=task.config.task, file=file)
    yield {"files": list(found)}


@saying_faults
def measure(
    config: Tree,
    file: str | None = None,
    predictions: str | None = None,
    reference: str | None = None,
    **source: Any,
) -> Iterator[Row]:
    """Measure a file, or the network itself, on validation and test.

    Args:
        config: Config of its data.
        file: File that predicts; the network itself when not given.
        predictions: File for its test logits, if others are compared with them.
        reference: File of the predictions that it is compared with.
        source: Further arguments of `Source`.

    Yields:
        `metrics`; with a reference `agreement`, what comes of `hits` as `mcnemar`, and the
        `difference` of its test metric, over items.
    """
    own = Source(config, **source)
    task = own.task
    network: nn.Module = OnnxNetwork(fetch(as_path(file))) if file else own.network()
    network.to(task.example(1).device)
    logits: dict[Split, Tensor] = {
        split: task.predict_with(network, split, like=own.like) for split in SPLITS
    }
    row: Row = {"metrics": task.evaluate(logits, [network])}
    hits = task.hits(logits["test"], "test", [network])
    scores = task.scores(logits["test"], "test", [network])
    if predictions is not None:
        kept = {"test": logits["test"], "scores": scores}
        kept |= {} if hits is None else {"hits": hits.to(torch.uint8)}
        save_tensors(as_path(predictions), kept, {})
    if reference is not None:
        other = load_tensors(as_path(reference))[0]
        row["agreement"] = task.fidelity(logits["test"], other["test"])["agreement"]
        if hits is not None:
            row["mcnemar"] = to_row(compare_errors(hits, other["hits"].bool()))
        row["difference"] = asdict(bootstrap_interval((scores - other["scores"]).numpy()))
    yield row


@saying_faults
def time(config: Tree, forms: Mapping[str, Mapping[str, Any]], reference: str) -> Iterator[Row]:
    """Time the predictions of networks and files side by side, on one thread.

    Args:
        config: Config of their data.
        forms: For each its `file`, or the arguments of `Source` of a network.
        reference: Key of the one that the others are compared with.

    Yields:
        `timings` of each, `cpu` and `versions`.
    """
    task = make_task(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        networks = {
            key: OnnxNetwork(fetch(as_path(form["file"])))
            if "file" in form
            else Source(config, **form).network()
            for key, form in forms.items()
        }
        timings: dict[str, list[Row]] = {key: [] for key in forms}
        for items in task.interface().timed:
            inputs = task.example(items).cpu()
            rounds = time_together(
                {
                    key: network.timed(inputs)
                    if isinstance(network, OnnxNetwork)
                    else partial(_run, network, inputs)
                    for key, network in networks.items()
                }
            )
            for key, own in rounds.items():
                ratio = None if key == reference else speed_up(rounds[reference], own)
                middle = float(torch.tensor(own).median())
                timings[key].append(to_row(Timing(items=items, ms=middle, speed_up=ratio)))
    finally:
        torch.set_num_threads(threads)
    yield {"timings": timings, "cpu": describe_cpu(), "versions": versions()}


@torch.inference_mode()
def _run(network: nn.Module, inputs: Tensor) -> None:
    network(inputs)


JOBS: dict[str, Job] = {
    "deploy_export": export,
    "deploy_quantise": quantise_file,
    "deploy_lower_bits": lower_bits,
    "deploy_measure": measure,
    "deploy_predictor": predictor,
    "deploy_time": time,
}
