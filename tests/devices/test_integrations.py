"""The parts for other loops, on a GPU that is not there: timm, transformers and a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from fake_cuda import fake_cuda
from torch import nn

from selfkd.data.augmentation import Views
from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.integrations.timm import DistillationTask

BATCH, CLASSES = 4, 5


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(BATCH, 3, 8, 8, device="cuda")
    return inputs, torch.zeros(BATCH, dtype=torch.int64, device="cuda")


STATS, OTHERS = ([0.5] * 3, [0.25] * 3), ([0.4] * 3, [0.2] * 3)
TEACHERS: dict[str, Any] = {
    "module": network,
    "normalised": lambda: Teacher(network(), input_stats=STATS, trained_stats=OTHERS),
    "columns": lambda: Teacher(
        network().to("cuda"), input_stats=STATS, trained_stats=OTHERS, columns=[1, 0, 2, 4, 3]
    ),
    "not copied": lambda: Teacher(network().eval(), copy=False),
    "ensemble": lambda: Ensemble([network(4), network(6)]),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_loop_by_hand_waits_for_nothing(name: str) -> None:
    with fake_cuda() as waits:
        student, teacher = network().to("cuda"), TEACHERS[name]()
        if name == "not copied":
            teacher.module.to("cuda")
        elif name != "on the GPU":
            teacher = teacher.to("cuda")
        terms = {"hint": {"student": "1", "teacher": "1", "weight": 0.1, "project": True}}
        inputs, labels = batch()
        features = {"terms": terms, "student": student, "example": inputs}
        weights = [0.7, 0.3] if name == "ensemble" else None
        distiller = Distiller(teacher, weights=weights, **features)
        optimizer = torch.optim.AdamW(
            [*student.parameters(), *distiller.parameters()], lr=0.01, fused=True
        )
        for step in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                logits = student(inputs)
            losses = distiller(logits, labels, inputs=inputs)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            if step == 0:
                waits.clear()

        assert waits.found == []
        assert {loss.device.type for loss in losses.values()} == {"cuda"}


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks_wait_for_nothing(task: Any) -> None:
    with fake_cuda() as waits:
        student, teacher = network().to("cuda"), network().to("cuda")
        inputs, _ = batch()
        labels = torch.rand(BATCH, CLASSES, device="cuda")
        distiller = Distiller(teacher, task=task)
        waits.clear()

        distiller(student(inputs), labels, inputs=inputs)["loss"].backward()

        assert waits.found == []


def test_a_task_of_timm_waits_for_nothing() -> None:
    with fake_cuda() as waits:
        student = timm.create_model("resnet10t", num_classes=CLASSES).to("cuda")
        teacher = timm.create_model("resnet10t", num_classes=CLASSES)  # moved by the task
        device = torch.device("cuda")
        task = DistillationTask(student, Distiller(teacher), nn.CrossEntropyLoss(), device=device)
        inputs, labels = torch.randn(2, 3, 32, 32, device="cuda"), torch.zeros(2).long()
        labels = labels.to("cuda")
        waits.clear()

        task(inputs, labels)["loss"].backward()

        assert waits.found == []


FULL: dict[str, Any] = {"crop": 0.5, "flip": True, "jitter": 2, "seed": 3, "count": 4}


def test_views_are_made_on_the_gpu_without_a_wait() -> None:
    views = Views(**FULL)
    with fake_cuda() as waits:
        images = torch.zeros(BATCH, 3, 8, 8, dtype=torch.uint8, device="cuda")
        views(images, torch.arange(BATCH), 1)
        waits.clear()

        found = views(images, torch.arange(BATCH), 2)

        assert (found.device.type, found.dtype) == ("cuda", torch.uint8)
        assert waits.found == []
