"""Born-again generations in a loop shaped like that of timm's train.py, on scikit-learn's digits.

    python examples/timm_task.py --rounds 2

What is selfkd's is the task; optimiser, schedule, clipping and scores are timm's. The images of
each generation are the same, and so is the network but for its fresh weights.
"""

from __future__ import annotations

import argparse
import time

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd import Distiller, Teacher, make_model
from selfkd.data import load_data
from selfkd.integrations.timm import DistillationTask

EPOCHS, BATCH_SIZE, ACCUMULATE = 12, 16, 2


def make_loaders() -> tuple[DataLoader, DataLoader]:
    """Return batches to train on and to validate by."""
    data = load_data("digits")
    train, val = (
        TensorDataset(*next(data.batches(split, batch_size=len(getattr(data, split))))[:2])
        for split in ("train", "val")
    )
    order = torch.Generator().manual_seed(0)
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order),
        DataLoader(val, 400),
    )


def train_one_epoch(
    epoch: int,
    task: TrainingTask,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
) -> float:
    """Return the mean loss of an epoch; `ACCUMULATE` batches make one update."""
    losses = AverageMeter()
    updates = len(loader) // ACCUMULATE
    task.train()
    for batch_index, (inputs, target) in enumerate(loader):
        loss = task(inputs, target)["loss"]
        (loss / ACCUMULATE).backward()
        losses.update(loss.item(), len(inputs))
        if (batch_index + 1) % ACCUMULATE:
            continue
        dispatch_clip_grad(task.get_clip_parameters(), value=1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(epoch * updates + batch_index // ACCUMULATE + 1)
    return losses.avg


@torch.no_grad()
def validate(task: TrainingTask, loader: DataLoader) -> float:
    """Return the accuracy in per cent."""
    model = task.get_eval_model().eval()
    evaluator = task.create_evaluator()
    for inputs, labels in loader:
        evaluator.update(model(inputs), labels)
    return evaluator.compute()["top1"]


def train(task: TrainingTask, loader: DataLoader) -> float:
    """Return the mean loss of the last epoch."""
    optimizer = create_optimizer_v2(task, opt="sgd", lr=0.2, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=EPOCHS,
        step_on_epochs=False,
        updates_per_epoch=len(loader) // ACCUMULATE,
    )
    for epoch in range(epochs):
        loss = train_one_epoch(epoch, task, loader, optimizer, scheduler)
    return loss


def make_student() -> nn.Module:
    """Return the network of every generation, with fresh weights."""
    return make_model("selfkd_cnn", num_classes=10, in_chans=1, image_size=8)


def main() -> None:
    """Train generation 0 on labels, then each generation on the one before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="generations after generation 0")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)  # the network is too small for more
    train_loader, val_loader = make_loaders()
    distiller = Distiller()  # generation 0: labels only
    for generation in range(rounds + 1):
        torch.manual_seed(generation)
        begun = time.perf_counter()
        task = DistillationTask(make_student(), distiller)
        loss = train(task, train_loader)
        accuracy, seconds = validate(task, val_loader), time.perf_counter() - begun
        print(f"generation {generation}: val {accuracy:.2f}%, loss {loss:.3f}, {seconds:.1f} s")
        distiller = Distiller(Teacher(task.get_eval_model()), temperature=4.0, alpha=0.7)


if __name__ == "__main__":
    main()
