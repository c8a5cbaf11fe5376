"""What a checkpoint after every epoch costs: ResNet-20 on images of CIFAR's size.

    python tests/benchmarks/resume.py [--images 2500] [--epochs 9] [--batch-size 128] [--device cpu]

Two trainings in one process take turns, epoch by epoch; one of them writes its checkpoint after
each. A write costs the same whatever the epoch is, so its share of an epoch over CIFAR's 50,000
images is given too. `--folder` is where it is written: file systems differ.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from selfkd.data import Data, Split
from selfkd.data.augmentation import Views
from selfkd.distill.distiller import Distiller
from selfkd.models import make_model
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_average, make_optimizer, make_scheduler
from selfkd.training.progress import Progress
from selfkd.training.ranks import Ranks

CIFAR = 50_000
TARGET = 0.03


def make_split(images: int) -> Split:
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.randint(0, 10, (images,), generator=generator))


def make_training(images: int, epochs: int, batch_size: int, device: str) -> Training:
    torch.manual_seed(0)
    student = make_model("selfkd_resnet20", {}, num_classes=10, in_chans=3, image_size=32)
    student.to(device)
    optimizer = make_optimizer(student, name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Training(
        student=student,
        optimizer=optimizer,
        scheduler=make_scheduler(
            optimizer,
            schedule="cosine",
            epochs=epochs,
            warmup_epochs=0,
            steps_per_epoch=-(-images // batch_size),
        ),
        average=make_average(student, decay=0.99),
        generator=torch.Generator().manual_seed(0),
        device=device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = (make_split(options.images), make_split(500), make_split(1))
    names = tuple("0123456789")
    data = Data("cifar-like", *splits, names, 32, (0.5,) * 3, (0.25,) * 3, "none")
    data = data.to(options.device)

    def start() -> tuple[Training, Iterator[dict[str, float]]]:
        settings = (options.images, options.epochs, options.batch_size, options.device)
        training = make_training(*settings)
        views = Views(flip=True, jitter=4, count=8, seed=0)
        rows = fit(
            training,
            data,
            Distiller(),
            epochs=options.epochs,
            batch_size=options.batch_size,
            views=views,
        )
        return training, rows

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "checkpoint.pt"
        progress = Progress(path, made_from={}, seconds=None, epochs=1, ranks=Ranks())
        (_, plain), (training, kept) = start(), start()
        without, within, writes = [], [], []
        for _ in range(options.epochs):
            begin = time.perf_counter()
            next(plain)
            middle = time.perf_counter()
            row = next(kept)
            trained = time.perf_counter()
            progress.reached(row, training.state_dict())
            end = time.perf_counter()
            without.append(middle - begin)
            within.append(end - middle)
            writes.append(end - trained)
        size = path.stat().st_size
    epoch, write = median(without[1:]), median(writes[1:])
    whole = epoch * CIFAR / options.images
    ratio = median(within[1:]) / epoch - 1
    print(
        f"{platform.processor() or platform.machine()}, {options.device}, torch {torch.__version__}"
    )
    print(f"epoch of {options.images} images: {epoch:.3f} s; a checkpoint: {size / 1e6:.1f} MB")
    print(f"  written after every epoch:     {ratio:+.2%} by the clock")
    print(f"  a write: {1000 * write:.1f} ms, longest {1000 * max(writes[1:]):.1f} ms")
    print(f"    of this epoch:               {write / epoch:.2%}")
    print(f"    of an epoch of {CIFAR}:      {write / whole:.3%} (target < {TARGET:.0%})")


if __name__ == "__main__":
    main()
