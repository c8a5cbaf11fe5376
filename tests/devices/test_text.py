"""Training, generation and evaluation of language models on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Waits, fake_cuda
from text_trials import make_trial

from selfkd.config import Config, load_config, to_tree
from selfkd.results import Row
from selfkd.soft_targets.shards import write_shard
from selfkd.tasks import make_task
from selfkd.tasks.task import Pool
from selfkd.tasks.text import train
from selfkd.tasks.text.task import TextTask
from selfkd.worker.jobs import run_job

SETTINGS = [
    "data={name: text, context: 12, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 6, epochs: 2, batch_size: 8, warmup_steps: 0, optimizer: sgd, fused: true}",
    "checkpoint={seconds: null, epochs: 1}",
]
LAYERS = (
    "distill.terms=[{name: hidden_state, student: transformer.h.0, project: true}, "
    "{name: logit_mse}, {name: attention_matrices, student: transformer.h.0.attn}]"
)
WAYS: dict[str, tuple[str, ...]] = {
    "labels": (),
    "smoothing": ("train.label_smoothing=0.1", "train.clip_grad=1"),
    "cached": (),
    "top_k": ("targets.top_k=3",),
    "samples": ("targets.samples=4", "distill.temperature=1"),
    "live": ("distill.live=true", "train.amp=bfloat16", "train.ema=0.9"),
    "reverse": ("distill.live=true", "distill.divergence=reverse_kl"),
    "layers": ("distill.live=true", LAYERS),
    "accumulate": ("train.accumulate=2",),
    "on_policy": ("distill.live=true", "distill.on_policy=1"),
    "transfer": ("data.transfer={name: text, root: MORE, size: 30}",),
}


class Text:
    """A text and two teachers of it, made on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text").mkdir()
        (folder / "text" / "a.txt").write_text("0123456789+=: " * 60)
        (folder / "more").mkdir()
        (folder / "more" / "b.txt").write_text("9876543210+=: " * 30)
        config, task = self.start()
        self.teachers = list[Row]()
        for seed in range(2):
            torch.manual_seed(seed)
            path = folder / f"teacher{seed}.safetensors"
            digest = task.save(path, task.make(config.model), config.model, {})
            self.teachers.append({"hash": digest, "checkpoint": str(path), "weight": 0.5})

    def start(self, *settings: str) -> tuple[Config, TextTask]:
        given = [*SETTINGS, f"data.root={self.folder / 'text'}", *settings]
        given = [each.replace("MORE", str(self.folder / "more")) for each in given]
        config = load_config(settings=given, flags={"task": "text"})
        task = make_task(to_tree(config))
        assert isinstance(task, TextTask)
        return config, task

    def cache(self, *settings: str, of: Pool = "train") -> None:
        _, task = self.start(*settings)
        for teacher in self.teachers:
            manifest = task.manifest(teacher["hash"], {}, of=of)
            for shard in range(manifest.shards):
                rows = manifest.rows(shard)
                found = task.predict_batches(teacher["checkpoint"], rows, of=of)
                logits = torch.cat(list(found))
                write_shard(self.folder / "targets", manifest, view=0, shard=shard, logits=logits)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    made = Text(tmp_path_factory.mktemp("text"))
    for way in ("cached", "top_k", "samples"):
        made.cache(*WAYS[way])
    made.cache(*WAYS["transfer"], of="transfer")
    return made


class Steps(list[list[str]]):
    """What each step waited for; that of the first of a part is left out."""

    waits: Waits | None = None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found, descend = Steps(), train.descend
    parts = set[int]()

    def watched(training: Any, *arguments: Any) -> None:
        descend(training, *arguments)
        assert found.waits is not None
        if training.epoch in parts:
            found.append(list(found.waits.found))
        parts.add(training.epoch)
        found.waits.clear()

    monkeypatch.setattr(train, "descend", watched)
    return found


@contextmanager
def on_gpu(text: Text, *settings: str) -> Iterator[tuple[Waits, Config, TextTask]]:
    with fake_cuda() as waits:
        config, task = text.start("resources.gpu=1", *settings)
        assert task.device == "cuda"
        yield waits, config, task


OF_TWO = ("cached", "top_k", "samples", "live")
"""Ways whose arithmetic of two teachers is another; of the rest it is one of these."""


@pytest.mark.parametrize(
    ("way", "count"),
    [
        *((way, 1) for way in WAYS),
        *((way, 2) for way in OF_TWO),
        *(pytest.param(way, 2, marks=pytest.mark.slow) for way in WAYS if way not in OF_TWO),
    ],
)
def test_a_step_waits_for_nothing(text: Text, steps: Steps, way: str, count: int) -> None:
    teachers = [] if way in ("labels", "smoothing") else text.teachers[:count]
    with on_gpu(text, *WAYS[way]) as (waits, config, task):
        steps.waits = waits
        trial = make_trial(config, text.folder / f"{way}_{count}" / "student.safetensors", teachers)

        rows = list(task.train(trial))

    assert [row["epoch"] for row in rows] == [1, 2]
    assert steps == [[]] * 4


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"transform": "permuted"}, {"transform": "confidence"}], ids=str
)
def test_further_ways_to_train_stay_on_the_gpu(
    text: Text, steps: Steps, options: dict[str, Any]
) -> None:
    name = "_".join(map(str, options.values()))
    with on_gpu(text) as (waits, config, task):
        steps.waits = waits
        trial = make_trial(config, text.folder / name / "s.safetensors", text.teachers[:1])

        assert len(list(task.train(trial, **options))) == 2

    assert steps == [[]] * 4


def test_logits_and_predictions_are_made_on_the_gpu(text: Text) -> None:
    checkpoint = text.teachers[0]["checkpoint"]
    with on_gpu(text) as (_, _, task):
        logits = task.predict(checkpoint, "val")
        batches = list(task.predict_batches(checkpoint, range(5)))

        assert {logits.device.type, batches[0].device.type} == {"cpu"}
        assert task.check([]) is not None


def jobs_of(text: Text, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return jobs beside training, with their payloads."""
    first, second = text.teachers
    own = {"checkpoint": first["checkpoint"]}
    both = [row["checkpoint"] for row in text.teachers]
    run = {"run": str(folder), "shard": 0}
    return {
        "writing": ("write", {**own, **run, "targets": str(folder / "written")}),
        "evaluation": (
            "evaluate",
            {"student": second["checkpoint"], "teachers": [first], "diagnose": True},
        ),
        "deployed": ("deploy_measure", {"members": text.teachers}),
        "rounded": ("round_checkpoint", {**own, "bits": 4, "save": str(folder / "r.safetensors")}),
        "soup": (
            "average_checkpoints",
            {"checkpoints": both, "save": str(folder / "a.safetensors"), "greedy": True},
        ),
    }


@pytest.mark.parametrize("name", ["writing", "evaluation", "deployed", "rounded", "soup"])
def test_further_jobs_run_on_the_gpu(text: Text, name: str, tmp_path: Path) -> None:
    kind, payload = jobs_of(text, tmp_path)[name]
    traces = ["distill.mode=traces"] if kind == "write" else []
    with on_gpu(text, *traces) as (_, config, _):
        (row,) = run_job(kind, {"config": to_tree(config), **payload})

    assert "fault" not in row


def test_a_student_is_not_left_waiting_by_its_own_loss(
    text: Text, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfkd.tasks.text import batches

    monkeypatch.setattr(  # as before: labels on the GPU have to be counted there
        batches.Batch,
        "to",
        lambda own, device: own._replace(
            inputs=own.inputs.to(device), labels=own.labels.to(device)
        ),
    )
    with on_gpu(text) as (waits, config, task):
        steps.waits = waits
        trial = make_trial(config, text.folder / "left" / "s.safetensors", text.teachers[:1])
        list(task.train(trial))

    found = {wait.partition(" at ")[0] for waits in steps for wait in waits}
    assert {"copy to the GPU", "aten::nonzero"} <= found
