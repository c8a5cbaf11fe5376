"""Seconds for an epoch on MNIST: selfkd's batches in memory beside torchvision + DataLoader.

    python tests/benchmarks/data.py DATA_ROOT [--rounds 3] [--batch-size 128] [--threads 1]

Every way trains the same small network on the same number of images; the ways take turns, and the
best time of each is compared.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from selfkd.data import Data, load_data
from selfkd.data.augmentation import Views

TARGET = 1.5


def make_student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def train(batches: Iterable[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Seconds of one epoch, reading included, and the mean loss of its last 50 steps."""
    student = make_student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    start = time.perf_counter()
    for inputs, labels, *_ in batches:
        loss = nn.functional.cross_entropy(student(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - start
    return seconds, torch.stack(losses[-50:]).mean().item()


def in_memory(data: Data, batch_size: int, views: Views | None) -> Iterable[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return data.batches("train", batch_size=batch_size, generator=generator, views=views)


def through_torchvision(
    root: str, images: int, batch_size: int, workers: int
) -> Iterable[tuple[Tensor, ...]]:
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset = Subset(MNIST(root, transform=transform), range(images))
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder that holds MNIST in torchvision's layout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = load_data("mnist", root=args.root)
    size, images = args.batch_size, len(data.train)
    ways: dict[str, Callable[[], Iterable[tuple[Tensor, ...]]]] = {
        "selfkd in memory": lambda: in_memory(data, size, None),
        "selfkd in memory, jitter 2": lambda: in_memory(data, size, Views(jitter=2)),
        "torchvision, 0 workers": lambda: through_torchvision(args.root, images, size, 0),
        "torchvision, 2 workers": lambda: through_torchvision(args.root, images, size, 2),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds, loss = train(way())
            times[name].append(seconds)
            print(f"{name:28} {seconds:7.2f} s   loss {loss:.3f}", flush=True)

    best = {name: min(seconds) for name, seconds in times.items()}
    theirs = min(seconds for name, seconds in best.items() if name.startswith("torchvision"))
    print(f"\n{images:,} images, batches of {size}, best of {args.rounds}; {platform.processor()},")
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, seconds in best.items():
        print(f"{name:28} {seconds:7.2f} s   {theirs / seconds:5.2f}x the best of torchvision")
    ratio = theirs / best["selfkd in memory"]
    print(f"{'reached' if ratio >= TARGET else 'MISSED'}: {ratio:.2f}x, target {TARGET}x")


if __name__ == "__main__":
    main()
