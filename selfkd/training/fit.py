"""`fit`: the training loop over batches, independent of tracker and tuner."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from selfkd.data import Data
from selfkd.data.augmentation import Views
from selfkd.data.batches import batch_sizes
from selfkd.distill.distiller import Loss
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.errors import NonFiniteLossError
from selfkd.training.optimizers import put_channels_last
from selfkd.training.predict import Precision, autocast, evaluate
from selfkd.training.ranks import ALONE, Ranks, smallest_batch

if TYPE_CHECKING:
    from selfkd.data.transfer import TransferSet

CHECK_STEPS = 100  # steps between two checks of the loss, which on a GPU wait for it


@dataclass(kw_only=True)
class Training:
    """State of a training run.

    Resumed from this state and torch's random states, it continues bit for bit.
    """

    student: nn.Module
    """Network that is trained in place, on `device`."""
    optimizer: torch.optim.Optimizer
    """Optimiser of the student's parameters."""
    generator: torch.Generator
    """Random generator of the order of the training images."""
    scheduler: Scheduler | None = None
    """Learning rate scheduler; None for a constant learning rate."""
    average: AveragedModel | None = None
    """Moving average of the weights, evaluated and saved in place of the student."""
    projections: nn.Module | None = None
    """Projections of the loss, which the optimiser trains and no model is saved with."""
    device: str = "cpu"
    """Device of the student and of the batches."""
    precision: Precision = "none"
    """Mixed precision of the student's forward pass."""
    channels_last: bool = False
    """Whether 4-dimensional weights and the images have channels last in memory."""
    epoch: int = 0
    """Number of completed epochs."""
    step: int = 0
    """Number of completed optimiser steps."""
    seconds: float = 0.0
    """Training time of the completed epochs in seconds."""
    scaler: torch.amp.GradScaler = field(init=False)
    """Scaler of the loss; enabled for float16 on a GPU."""

    def __post_init__(self) -> None:
        half = self.precision == "float16" and self.device != "cpu"
        self.scaler = torch.amp.GradScaler(self.device, enabled=half)
        self.channels_last &= any(weight.ndim == 4 for weight in self.student.parameters())
        if self.channels_last:
            for network in (self.student, *([] if self.average is None else [self.average])):
                put_channels_last(network)

    @property
    def best(self) -> nn.Module:
        """Network to evaluate and save: the moving average where there is one, else the student."""
        module: nn.Module = self.student if self.average is None else self.average.module
        return module

    def _parts(self) -> dict[str, Any]:
        parts = {
            "student": self.student,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "projections": self.projections,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers and text; the tensors are not copied."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        done = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds}
        return {**done, **parts, "order": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        for name, part in self._parts().items():
            if state[name]:  # the state of a disabled scaler is empty
                part.load_state_dict(state[name])
        self.generator.set_state(state["order"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds = state["seconds"]


def fit(
    training: Training,
    data: Data,
    distiller: Loss,
    *,
    epochs: int,
    batch_size: int,
    views: Views | None = None,
    workers: int = 0,
    clip_grad: float | None = None,
    compiled: bool = False,
    ranks: Ranks = ALONE,
    transfer: TransferSet | None = None,
    repeats: int = 1,
) -> Iterator[dict[str, Any]]:
    """Train a student from its current state; yield a row an epoch.

    Args:
        training: Student and the state of its training; changed in place.
        data: Data set; its train split is trained on, its val split evaluated.
        distiller: Loss of a batch.
        epochs: Number of epochs in all, completed ones included; epoch e, from 0, is trained on
            view e mod V.
        batch_size: Images a step, over all ranks; under batch normalisation a last step of one
            image is part of the step before.
        views: Augmented views of the images.
        workers: Processes that decode streamed images.
        clip_grad: Largest norm of the gradient; None for no clipping.
        compiled: Whether the student runs through `torch.compile`.
        ranks: Processes that share each batch. The gradient is the mean over the whole batch,
            however it is divided; batch normalisation sees a rank's share only, unless the student
            has a `SyncBatchNorm`.
        transfer: Transfer set, whose images are added to each batch.
        repeats: Views of an image that a batch has, of which `batch_size` is a multiple.

    Yields:
        epoch (from 1), loss and its terms (means over the epoch), lr, val_accuracy (fraction),
        val_nll (nats), seconds (since the start of training).

    Raises:
        NonFiniteLossError: The training or validation loss is not finite.
        TypeError: An output of the student in which it is not clear which tensor the logits are.
        ValueError: Logits of the student without a graph, or batches of one image under batch
            normalisation.
    """
    start = time.perf_counter() - training.seconds
    student, optimizer, device = training.student, training.optimizer, training.device
    forward = ranks.parallel(student)
    forward = cast(nn.Module, torch.compile(forward)) if compiled else forward
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    images = len(data.train)
    smallest = smallest_batch(student, batch_size=batch_size, images=images, ranks=ranks.size)
    sizes = batch_sizes(images, batch_size, smallest)
    counts = list(zip(sizes, *([transfer.sizes(sizes)] if transfer else []), strict=True))
    for epoch in range(training.epoch + 1, epochs + 1):
        if not all(part.training for part in student.modules()):
            student.train()
        first = views.at(epoch - 1, repeats) if views else 0
        terms = defaultdict[str, list[Tensor]](list)
        reading: dict[str, Any] = {"views": views, "view": first, "device": device}
        reading |= {"workers": workers, "share": ranks.share}
        reading["channels_last"] = training.channels_last
        order = training.generator
        own: dict[str, Any] = {"batch_size": batch_size, "smallest": smallest, "repeats": repeats}
        batches = data.batches("train", generator=order, **own, **reading)
        if transfer is not None:
            seed = order.initial_seed()
            batches = transfer.mix(batches, sizes, data, epoch=epoch - 1, seed=seed, **reading)
        for count, (inputs, labels, index) in zip(counts, batches, strict=True):
            if training.scheduler is not None:
                training.scheduler.step_update(training.step)
            with autocast(device, training.precision):
                logits = take_logits(forward(inputs), "student")
            check_graph(logits, "student_logits")
            view: Any = first
            if views is not None and repeats > 1:
                view = views.repeated(first, ranks.places(count[0]), repeats)
            mixed = transfer.describe(labels, index, count, ranks.size) if transfer else {}
            values = distiller(logits, labels, inputs=inputs, index=index, view=view, **mixed)
            for parameter in parameters:  # `zero_grad`, which takes as long as a small layer
                parameter.grad = None
            descend(training, ranks.mean_loss(values["loss"], *count), clip_grad)
            for name, value in values.items():
                mine = value.detach() if value.requires_grad else value
                terms[name].append(mine if ranks.size == 1 else mine * ranks.weight(*count))
            training.step += 1
            if training.step % CHECK_STEPS == 0:
                check_finite(torch.stack(terms["loss"]), epoch)
        steps = {name: ranks.sum(torch.stack(each)) for name, each in terms.items()}
        means = {name: float(each.mean()) for name, each in steps.items()}
        if not math.isfinite(means["loss"]):
            check_finite(steps["loss"], epoch)
        measured = _measure(training, data, workers, ranks)
        if not math.isfinite(measured["nll"]):
            raise NonFiniteLossError(
                f"validation loss must be finite, got {measured['nll']} after epoch {epoch}: "
                "lower train.lr or set train.clip_grad"
            )
        training.epoch, training.seconds = epoch, time.perf_counter() - start
        yield {
            "epoch": epoch,
            **means,
            "lr": float(optimizer.param_groups[0]["lr"]),
            "val_accuracy": measured["accuracy"],
            "val_nll": measured["nll"],
            "seconds": training.seconds,
        }


def descend(training: Training, loss: Tensor, clip_grad: float | None) -> None:
    """Make one optimiser step; update the moving average."""
    student = training.student
    scaler = training.scaler if training.scaler.is_enabled() else None
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    if clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(training.optimizer)
        own = () if training.projections is None else training.projections.parameters()
        nn.utils.clip_grad_norm_([*student.parameters(), *own], clip_grad)
    if scaler is None:
        training.optimizer.step()
    else:
        scaler.step(training.optimizer)
        scaler.update()
    if training.average is not None:
        training.average.update_parameters(student)


def _measure(training: Training, data: Data, workers: int, ranks: Ranks) -> dict[str, float]:
    ranks.copy_first(training.best.buffers())  # batch statistics differ between ranks
    return evaluate(
        training.best,
        data,
        device=training.device,
        workers=workers,
        precision=training.precision,
        ranks=ranks,
        channels_last=training.channels_last,
    )


def check_finite(values: Tensor, epoch: int) -> None:
    """Raise NonFiniteLossError for a loss that is not finite, with its step."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteLossError(
            f"loss must be finite, got {float(values[step])} at epoch {epoch}, step {step + 1}: "
            "lower train.lr or set train.clip_grad"
        )
