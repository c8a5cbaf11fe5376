"""Optimisers, schedules of the learning rate and moving averages of a student."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selfkd.distill.teacher import ComputedTensors


def make_optimizer(
    student: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Return an optimiser by timm, without weight decay of biases and normalisation layers.

    Args:
        student: Network to optimise.
        name: Name of a timm optimiser.
        lr: Learning rate.
        momentum: Momentum; ignored by optimisers without one.
        weight_decay: Weight decay of all other parameters.
        fused: Whether a step is one kernel over all parameters, which rounds otherwise.

    Raises:
        ValueError: timm has no optimiser of that name, or it has no fused step.
    """
    if name not in list_optimizers():
        known = ", ".join(list_optimizers()[:8])
        raise ValueError(f"train.optimizer must be a timm optimiser ({known}, …), got {name!r}")
    if fused and not has_fused(name):
        raise ValueError(
            f"train.fused must be false with train.optimizer {name}, which has no fused step, got "
            "true: sgd, adam and adamw have one"
        )
    more = {"fused": True} if fused else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        student, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **more
    )
    return optimizer


def has_fused(name: str) -> bool:
    """Return whether a timm optimiser has a fused step, as some of torch's own have.

    >>> has_fused("sgd"), has_fused("lion")
    (True, False)
    """
    return "fused" in inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters


@torch.no_grad()
def put_channels_last(network: nn.Module) -> None:
    """Give weights and buffers of 4 dimensions channels last in memory, in place.

    The parameters stay the same objects, unlike by `network.to` where tensors are swapped.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


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
        return _MovingAverage(student, decay)


class _MovingAverage(AveragedModel):
    """Moving average whose update waits for no GPU: torch's copies the number of steps to it."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self._decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights and buffers of a model."""
        number = int(self.n_averaged)
        rule = get_ema_multi_avg_fn(min(self._decay, (1 + number) / (10 + number)))  # type: ignore[no-untyped-call]
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for average, weight in zip(_tensors(self.module), _tensors(model), strict=True):
            if number == 0:
                average.copy_(weight)
                continue
            key = (average.device, average.dtype)
            averages, weights = groups.setdefault(key, ([], []))
            averages.append(average)
            weights.append(weight)
        for averages, weights in groups.values():
            rule(averages, weights, number)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of a module, without their graph."""
    for tensor in chain(module.parameters(), module.buffers()):
        yield tensor.detach()
