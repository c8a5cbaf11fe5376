"""What all parts of the check share: the device, seconds that are left, data and measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selfkd.data import Data, Split


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    note: str = ""


@dataclass
class Setting:
    """Device and size of the check."""

    device: str = "cuda"
    quick: bool = False
    """Whether a few steps of small networks are enough, to try the check itself."""
    seconds: float = 60.0
    """Seconds that a part may take."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self.started)

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def rate(self, step: Callable[[], object], items: int, *, seconds: float) -> float:
        """Return how many items a second a step handles, after some that are not counted."""
        for _ in range(1 if self.quick else 5):
            step()
        self.wait()
        begun, steps = time.perf_counter(), 0
        while True:
            for _ in range(1 if self.quick else 10):
                step()
                steps += 1
            self.wait()
            spent = time.perf_counter() - begun
            if self.quick or spent > min(seconds, max(self.left, 0.1)):
                return items * steps / spent

    def seconds_of(self, step: Callable[[], object], *, seconds: float) -> float:
        """Return the seconds of a step."""
        return 1 / self.rate(step, 1, seconds=seconds)


def digits() -> Data:
    """Return scikit-learn's digits in three splits, on the CPU."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.as_tensor(found.images * 15.9375).to(torch.uint8)[:, None]
    labels = torch.as_tensor(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val, test = torch.split(order, [600, 400, len(order) - 1000])
    splits = (Split(pixels[own], labels[own]) for own in (train, val, test))
    names = tuple(map(str, range(10)))
    return Data("digits", *splits, names, 8, (0.3,), (0.4,), "digits")


def pictures(images: int, size: int, classes: int, device: str) -> Data:
    """Return synthetic pictures on a device."""
    generator = torch.Generator().manual_seed(1)
    shape = (images, 3, size, size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(images) % classes).to(device)
    small = split.take(torch.arange(min(64, images), device=device))
    names = tuple(map(str, range(classes)))
    data = Data("pictures", split, small, small, names, size, (0.5,) * 3, (0.25,) * 3, "pictures")
    return data


def endless(data: Data, batch_size: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of the training split for ever."""
    order = torch.Generator().manual_seed(0)
    while True:
        yield from data.batches(
            "train", batch_size=batch_size, generator=order, device=device, drop_last=True
        )
