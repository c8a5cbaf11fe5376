"""`fit`, `predict` and `evaluate`: loops over batches, independent of tracker and tuner."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selfkd.analysis import metrics
from selfkd.data import Data
from selfkd.data.augmentation import Views
from selfkd.data.batches import batch_sizes
from selfkd.data.transfer import TransferSet
from selfkd.distill.distiller import Loss
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.distill.teacher import ComputedTensors, Teacher
from selfkd.errors import NonFiniteLossError
from selfkd.training.ranks import Ranks, smallest_batch

Precision = Literal["none", "bfloat16", "float16"]
EVAL_BATCH = 1000  # images
EVAL_VALUES = 2**22  # most input values a batch, which bounds batches of large images
ALONE = Ranks()
CHECK_STEPS = 100  # steps between two checks of the loss, which on a GPU wait for it


def make_optimizer(
    student: nn.Module, *, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimiser by timm, without weight decay of biases and normalisation layers.

    Args:
        student: Network to optimise.
        name: Name of a timm optimiser.
        lr: Learning rate.
        momentum: Momentum; ignored by optimisers without one.
        weight_decay: Weight decay of all other parameters.

    Raises:
        ValueError: timm has no optimiser of that name.
    """
    if name not in list_optimizers():
        known = ", ".join(list_optimizers()[:8])
        raise ValueError(f"train.optimizer must be a timm optimiser ({known}, …), got {name!r}")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        student, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum
    )
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Literal["cosine", "step", "none"],
    epochs: int,
    warmup_epochs: int,
    steps_per_epoch: int,
    cycles: int = 1,
) -> Scheduler | None:
    """Return a learning rate scheduler by timm, updated at every step; None without a schedule.

    Args:
        optimizer: Optimiser whose learning rate is scheduled.
        schedule: `cosine`, from the learning rate to 0 after the warm-up; `step`, divided by 10 at
            1/2 and 3/4 of the epochs; or `none`.
        epochs: Number of epochs, those of the warm-up included.
        warmup_epochs: Epochs of a linear warm-up from a tenth of the learning rate.
        steps_per_epoch: Optimiser steps an epoch.
        cycles: Number of cosine cycles over all epochs, as for snapshot ensembles.

    Reference:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", 2017,
        https://arxiv.org/abs/1704.00109
    """
    if schedule == "none":
        return None
    cosine = schedule == "cosine"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine" if cosine else "multistep",
        num_epochs=max(1, epochs // cycles - warmup_epochs) if cosine else epochs,
        cycle_limit=cycles,
        cycle_decay=1.0,
        decay_milestones=[epochs / 2, epochs * 3 / 4],
        warmup_epochs=warmup_epochs,
        warmup_lr=optimizer.param_groups[0]["lr"] / 10,
        warmup_prefix=cosine,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def make_average(student: nn.Module, *, decay: float) -> AveragedModel:
    """Return an exponential moving average of a student's weights and buffers.

        average_n = d_n average_(n - 1) + (1 - d_n) weights_n
        d_n = min(decay, (1 + n) / (10 + n))

    for n = 1, 2, …, from the weights after the first step, average_0. The warm-up of the decay
    keeps a training that is short for it from measuring its first weights: 0.9999 is reached after
    90,000 steps. The number of steps is in the state of the average.

    Args:
        student: Network to average.
        decay: Weight of the average at each step, in (0, 1); the new weights get `1 - decay`.
    """
    with ComputedTensors():
        average = AveragedModel(student, use_buffers=True)
    state = average._buffers  # on the CPU, unlike the number that a GPU's tensors are given

    def update(averages: Any, weights: Any, _: object) -> None:
        number = int(cast(Tensor, state["n_averaged"]))
        rule = get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))  # type: ignore[no-untyped-call]
        rule(averages, weights, number)

    average.multi_avg_fn = update
    return average


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
    images = len(data.train)
    smallest = smallest_batch(student, batch_size=batch_size, images=images, ranks=ranks.size)
    sizes = batch_sizes(images, batch_size, smallest)
    counts = list(zip(sizes, *([transfer.sizes(sizes)] if transfer else []), strict=True))
    for epoch in range(training.epoch + 1, epochs + 1):
        student.train()
        first = views.at(epoch - 1, repeats) if views else 0
        terms: dict[str, list[Tensor]] = {}
        reading: dict[str, Any] = {"views": views, "view": first, "device": device}
        reading |= {"workers": workers, "share": ranks.share}
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
            view: Any = views.repeated(first, ranks.places(count[0]), repeats) if views else 0
            mixed = transfer.describe(labels, index, count, ranks.size) if transfer else {}
            values = distiller(logits, labels, inputs=inputs, index=index, view=view, **mixed)
            optimizer.zero_grad(set_to_none=True)
            descend(training, ranks.mean_loss(values["loss"], *count), clip_grad)
            for name, value in values.items():
                mine = value.detach()
                terms.setdefault(name, []).append(
                    mine if ranks.size == 1 else mine * ranks.weight(*count)
                )
            training.step += 1
            if training.step % CHECK_STEPS == 0:
                check_finite(torch.stack(terms["loss"]), epoch)
        means = {name: ranks.sum(torch.stack(steps)) for name, steps in terms.items()}
        check_finite(means["loss"], epoch)
        measured = _measure(training, data, workers, ranks)
        if not math.isfinite(measured["nll"]):
            raise NonFiniteLossError(
                f"validation loss must be finite, got {measured['nll']} after epoch {epoch}: "
                "lower train.lr or set train.clip_grad"
            )
        training.epoch, training.seconds = epoch, time.perf_counter() - start
        yield {
            "epoch": epoch,
            **{name: float(steps.mean()) for name, steps in means.items()},
            "lr": float(optimizer.param_groups[0]["lr"]),
            "val_accuracy": measured["accuracy"],
            "val_nll": measured["nll"],
            "seconds": training.seconds,
        }


def descend(training: Training, loss: Tensor, clip_grad: float | None) -> None:
    """Make one optimiser step; update the moving average."""
    scaler, student = training.scaler, training.student
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if clip_grad is not None:
        scaler.unscale_(training.optimizer)
        own = () if training.projections is None else training.projections.parameters()
        nn.utils.clip_grad_norm_([*student.parameters(), *own], clip_grad)
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
    )


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return a context of mixed precision for a forward pass."""
    if precision == "none":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def check_finite(values: Tensor, epoch: int) -> None:
    """Raise NonFiniteLossError for a loss that is not finite, with its step."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteLossError(
            f"loss must be finite, got {float(values[step])} at epoch {epoch}, step {step + 1}: "
            "lower train.lr or set train.clip_grad"
        )


def predict(
    model: nn.Module | Teacher,
    data: Data,
    split: Literal["train", "val", "test"],
    *,
    views: Views | None = None,
    view: int = 0,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    rows: range | None = None,
) -> Tensor:
    """Return the logits of a model for a split.

    The model predicts in eval mode and is then put back into its previous mode.

    Args:
        model: Network or teacher.
        data: Data set.
        split: Split to predict.
        views: Augmented views of the images.
        view: Number of the view.
        device: Device of the model.
        workers: Processes that decode streamed images.
        precision: Mixed precision of the forward pass.
        rows: Images of the split to predict; all when not given.

    Returns:
        Logits `[images, classes]`, float32 on the CPU.
    """
    batches = predict_batches(
        model, data, split, views=views, view=view, device=device, workers=workers,
        precision=precision, rows=rows,
    )  # fmt: skip
    return torch.cat(list(batches))


@torch.no_grad()
def predict_batches(
    model: nn.Module | Teacher,
    data: Data,
    split: Literal["train", "val", "test"],
    *,
    views: Views | None = None,
    view: int = 0,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    rows: range | None = None,
) -> Iterator[Tensor]:
    """Yield the logits of a model for a split batch by batch; arguments are those of `predict`."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    values = data.in_chans * data.image_size**2
    batches = data.batches(
        split,
        batch_size=min(EVAL_BATCH, max(1, EVAL_VALUES // values)),
        views=views,
        view=view,
        device=device,
        workers=workers,
        rows=rows,
    )
    for inputs, _, _ in batches:
        with autocast(device, precision):
            logits = take_logits(model(inputs), "model")
        yield logits.float().cpu()
    if isinstance(model, nn.Module):
        model.train(training)


def evaluate(
    model: nn.Module,
    data: Data,
    split: Literal["train", "val", "test"] = "val",
    *,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Return `accuracy` (fraction) and `nll` (nats) of a model on a split.

    Args:
        model: Network to evaluate.
        data: Data set.
        split: Split to evaluate on.
        device: Device of the model.
        workers: Processes that decode streamed images.
        precision: Mixed precision of the forward pass.
        ranks: Processes that share the predictions; all of them must call this.
    """
    labels = getattr(data, split).labels.cpu()
    ranks = ranks if len(labels) >= ranks.size else ALONE
    logits = predict(
        model,
        data,
        split,
        device=device,
        workers=workers,
        precision=precision,
        rows=ranks.share(len(labels)) if ranks.size > 1 else None,
    )
    logits = ranks.gather(logits, len(labels), device=device)
    return {"accuracy": metrics.accuracy(logits, labels), "nll": metrics.nll(logits, labels)}
