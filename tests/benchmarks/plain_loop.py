"""The loop that a careful person writes by hand: what `selfkd.training.fit` is held against.

One model, one thread, normalised data in memory, fused SGD, channels last, nothing logged but the
epoch's loss, validation once an epoch. Cached logits are read from a tensor in memory; those of
several teachers are averaged once, at the temperature, as nothing changes them. `step.py` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Way = Literal["labels", "cached", "ten", "live"]
TEMPERATURE, ALPHA = 4.0, 0.9


def plain_epochs(
    student: nn.Module,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    way: Way,
    epochs: int,
    batch_size: int,
    teacher_logits: Tensor | None = None,
    teacher: nn.Module | None = None,
    compiled: bool = False,
    half: bool = False,
    channels_last: bool = True,
    fused: bool = True,
) -> Iterator[float]:
    """Train a student; yield its validation accuracy after each epoch.

    Args:
        student: Network to train, in place.
        train: Normalised inputs and labels.
        val: Those of the validation split.
        way: What it is trained on.
        epochs: Number of epochs of the schedule.
        batch_size: Images a step.
        teacher_logits: Logits of the training images `[teachers, images, classes]`, of cached ways.
        teacher: Network that is run at each step, of `live`.
        compiled: Whether the student runs through `torch.compile`.
        half: Whether it runs in bfloat16.
        channels_last: Whether weights and inputs have channels last.
        fused: Whether the optimiser's step is one kernel.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = student.to(memory_format=layout)
    (x, y), (val_x, val_y) = train, val
    if x.ndim == 4:
        x, val_x = x.contiguous(memory_format=layout), val_x.contiguous(memory_format=layout)
    log_targets = None
    if teacher_logits is not None:
        probabilities = (teacher_logits / TEMPERATURE).softmax(-1).mean(0)
        log_targets = probabilities.log()
    if teacher is not None:
        teacher = teacher.eval().requires_grad_(False).to(memory_format=layout)
    forward = torch.compile(student) if compiled else student
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
        fused=fused,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * -(-len(x) // batch_size)
    )
    for _ in range(epochs):
        student.train()
        total = torch.zeros(())
        for index in torch.randperm(len(x)).split(batch_size):
            inputs, labels = x[index], y[index]
            if half:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = forward(inputs)
                logits = logits.float()
            else:
                logits = forward(inputs)
            loss = F.cross_entropy(logits, labels)
            if way != "labels":
                with torch.no_grad():
                    if teacher is None:
                        target = log_targets[index]
                    else:
                        target = F.log_softmax(teacher(inputs) / TEMPERATURE, 1)
                soft = F.kl_div(
                    F.log_softmax(logits / TEMPERATURE, 1),
                    target,
                    reduction="batchmean",
                    log_target=True,
                )
                loss = (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * soft
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        student.eval()
        right = 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for inputs, labels in zip(val_x.split(1000), val_y.split(1000), strict=True):
                right += int((student(inputs).argmax(1) == labels).sum())
        yield right / len(val_x)
