"""What views cost: images a second beside torchvision's transforms of single images, interleaved.

python tests/benchmarks/augmentation.py [--rounds 5]

Both crop or shift, flip, apply two operations of RandAugment, erase and mix; torchvision by its
tensors of one image at a time, as a DataLoader has them, then mixup or cutmix of the batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from selfkd.data import Data, Split
from selfkd.data.augmentation import Mixing, Operations, Views

BATCH = 64
SHAPES = {"8x8 grey": (1, 8, 1000), "28x28 grey": (1, 28, 1000), "32x32 colour": (3, 32, 500)}
OWN = {
    "light": Views(flip=True, jitter=1),
    "strong": Views(
        flip=True,
        jitter=1,
        operations=Operations(),
        erase=0.25,
        mixing=Mixing(mixup=0.8, cutmix=1.0),
    ),
}


def read(data: Data, views: Views) -> None:
    for _ in data.batches("train", batch_size=BATCH, views=views):
        pass


def transform(images: Tensor, labels: Tensor, strength: str) -> None:
    size = images.shape[-1]
    steps: list[v2.Transform] = [v2.RandomCrop(size, padding=1), v2.RandomHorizontalFlip()]
    if strength == "strong":
        steps.append(v2.RandAugment())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if strength == "strong":
        steps.append(v2.RandomErasing(0.25))
    each = v2.Compose(steps)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=10), v2.CutMix(num_classes=10)])
    for part, own in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        batch = torch.stack([each(image) for image in part])
        if strength == "strong":
            mix(batch, own)


def seconds(do: Callable[[], None]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, (channels, size, count) in SHAPES.items():
        images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
        labels = torch.arange(count) % 10
        split, half = Split(images, labels), (0.5,) * channels
        data = Data("noise", split, split, split, tuple("abcdefghij"), size, half, half, "0")
        for strength, views in OWN.items():
            found = [
                (
                    seconds(lambda views=views, data=data: read(data, views)),
                    seconds(lambda i=images, y=labels, s=strength: transform(i, y, s)),
                )
                for _ in range(rounds)
            ]
            own, theirs = (statistics.median(column) for column in zip(*found, strict=True))
            ratios = [one / other for one, other in found]
            print(
                f"{name}, {strength}: selfkd {1e6 * own / count:.0f} us an image, torchvision "
                f"{1e6 * theirs / count:.0f}; ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
