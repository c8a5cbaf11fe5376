"""Reading of a folder of images: selfkd's ways, timm's loader and torchvision's, side by side.

    python tests/benchmarks/folders.py --images 20000 --size 32 --workers 2

Makes a folder of JPEGs, or takes `--root`, which has them in train/CLASS and test/CLASS. Each way
gives shuffled, normalised batches of float32 and no augmentation. In each of `--rounds` rounds
every way opens the folder anew, in turn, and makes `--passes` passes: a pass later than the first
is what an epoch costs. `selfkd, decoded before` finds what `selfkd, first run` has put into the
cache of decoded images; `selfkd, streamed` has no cache. Figures are medians over the rounds; the
ratios are of images a second to those of timm's loader, which has persistent workers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms

from selfkd.data import load_data
from selfkd.data.loader import kept_processes

BATCH = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10
Pass = Callable[[int], Iterator[Tensor]]


def make_folder(root: Path, images: int, size: int) -> None:
    """Write JPEGs of blurred noise in CLASSES classes, a tenth as many for test."""
    random = np.random.default_rng(0)
    then = time.time() - 3600
    for part, count in (("train", images), ("test", images // 10)):
        for i in range(count):
            folder = root / part / f"class_{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
            path = folder / f"{i:06d}.jpg"
            Image.fromarray(pixels).resize((size, size)).save(path, quality=90)
            os.utime(path, (then, then))


def open_selfkd(root: Path, size: int, workers: int, *, in_memory: bool | None) -> Pass:
    data = load_data("folder", root=root, image_size=size, val_size=CLASSES, in_memory=in_memory)
    generator = torch.Generator().manual_seed(0)

    def read(number: int) -> Iterator[Tensor]:
        batches = data.batches("train", batch_size=BATCH, generator=generator, workers=workers)
        return (inputs for inputs, _, _ in batches)

    kept = kept_processes()
    kept.__enter__()
    read.close = lambda: kept.__exit__(None, None, None)  # type: ignore[attr-defined]
    return read


def open_timm(root: Path, size: int, workers: int) -> Pass:
    dataset = timm.data.create_dataset("", root=str(root), split="train")
    loader = timm.data.create_loader(
        dataset, (3, size, size), BATCH, is_training=True, no_aug=True, use_prefetcher=False,
        mean=MEAN, std=STD, num_workers=workers, persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )  # fmt: skip
    return lambda number: (inputs for inputs, _ in loader)


def open_torchvision(root: Path, size: int, workers: int, *, persistent: bool) -> Pass:
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    loader: Any = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(root / "train"), transform),
        batch_size=BATCH, shuffle=True, num_workers=workers,
        persistent_workers=persistent and workers > 0,
    )  # fmt: skip
    return lambda number: (inputs for inputs, _ in loader)


def measure(open_it: Callable[[], Pass], passes: int) -> dict[str, float]:
    """Return seconds to the first batch, and images a second of the first and of later passes."""
    start = time.perf_counter()
    read = open_it()
    seconds, images, first = [], 0, 0.0
    for number in range(passes):
        begun = time.perf_counter()
        images = 0
        for batch in read(number):
            first = first or time.perf_counter() - start
            images += len(batch)
        seconds.append(time.perf_counter() - (begun if number else start))
    getattr(read, "close", lambda: None)()
    return {
        "first batch, s": first,
        "first pass, images/s": images / seconds[0],
        "later passes, images/s": images * len(seconds[1:]) / sum(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, help="folder with train and test; made if not given")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root, size, workers = arguments.root, arguments.size, arguments.workers
        if root is None:
            root = Path(made, "images")
            make_folder(root, arguments.images, size)
        cache, count = Path(made, "cache"), 0

        def selfkd(cached: str, *, in_memory: bool | None = None) -> Callable[[], Pass]:
            def open_it() -> Pass:
                nonlocal count
                count += cached == "first"
                os.environ["SELFKD_CACHE_GB"] = "0" if cached == "none" else "20"
                os.environ["SELFKD_CACHE"] = str(cache / str(count))
                return open_selfkd(root, size, workers, in_memory=in_memory)

            return open_it

        ways: dict[str, Callable[[], Pass]] = {
            "selfkd, first run": selfkd("first"),
            "selfkd, decoded before": selfkd("before"),
            "selfkd, streamed": selfkd("none", in_memory=False),
            "timm": lambda: open_timm(root, size, workers),
            "torchvision": lambda: open_torchvision(root, size, workers, persistent=True),
            "torchvision, anew each pass": lambda: open_torchvision(
                root, size, workers, persistent=False
            ),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, open_it in ways.items():
                found[name].append(measure(open_it, arguments.passes))
    heads = list(found["timm"][0])
    print(f"{'':28}" + "".join(f"{head:>26}" for head in heads))
    medians = {
        name: {head: statistics.median(row[head] for row in rows) for head in heads}
        for name, rows in found.items()
    }
    for name, row in medians.items():
        cells = [f"{row[heads[0]]:.2f}"]
        for head in heads[1:]:
            ratios = [a[head] / b[head] for a, b in zip(found[name], found["timm"], strict=True)]
            spread = f"{min(ratios):.1f}-{max(ratios):.1f}x"
            cells.append(f"{row[head]:,.0f} ({spread})")
        print(f"{name:28}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
