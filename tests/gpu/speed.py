"""Images a second of training: cached against live against labels only, and an ensemble of ten."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from setting import Row, Setting, endless, pictures
from torch import nn

from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Ensemble
from selfkd.models import make_model
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.training.fit import Training, descend
from selfkd.training.optimizers import make_optimizer
from selfkd.training.predict import autocast


def fast(setting: Setting) -> None:
    """Compute as commands do on a GPU."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = setting.device == "cuda"


def store_of(folder: Path, count: int, images: int, classes: int) -> SoftTargets:
    """Write random logits of teachers; return the store."""
    key, names = data_key("pictures", {}), [f"teacher{number}" for number in range(count)]
    for number, name in enumerate(names):
        manifest = Manifest(
            teacher=name, data=key, fingerprint="pictures", recipe={}, views=1, images=images,
            classes=classes,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(images, classes, generator=generator)
        for shard in range(manifest.shards):
            rows = manifest.rows(shard)
            write_shard(
                folder, manifest, view=0, shard=shard, logits=logits[rows.start : rows.stop]
            )
    return open_store(folder, names, data=key)


def step_of(
    setting: Setting, make: Callable[[], nn.Module], data: Any, distiller: Any, batch_size: int
) -> Callable[[], object]:
    """Return a function that makes one step, as `fit` does."""
    device = setting.device
    precision: Any = "bfloat16" if device == "cuda" else "none"
    torch.manual_seed(0)
    student = make().to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(student, name="sgd", lr=0.01, momentum=0.9, weight_decay=0.0)
    training = Training(
        student=student, optimizer=optimizer, generator=torch.Generator(), device=device,
        precision=precision,
    )  # fmt: skip
    batches = endless(data, batch_size, device)

    def step() -> None:
        inputs, labels, index = next(batches)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            logits = student(inputs)
        terms = distiller(logits, labels, inputs=inputs, index=index)
        optimizer.zero_grad(set_to_none=True)
        descend(training, terms["loss"], None)

    return step


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "ResNet-20": (
        lambda: make_model("selfkd_resnet20", {}, num_classes=10, in_chans=3, image_size=32),
        32, 512, 4096,
    ),
    "WRN-28-2": (
        lambda: make_model(
            "selfkd_wrn28", {"depth": 28, "k": 2}, num_classes=10, in_chans=3, image_size=32
        ),
        32, 512, 4096,
    ),
    "resnet50 at 224": (lambda: timm.create_model("resnet50", num_classes=1000), 224, 128, 512),
}  # fmt: skip


def _network(setting: Setting, name: str) -> tuple[Callable[[], nn.Module], int, int, int]:
    """Return a network, its images' size, the batch size and the number of images."""
    make, *sizes = NETWORKS[name]
    if not setting.quick:
        return (make, *sizes)  # type: ignore[return-value]
    with torch.device("meta"):
        make()
    small = partial(
        make_model, "selfkd_cnn", {"width": 2}, num_classes=10, in_chans=3, image_size=16
    )
    return small, 16, 8, 16


def check_rates(setting: Setting, name: str) -> list[Row]:
    """Measure a network's training on labels, with a cached and with a live teacher."""
    fast(setting)
    make, size, batch_size, images = _network(setting, name)
    classes = 1000 if "224" in name and not setting.quick else 10
    data = pictures(images, size, classes, setting.device)
    seconds = max(1.0, setting.seconds / 8)
    with tempfile.TemporaryDirectory() as folder:
        stored = store_of(Path(folder), 1, images, classes)
        teacher = make().to(setting.device, memory_format=torch.channels_last)
        ways = {
            "labels only": Distiller(),
            "cached": Distiller(targets=stored),
            "live": Distiller(teacher),
        }
        rates = {}
        for way, distiller in ways.items():
            step = step_of(setting, make, data, distiller, batch_size)
            rates[way] = setting.rate(step, batch_size, seconds=seconds)
    first = rates["labels only"]
    notes = {way: f"{rate / first:.2f} of labels only" for way, rate in rates.items()}
    return [Row(f"{name}, {way}", f"{rate:,.0f}/s", notes[way]) for way, rate in rates.items()]


def check_ensemble(setting: Setting) -> list[Row]:
    """Measure ResNet-20 with the average of ten teachers, cached and live."""
    fast(setting)
    make, size, batch_size, images = _network(setting, "ResNet-20")
    data = pictures(images, size, 10, setting.device)
    seconds = max(1.0, setting.seconds / 5)
    with tempfile.TemporaryDirectory() as folder:
        stored = store_of(Path(folder), 10, images, 10)
        live = Ensemble([make() for _ in range(10)]).to(setting.device)
        ways = {"cached": Distiller(targets=stored), "live": Distiller(live)}
        rows = []
        for way, distiller in ways.items():
            step = step_of(setting, make, data, distiller, batch_size)
            rate = setting.rate(step, batch_size, seconds=seconds)
            rows.append(Row(f"ResNet-20, ten teachers {way}", f"{rate:,.0f}/s"))
        return rows
