"""`fit` and `evaluate`: a loop over batches that knows no tracker and no tuner."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selfkd import metrics
from selfkd.data import Data
from selfkd.distiller import Distiller
from selfkd.teacher import Teacher
from selfkd.views import Views

Precision = Literal["none", "bfloat16", "float16"]
EVAL_BATCH = 1000
EVAL_VALUES = 2**22  # of a batch of large images
CHECK_STEPS = 100  # how often a loss is looked at: on a GPU each look waits for it


class NonFiniteLossError(ArithmeticError):
    """Training diverged; says at which epoch and step."""


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


def fit(
    student: nn.Module,
    data: Data,
    distiller: Distiller,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None = None,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    views: Views | None = None,
    device: str = "cpu",
    workers: int = 0,
    clip_grad: float | None = None,
    average: AveragedModel | None = None,
    precision: Precision = "none",
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Train a student, one yield an epoch.

    Args:
        student: changed in place, on `device`.
        data: its train split is learnt, its val split measured.
        distiller: gives the loss.
        optimizer: of the student's parameters.
        scheduler: of the learning rate.
        epochs: passes over the train split; epoch e sees view e mod V.
        batch_size: images a step.
        generator: of the order.
        views: augmentation.
        device: where batches go.
        workers: processes that decode streamed images.
        clip_grad: largest norm of the gradient.
        average: moving average of the weights, which is measured in place of the student.
        precision: of the student's forward pass.
        compiled: run the student through `torch.compile`.

    Yields:
        epoch (from 1), loss and its terms (means over the epoch), lr, val_accuracy, val_nll,
        seconds (since the start).

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    start = time.perf_counter()
    forward = cast(nn.Module, torch.compile(student)) if compiled else student
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16" and device != "cpu")
    step = 0
    for epoch in range(1, epochs + 1):
        student.train()
        view = views.at(epoch - 1) if views else 0
        terms: dict[str, list[Tensor]] = {}
        for inputs, labels, index in data.batches(
            "train",
            batch_size=batch_size,
            generator=generator,
            views=views,
            view=view,
            device=device,
            workers=workers,
        ):
            if scheduler is not None:
                scheduler.step_update(step)
            with autocast(device, precision):
                logits = forward(inputs)
            values = distiller(logits, labels, inputs=inputs, index=index, view=view)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(values["loss"]).backward()  # type: ignore[no-untyped-call]
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(student.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(student)
            for name, value in values.items():
                terms.setdefault(name, []).append(value.detach())
            step += 1
            if step % CHECK_STEPS == 0:
                _check_finite(terms["loss"], epoch)
        _check_finite(terms["loss"], epoch)
        measured = evaluate(
            average or student, data, device=device, workers=workers, precision=precision
        )
        if not math.isfinite(measured["nll"]):
            raise NonFiniteLossError(
                f"validation loss must be finite, got {measured['nll']} after epoch {epoch}: "
                "lower train.lr or set train.clip_grad"
            )
        yield {
            "epoch": epoch,
            **{name: float(torch.stack(values).mean()) for name, values in terms.items()},
            "lr": float(optimizer.param_groups[0]["lr"]),
            "val_accuracy": measured["accuracy"],
            "val_nll": measured["nll"],
            "seconds": time.perf_counter() - start,
        }


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return mixed precision for a forward pass, or nothing."""
    if precision == "none":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def _check_finite(losses: list[Tensor], epoch: int) -> None:
    values = torch.stack(losses)
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
) -> dict[str, float]:
    """Return accuracy (fraction) and nll (nats) on a split."""
    logits = predict(model, data, split, device=device, workers=workers, precision=precision)
    labels = getattr(data, split).labels.cpu()
    return {"accuracy": metrics.accuracy(logits, labels), "nll": metrics.nll(logits, labels)}
