"""What ten teachers cost a student on MNIST: an epoch, a search, and the memory of four trials.

    python tests/benchmarks/ensemble.py epoch DATA_ROOT [--rounds 5] [--steps 60]
    python tests/benchmarks/ensemble.py search DATA_ROOT [--epochs 6] [--trials 16]
    python tests/benchmarks/ensemble.py memory

Student 2x800, ten members 2x1200, one thread. The ways of `epoch` take turns, a piece of an epoch
each; its ratios are of the sums. Of `search` the labels-only trials and the distilled ones run one
after the other in the same warm pool, and the caching counts. The networks are not trained: what
they predict does not change what it costs.
"""

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from selfkd import Distiller, Ensemble, make_model
from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.data import Data, load_data
from selfkd.execution.jobs import Batch, Job
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import open_store
from selfkd.tasks.images.task import ImageTask

MEMBERS = 10
BATCH = 128
GIB = 2**30


def make_mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    args = {"width": width, "depth": 2}
    return make_model("selfkd_mlp", args, num_classes=10, in_chans=1, image_size=28)


class Mean(nn.Module):
    """The ensemble as one teacher: what timm's task is given, and runs at every step."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.pretrained_cfg = members[0].pretrained_cfg
        self.num_classes = members[0].num_classes

    def forward(self, inputs: Tensor) -> Tensor:
        logits = torch.stack([member(inputs) for member in self.members])
        return logits.softmax(dim=-1).mean(dim=0).log()


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_steps(data: Data, root: Path) -> dict[str, Step]:
    """Each way's loss of a batch, with a student of its own."""
    members = [make_mlp(1200, seed) for seed in range(MEMBERS)]
    key = data_key("benchmark", {})
    for number, member in enumerate(members):
        manifest = Manifest(
            teacher=str(number),
            data=key,
            fingerprint="benchmark",
            recipe={},
            views=1,
            images=len(data.train),
            classes=10,
        )
        with torch.no_grad():
            batches = data.batches("train", batch_size=manifest.shard_size)
            for shard, (inputs, _, _) in enumerate(batches):
                write_shard(root, manifest, view=0, shard=shard, logits=member(inputs))
    teachers = [str(number) for number in range(MEMBERS)]
    probabilities = open_store(root, teachers, data=key)
    logits = open_store(root, teachers, data=key, average="logits")
    task = LogitDistillationTask(
        student_model=make_mlp(800, 0),
        teacher_model=Mean(members),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=0.1,
        temperature=4.0,
        verbose=False,
    )
    task.train()
    ways = {
        "labels only": Distiller(),
        "cached, probabilities": Distiller(targets=probabilities),
        "cached, logits": Distiller(targets=logits, average="logits"),
        "live, selfkd": Distiller(Ensemble(members)),
    }
    steps = {name: make_step(distiller) for name, distiller in ways.items()}

    def timms(inputs: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        loss: Tensor = task(inputs, labels)["loss"]
        return loss

    return steps | {"live, timm": trained(timms, task.trainable_module)}


def make_step(distiller: Distiller) -> Step:
    student = make_mlp(800, 0).train()

    def step(inputs: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return distiller(student(inputs), labels, inputs=inputs, index=index)["loss"]

    return trained(step, student)


def trained(loss_of: Step, student: nn.Module) -> Step:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step(inputs: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        loss = loss_of(inputs, labels, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def forever(data: Data) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from data.batches("train", batch_size=BATCH, generator=generator, drop_last=True)


def epoch(data: Data, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        ways = make_steps(data, Path(root))
        batches = forever(data)
        for step in ways.values():  # what is done once: the packing of a view, the first autograd
            step(*next(batches))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name, step in ways.items():
                if name.startswith("live") and turn % 3:
                    continue
                start = time.perf_counter()
                for _ in range(steps):
                    step(*next(batches))
                seconds[name].append((time.perf_counter() - start) / steps)
    base = sorted(seconds["labels only"])
    typical = base[len(base) // 2]
    print(f"MNIST, batches of {BATCH}, student 2x800, {MEMBERS} members 2x1200")
    for name, times in seconds.items():
        middle = sorted(times)[len(times) // 2]
        print(f"  {name:22} {middle * 1e3:7.2f} ms a step   {middle / typical:5.2f} of labels only")


def search(root: str, epochs: int, trials: int) -> None:
    from selfkd.execution.cluster import connect, find_slots
    from selfkd.execution.pool import Pool

    settings = [
        "data.name=mnist",
        f"data.root={Path(root).absolute()}",
        "model={name: selfkd_mlp, args: {width: 800, depth: 2}}",
        f"train={{epochs: {epochs}, batch_size: {BATCH}, lr: 0.05, weight_decay: 0, clip_grad: 1}}",
    ]
    tree = to_tree(load_config(settings=settings))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = ImageTask(tree)
        wide = ModelConfig(name="selfkd_mlp", args={"width": 1200, "depth": 2})
        teachers = []
        for number in range(MEMBERS):
            path = folder / f"{number}.safetensors"
            digest = task.save(path, make_mlp(1200, number), wide, {})
            teachers.append({"hash": digest, "checkpoint": str(path)})
        shards = -(-len(task.data.train) // task.config.targets.shard_size)
        place = {"targets": str(folder), "run": str(folder), "view": 0, "config": tree}
        cache = [
            Job(
                "cache_teacher_logits",
                {**place, "checkpoint": teacher["checkpoint"], "shard": shard},
            )
            for teacher in teachers
            for shard in range(shards)
        ]

        def train(distilled: bool) -> list[Job]:
            common = {"config": tree, "model": tree["model"], "targets": str(folder)}
            own = {"stage": "student", "teachers": teachers if distilled else []}
            return [
                Job(
                    "train",
                    {**common, **own, "seed": n, "student": str(folder / f"{distilled}-{n}.st")},
                )
                for n in range(trials)
            ]

        with connect() as joined:
            slots = find_slots(cpu=1, gpu=0, storage=folder, joined=joined, say=print)
            with Pool("selfkd.worker.jobs:run_job", cpu=1, gpu=0, warm=slots) as pool:
                timed(pool, [Job("check", {"config": tree}) for _ in range(slots)])  # imports, data
                labels = timed(pool, train(distilled=False))
                caching = timed(pool, cache)
                distilled = timed(pool, train(distilled=True))
    print(f"{trials} trials of {epochs} epochs, {slots} at a time, {MEMBERS} members 2x1200")
    print(f"  labels only            {labels:7.1f} s")
    print(f"  caching                {caching:7.1f} s")
    print(f"  distilled              {distilled:7.1f} s")
    print(f"  caching and distilled  {(caching + distilled) / labels:7.2f} of labels only")


def timed(pool: object, jobs: list[Job]) -> float:
    batch = Batch(jobs)
    start = time.perf_counter()
    pool.run(batch)
    failed = [outcome.error for outcome in batch.outcomes if outcome.error]
    assert not failed, failed[0]
    return time.perf_counter() - start


def private_bytes() -> int:
    """Memory that no other process can share: not that of mapped files, which all have once."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def read(root: str, key: str, images: int, queue: "multiprocessing.Queue[int]") -> None:
    stored = open_store(Path(root), ["0"], data=key)
    generator = torch.Generator().manual_seed(os.getpid())
    before = private_bytes()
    for _ in range(images // 1000):
        stored(torch.randint(images, (1000,), generator=generator), 0)
    queue.put(private_bytes() - before)


def memory(images: int = 525_000, classes: int = 1000, trials: int = 4) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        key = data_key("benchmark", {})
        manifest = Manifest(
            teacher="0",
            data=key,
            fingerprint="benchmark",
            recipe={},
            views=1,
            images=images,
            classes=classes,
        )
        for shard in range(manifest.shards):
            logits = torch.randn(len(manifest.rows(shard)), classes)
            write_shard(root, manifest, view=0, shard=shard, logits=logits)
        size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        context = multiprocessing.get_context("spawn")
        queue: multiprocessing.Queue[int] = context.Queue()
        processes = [
            context.Process(target=read, args=(name, key, images, queue)) for _ in range(trials)
        ]
        for process in processes:
            process.start()
        grown = sorted(queue.get() for _ in processes)
        for process in processes:
            process.join()
    print(f"a store of {size / GIB:.2f} GiB, {trials} processes, all of it read by each")
    print("  private memory added: " + ", ".join(f"{each / 2**20:.0f} MiB" for each in grown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["epoch", "search", "memory"])
    parser.add_argument("root", nargs="?", help="folder of torchvision's MNIST")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--trials", type=int, default=16)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if options.what == "memory":
        memory()
    elif options.root is None:
        parser.error("DATA_ROOT must be given")
    elif options.what == "epoch":
        epoch(load_data("mnist", root=options.root), options.rounds, options.steps)
    else:
        search(options.root, options.epochs, options.trials)


if __name__ == "__main__":
    main()
