"""What the Distiller adds to a labels-only step: ResNet-20, batches of 128 32x32 images.

    python tests/benchmarks/distiller.py [--rounds 15] [--threads 1]

A step with `Distiller()` beside the same step with `F.cross_entropy`, taking turns, the first of
each round in turn too. The ratio is of the medians of the processor's time, so that other work on
the machine counts little, and beside it stands the call alone.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd import Distiller, make_model

TARGET = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    student = make_model("selfkd_resnet20", num_classes=10, in_chans=3, image_size=32)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    inputs, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    distiller = Distiller()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "F.cross_entropy": lambda logits: F.cross_entropy(logits, labels),
        "Distiller()": lambda logits: distiller(logits, labels, inputs=inputs)["loss"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(options.rounds + 1):
        for name, loss in list(losses.items())[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            optimizer.zero_grad()
            loss(student(inputs)).backward()
            optimizer.step()
            if turn:
                seconds[name].append(time.process_time() - start)
    typical = {name: statistics.median(times) for name, times in seconds.items()}
    plain, ours = typical.values()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, value in typical.items():
        print(f"  {name:16} {value * 1e3:7.1f} ms a step")
    print(f"  ratio {ours / plain:.3f} (at most {TARGET})")
    logits = student(inputs).detach().requires_grad_()
    for name, loss in losses.items():
        start = time.process_time()
        for _ in range(300):
            loss(logits).backward()
        print(f"  {name:16} {(time.process_time() - start) / 300 * 1e6:7.0f} µs alone")


if __name__ == "__main__":
    main()
