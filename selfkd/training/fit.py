"""`fit` and `evaluate`: a loop over batches that knows no tracker and no tuner."""

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
from selfkd.distill.distiller import Loss
from selfkd.distill.teacher import Teacher
from selfkd.errors import NonFiniteLossError
from selfkd.training.ranks import Ranks

Precision = Literal["none", "bfloat16", "float16"]
EVAL_BATCH = 1000
EVAL_VALUES = 2**22  # of a batch of large images
ALONE = Ranks()
CHECK_STEPS = 100  # how often a loss is looked at: on a GPU each look waits for it


def make_optimizer(
    student: nn.Module, *, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make one of timm's optimisers; biases and norms are not decayed.

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
    """Make timm's scheduler of the learning rate, moved at every step.

    The cosine falls over the epochs after the warm-up, or, in `cycles`, so often over them all,
    as snapshot ensembles do (Huang et al., 2017, https://arxiv.org/abs/1704.00109).
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
    """Make the exponential moving average of a student's weights and buffers."""
    rule = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(student, multi_avg_fn=rule, use_buffers=True)


@dataclass(kw_only=True)
class Training:
    """A training run as it stands.

    With its state, and that of torch's random numbers, it goes on as if it had never stopped.
    """

    student: nn.Module
    """Changed in place, on `device`."""
    optimizer: torch.optim.Optimizer
    """Of the student's parameters."""
    generator: torch.Generator
    """Of the order."""
    scheduler: Scheduler | None = None
    """Of the learning rate."""
    average: AveragedModel | None = None
    """Moving average of the weights, which is measured in place of the student."""
    device: str = "cpu"
    precision: Precision = "none"
    """Of the student's forward pass."""
    epoch: int = 0
    """How many are done."""
    step: int = 0
    """How many are done."""
    seconds: float = 0.0
    """How long that took."""
    scaler: torch.amp.GradScaler = field(init=False)
    """Of the loss, where half precision needs it."""

    def __post_init__(self) -> None:
        half = self.precision == "float16" and self.device != "cpu"
        self.scaler = torch.amp.GradScaler(self.device, enabled=half)

    @property
    def best(self) -> nn.Module:
        """What is measured and saved."""
        module: nn.Module = self.student if self.average is None else self.average.module
        return module

    def _parts(self) -> dict[str, Any]:
        parts = {
            "student": self.student,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors, numbers and text; the tensors are not copied."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        done = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds}
        return {**done, **parts, "order": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, part in self._parts().items():
            if state[name]:  # a scaler that was not in use has none
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
) -> Iterator[dict[str, Any]]:
    """Train a student from where it stands, one yield an epoch.

    Args:
        training: what is trained, and how far it is; changed in place.
        data: its train split is learnt, its val split measured.
        distiller: gives the loss.
        epochs: passes over the train split, those done before among them; epoch e sees view
            e mod V.
        batch_size: images a step, of all ranks together.
        views: augmentation.
        workers: processes that decode streamed images.
        clip_grad: largest norm of the gradient.
        compiled: run the student through `torch.compile`.
        ranks: the processes that share each batch. The gradient is the mean over the whole
            batch however it is divided; batch normalisation sees a rank's share, unless the
            student's is a `SyncBatchNorm`.

    Yields:
        epoch (from 1), loss and its terms (means over the epoch), lr, val_accuracy, val_nll,
        seconds (since the start).

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    start = time.perf_counter() - training.seconds
    student, optimizer, device = training.student, training.optimizer, training.device
    forward = ranks.parallel(student)
    forward = cast(nn.Module, torch.compile(forward)) if compiled else forward
    for epoch in range(training.epoch + 1, epochs + 1):
        student.train()
        view = views.at(epoch - 1) if views else 0
        terms: dict[str, list[Tensor]] = {}
        batches = data.batches(
            "train",
            batch_size=batch_size,
            generator=training.generator,
            views=views,
            view=view,
            device=device,
            workers=workers,
            share=ranks.share,
        )
        for number, (inputs, labels, index) in enumerate(batches):
            count = min(batch_size, len(data.train) - number * batch_size)
            if training.scheduler is not None:
                training.scheduler.step_update(training.step)
            with autocast(device, training.precision):
                logits = forward(inputs)
            values = distiller(logits, labels, inputs=inputs, index=index, view=view)
            optimizer.zero_grad(set_to_none=True)
            _descend(training, ranks.mean_loss(values["loss"], count), clip_grad)
            for name, value in values.items():
                mine = value.detach()
                terms.setdefault(name, []).append(
                    mine if ranks.size == 1 else mine * ranks.weight(count)
                )
            training.step += 1
            if training.step % CHECK_STEPS == 0:
                _check_finite(torch.stack(terms["loss"]), epoch)
        means = {name: ranks.sum(torch.stack(steps)) for name, steps in terms.items()}
        _check_finite(means["loss"], epoch)
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


def _descend(training: Training, loss: Tensor, clip_grad: float | None) -> None:
    """Take a step down a loss, and the average with it."""
    scaler, student = training.scaler, training.student
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if clip_grad is not None:
        scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), clip_grad)
    scaler.step(training.optimizer)
    scaler.update()
    if training.average is not None:
        training.average.update_parameters(student)


def _measure(training: Training, data: Data, workers: int, ranks: Ranks) -> dict[str, float]:
    ranks.copy_first(training.best.buffers())  # batch statistics are each rank's own
    return evaluate(
        training.best,
        data,
        device=training.device,
        workers=workers,
        precision=training.precision,
        ranks=ranks,
    )


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return mixed precision for a forward pass, or nothing."""
    if precision == "none":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def _check_finite(values: Tensor, epoch: int) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteLossError(
            f"loss must be finite, got {float(values[step])} at epoch {epoch}, step {step + 1}: "
            "lower train.lr or set train.clip_grad"
        )


@torch.no_grad()
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
    """Return the model's logits for a split, `[images, classes]` float32 on the CPU.

    The model is in eval mode while it predicts, and afterwards in the mode it was in. With `rows`,
    only those images are asked for.
    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    values = data.in_chans * data.image_size**2
    with autocast(device, precision):
        logits = [
            model(inputs).float().cpu()
            for inputs, _, _ in data.batches(
                split,
                batch_size=min(EVAL_BATCH, max(1, EVAL_VALUES // values)),
                views=views,
                view=view,
                device=device,
                workers=workers,
                rows=rows,
            )
        ]
    if isinstance(model, nn.Module):
        model.train(training)
    return torch.cat(logits)


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
    """Return accuracy (fraction) and nll (nats) on a split, of which each rank asks its share."""
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
