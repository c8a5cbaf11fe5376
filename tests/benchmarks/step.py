"""An epoch of selfkd's training beside one of the best loop that is written by hand.

    python tests/benchmarks/step.py [--root MNIST] [--seconds 120] [--only digits] [--compile all]
    python tests/benchmarks/step.py --table [--device cuda]

Both train the same network on the same images in one process and on one thread, one epoch of each
after the other and the first of each pair in turn, and the processor's time is taken: other work on
the machine hits both. Ratios are of the epochs of one pair, their median with its quartiles.

Ways: labels; cached logits of one teacher; those of ten, averaged; a live teacher.
Columns: the defaults, bfloat16 where the processor computes in it, and `torch.compile` of both.

`--table` measures each setting of selfkd's own against neither of them: what the table of defaults,
`selfkd.config.speed`, is made from.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from plain_loop import ALPHA, TEMPERATURE, Way, plain_epochs
from torch import Tensor, nn

from selfkd import Distiller, make_model
from selfkd.data import Data, Split
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import open_store
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_optimizer, make_scheduler

WAYS: tuple[Way, ...] = ("labels", "cached", "ten", "live")
WANTED = {"labels": 1.03, "cached": 1.03, "ten": 1.06}
LONG = 10_000  # epochs of a schedule that no measurement reaches the end of


@dataclass(frozen=True)
class Case:
    """A network and its data."""

    name: str
    model: str
    args: dict[str, object]
    shape: tuple[int, int]
    images: int
    val: int
    batch_size: int
    share: float = 1.0
    optimizer: str = "sgd"


CASES = (
    Case("digits CNN", "selfkd_cnn", {"width": 16}, (1, 8), 200, 400, 20),
    Case("MNIST MLP", "selfkd_mlp", {"width": 800, "depth": 2}, (1, 28), 1280, 256, 128),
    Case("ResNet-8", "selfkd_resnet8", {}, (3, 32), 256, 64, 128, share=1.5),
    Case("ResNet-20", "selfkd_resnet20", {}, (3, 32), 128, 32, 128, share=2.0),
)
VIT = Case(
    "ViT-Tiny",
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 4},
    (3, 32),
    32,
    16,
    32,
    optimizer="adamw",
)


def load(case: Case, root: str | None) -> Data:
    """Return the data of a case: digits, MNIST where there is one, else noise of its size."""
    draw = torch.Generator().manual_seed(0)
    channels, size = case.shape
    count = case.images + case.val
    if case.model == "selfkd_cnn":
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
        pixels = (pixels * (255 / 16)).to(torch.uint8).reshape(-1, 1, size, size)
    elif case.model == "selfkd_mlp" and root is not None:
        from torchvision.datasets import MNIST

        found = MNIST(root)
        pixels, labels = found.data[:, None], found.targets
    else:
        pixels = torch.randint(
            256, (count, channels, size, size), generator=draw, dtype=torch.uint8
        )
        labels = torch.randint(10, (count,), generator=draw)
    order = torch.randperm(len(pixels), generator=draw)[:count]
    train, val = order[: case.images], order[case.images :]
    splits = [Split(pixels[index], labels[index]) for index in (train, val, val)]
    names = tuple(map(str, range(10)))
    mean = (pixels[train].float().mean().item() / 255,) * channels
    std = (pixels[train].float().std().item() / 255,) * channels
    return Data(case.name, *splits, names, size, mean, std, "benchmark")


def inputs_of(split: Split, data: Data) -> tuple[Tensor, Tensor]:
    """Return the normalised images of a split and their labels, as selfkd makes them."""
    mean = torch.tensor(data.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(data.std, dtype=torch.float64)[:, None, None]
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return split.images.float().mul_(scale).add_(shift), split.labels


def network(case: Case, seed: int = 0) -> nn.Module:
    """Return a network of a case, with the weights of a seed."""
    torch.manual_seed(seed)
    channels, size = case.shape
    return make_model(case.model, case.args, num_classes=10, in_chans=channels, image_size=size)


@dataclass(frozen=True)
class Settings:
    """Settings of both loops."""

    channels_last: bool = True
    fused: bool = True
    compiled: bool = False
    half: bool = False


def ours(
    case: Case,
    data: Data,
    way: Way,
    settings: Settings,
    targets: object,
    teacher: nn.Module | None,
    device: str = "cpu",
) -> Iterator[object]:
    """Return selfkd's epochs."""
    student = network(case).to(device)
    optimizer = make_optimizer(
        student,
        name=case.optimizer,
        lr=0.05 if case.optimizer == "sgd" else 1e-3,
        momentum=0.9,
        weight_decay=5e-4,
        fused=settings.fused,
    )
    schedule = make_scheduler(
        optimizer,
        schedule="cosine",
        epochs=LONG,
        warmup_epochs=0,
        steps_per_epoch=-(-case.images // case.batch_size),
    )
    training = Training(
        student=student,
        optimizer=optimizer,
        scheduler=schedule,
        generator=torch.Generator().manual_seed(0),
        precision="bfloat16" if settings.half else "none",
        channels_last=settings.channels_last,
        device=device,
    )
    if teacher is not None and settings.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    source = {"labels": {}, "live": {"teacher": teacher}}.get(way, {"targets": targets})
    distiller = Distiller(**source, temperature=TEMPERATURE, alpha=ALPHA, quick=settings.fused)
    return fit(
        training,
        data,
        distiller,
        epochs=LONG,
        batch_size=case.batch_size,
        compiled=settings.compiled,
    )


def plain(
    case: Case, data: Data, way: Way, settings: Settings, logits: Tensor, teacher: nn.Module
) -> Iterator[object]:
    """Return the epochs of the loop by hand."""
    return plain_epochs(
        network(case),
        inputs_of(data.train, data),
        inputs_of(data.val, data),
        way=way,
        epochs=LONG,
        batch_size=case.batch_size,
        teacher_logits=logits if way in ("cached", "ten") else None,
        teacher=teacher if way == "live" else None,
        compiled=settings.compiled,
        half=settings.half,
        channels_last=settings.channels_last,
        fused=settings.fused,
    )


def cached(case: Case, data: Data, members: int, root: Path) -> tuple[Tensor, object]:
    """Return teachers' logits of the training images, and a store of them."""
    inputs, _ = inputs_of(data.train, data)
    found = []
    key = data_key(case.name, {}, top_k=None)
    for member in range(members):
        with torch.no_grad():
            logits = network(case, seed=member + 1).eval()(inputs)
        manifest = Manifest(
            teacher=f"{members}-{member}",
            data=key,
            fingerprint=case.name,
            recipe={},
            views=1,
            images=case.images,
            classes=10,
        )
        write_shard(root, manifest, view=0, shard=0, logits=logits)
        found.append(logits)
    names = [f"{members}-{member}" for member in range(members)]
    return torch.stack(found), open_store(root, names, data=key)


@dataclass
class Pair:
    """Two loops that take turns."""

    name: str
    loops: tuple[Iterator[object], Iterator[object]]
    steps: int
    wanted: float | None
    share: float
    """Share of the time."""
    seconds: list[tuple[float, float]]
    clock: Callable[[], float] = time.process_time

    def turn(self, number: int) -> float:
        """Run an epoch of each, the other first at every second turn; return their seconds."""
        spent = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            start = self.clock()
            next(self.loops[which])
            spent[which] = self.clock() - start
        self.seconds.append((spent[0], spent[1]))
        return sum(spent)

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(a / b for a, b in self.seconds)

    def describe(self) -> str:
        """Return milliseconds a step of both, and the ratio with its quartiles."""
        mine, theirs = (statistics.median(times) for times in zip(*self.seconds, strict=True))
        ratios = [a / b for a, b in self.seconds]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        text = f"{mine / self.steps * 1e3:9.3f} {theirs / self.steps * 1e3:9.3f} ms a step"
        text += f"   {middle:.3f} [{low:.3f}, {high:.3f}] of {len(ratios)}"
        if self.wanted is not None:
            text += f"   (at most {self.wanted}{'' if middle <= self.wanted else ': MISSED'})"
        return f"{self.name:30} {text}"


def measure(pairs: list[Pair], seconds: float) -> None:
    """Let pairs take turns until each has had its share of the time; the first turn is dropped."""
    for pair in pairs:
        pair.turn(0)
        pair.seconds.clear()
    gc.collect()
    gc.freeze()  # what is collected later is of the loops
    whole = sum(pair.share for pair in pairs)
    left = {pair.name: seconds * pair.share / whole for pair in pairs}
    for number in itertools.count(1):
        waiting = [pair for pair in pairs if left[pair.name] > 0 or len(pair.seconds) < 3]
        if not waiting:
            return
        for pair in waiting:
            left[pair.name] -= pair.turn(number)


def compare(case: Case, options: argparse.Namespace, folder: Path) -> Iterator[Pair]:
    """Yield selfkd's loop and the one by hand, for each way and column of a case."""
    data = load(case, options.root)
    one, ten = cached(case, data, 1, folder), cached(case, data, 10, folder)
    columns = [(way, "", Settings()) for way in options.ways]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        columns.append(("labels", "bf16", Settings(half=True)))
    if options.compile == "all" or (options.compile == "small" and case in CASES[:2]):
        columns.append(("labels", "compiled", Settings(compiled=True)))
    for way, column, settings in columns:
        logits, targets = ten if way == "ten" else one
        mine = ours(case, data, way, settings, targets, network(case, seed=1))
        theirs = plain(case, data, way, settings, logits, network(case, seed=1))
        name = " ".join(filter(None, (case.name, way, column)))
        wanted = WANTED.get(way) if not column else None
        steps = -(-case.images // case.batch_size)
        yield Pair(name, (mine, theirs), steps, wanted, case.share, [])


def settle(case: Case, options: argparse.Namespace) -> Iterator[Pair]:
    """Yield selfkd's own loop with settings of speed beside itself without any."""
    data = load(case, options.root).to(options.device)
    cuda = options.device == "cuda"
    clock = partial(synchronised, torch.cuda.synchronize) if cuda else time.process_time
    for column in (Settings(fused=False), Settings(channels_last=False), Settings()):
        loops = [
            ours(case, data, "labels", settings, None, None, options.device)
            for settings in (column, Settings(channels_last=False, fused=False))
        ]
        said = [n for n in ("channels_last", "fused") if getattr(column, n)]
        steps = -(-case.images // case.batch_size)
        name = f"{case.name}: {' + '.join(said)}"
        yield Pair(name, (loops[0], loops[1]), steps, None, case.share, [], clock)


def synchronised(wait: Callable[[], None]) -> float:
    """Return the clock's time when a GPU has done what it was given."""
    wait()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("SELFKD_DATA"))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--only", default="", help="beginning of a case's name")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--compile", default="small", choices=["none", "small", "all"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread")
    cases = (*CASES, VIT) if options.table else CASES
    cases = [case for case in cases if case.name.startswith(options.only)]
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            pair
            for case in cases
            for pair in (
                settle(case, options) if options.table else compare(case, options, Path(folder))
            )
        ]
        measure(pairs, options.seconds)
    print(f"{'':30} {'selfkd':>9} {'neither' if options.table else 'by hand':>9}")
    for pair in pairs:
        print(pair.describe())


if __name__ == "__main__":
    main()
