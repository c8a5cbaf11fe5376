"""Time of a training step of a language model by what it is distilled from, in label steps.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.token_steps

Student of 2 layers of width 64, teacher of 4 of width 128, 12 windows of 64 tokens over a
vocabulary of 1,024, as in the defaults of `--task text`, from an embedded text. One step of each
kind after the other in one process: time of the processor, medians of the steps, quartiles of the
ratio to the label step of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.distill.outputs import take_logits
from selfkd.models import parameters_count
from selfkd.soft_targets.shards import write_shard
from selfkd.tasks.common import optimizer_of
from selfkd.tasks.text.batches import Batch
from selfkd.tasks.text.loss import make_loss
from selfkd.tasks.text.task import TextTask
from selfkd.training.trial import Trial

TEACHER = {"depth": 4, "width": 128, "heads": 4}
FORMATS = {
    "labels": "",
    "dense": "",
    "top 32": "targets.top_k=32",
    "8 samples": "targets.samples=8",
    "live": "distill.live=true",
}
Step = Callable[[], None]


def make_step(name: str, folder: Path, teacher: nn.Module) -> Step:
    """Return a training step of a student of its own."""
    settings = [FORMATS[name]] if FORMATS[name] else []
    config = load_config(settings=settings, flags={"task": "text"})
    task = TextTask(to_tree(config))
    teachers = []
    if name != "labels":
        path = folder / "teacher.safetensors"
        model = ModelConfig(name="selfkd_gpt", args=TEACHER)
        digest = task.save(path, teacher, model, {})
        teachers = [{"hash": digest, "checkpoint": str(path)}]
    if name not in ("labels", "live"):
        manifest = task.manifest(digest, {})
        for shard in range(manifest.shards):
            logits = task.predict_batches(str(path), manifest.rows(shard))
            write_shard(folder, manifest, view=0, shard=shard, logits=logits)
        print(f"{name:10} {manifest.row_bytes:,} bytes a token: {manifest.words}", flush=True)
    trial = Trial(
        config=config, stage="benchmark", seed=0, model=config.model, path=folder / "student",
        targets=folder, teachers=teachers,
    )  # fmt: skip
    torch.manual_seed(0)
    student, data, size = (
        task.make(config.model),
        task.data.splits["train"],
        config.train.batch_size,
    )
    optimizer, loss = optimizer_of(student, config.train), make_loss(task, trial)
    order = torch.randperm(data.windows - 1, generator=torch.Generator().manual_seed(0))
    size = config.train.batch_size
    batches = cycle(order.split(size)[: len(order) // size])

    def step() -> None:
        windows = next(batches)
        batch = Batch(data.inputs(windows), data.labels_of(windows), rows=data.rows(windows))
        logits = take_logits(student(batch.inputs), "student")
        optimizer.zero_grad(set_to_none=True)
        loss(logits, batch, batch.total)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.train.clip_grad)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    config = load_config(flags={"task": "text"})
    task = TextTask(to_tree(config))
    torch.manual_seed(1)
    teacher = task.make(ModelConfig(name="selfkd_gpt", args=TEACHER)).eval()
    share = parameters_count(teacher) / parameters_count(task.make(config.model))
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: make_step(name, Path(folder), teacher) for name in FORMATS}
        torch.set_num_threads(arguments.threads)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.rounds + 5):
            for name, step in steps.items():
                begun = time.process_time()
                step()
                if number >= 5:  # the first ones warm up
                    seconds[name].append(time.process_time() - begun)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds")
    print(f"teacher of {share:.1f} times the student's parameters")
    print(f"{'targets':10} {'ms':>7} {'label steps':>12} {'quartiles':>14}")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["labels"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = 1e3 * statistics.median(taken)
        print(f"{name:10} {median:7.1f} {middle:12.2f}   {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
