"""Students of teachers that are trained on a transfer set of text as well."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from text_trials import make_trial

from selfkd.config import Config, load_config, to_tree
from selfkd.errors import ConfigError
from selfkd.results import Row
from selfkd.soft_targets.shards import write_shard
from selfkd.tasks import make_task
from selfkd.tasks.text.batches import TrainingText
from selfkd.tasks.text.loss import make_loss
from selfkd.tasks.text.task import TextTask

SETTINGS = [
    "data={name: text, context: 12, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 4, epochs: 2, batch_size: 4, warmup_steps: 0, optimizer: sgd, lr: 1}",
    "checkpoint={seconds: null, epochs: 1}",
]
LETTERS = "abcdefgh "


def document(seed: int, size: int = 60) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name, seeds in (("train", range(6)), ("val", (10, 11)), ("test", (20, 21))):
        (root / "labelled" / name).mkdir(parents=True)
        for seed in seeds:
            (root / "labelled" / name / f"{seed}.txt").write_text(document(seed))
    (root / "more").mkdir()
    for seed in range(30, 36):
        (root / "more" / f"{seed}.txt").write_text(document(seed))
    return root


def start(folder: Path, *settings: str, more: str = "more") -> tuple[Config, TextTask]:
    transfer = f"data.transfer={{name: text, root: {folder / more}, weight: 0.6}}"
    root = f"data.root={folder / 'labelled'}"
    config = load_config(settings=[*SETTINGS, root, transfer, *settings], flags={"task": "text"})
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    return config, task


def make_teacher(config: Config, task: TextTask, folder: Path, tmp_path: Path) -> Row:
    """Return a teacher of random weights whose logits of both texts are cached."""
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    digest = task.save(path, task.make(config.model), config.model, {})
    for of in ("train", "transfer"):
        manifest = task.manifest(digest, {}, of=of)  # type: ignore[arg-type]
        logits = task.predict_batches(str(path), manifest.rows(0), of=of)  # type: ignore[arg-type]
        write_shard(tmp_path / "targets", manifest, view=0, shard=0, logits=logits)
    return {"hash": digest, "checkpoint": str(path)}


def test_batches_and_facts_have_the_transfer_set(folder: Path) -> None:
    config, task = start(folder)
    facts = task.check()
    assert task.transfer is not None
    assert facts.transfer == len(task.transfer.tokens) == 6 * 61
    assert "31 windows, 366 tokens without labels" in facts.notes[-1]
    rows = len(task.data.splits["train"])
    text = TrainingText(task.data.splits["train"], config.train, 3, task.transfer)
    plain = TrainingText(task.data.splits["train"], config.train, 3)
    seen = []
    for step in range(31):
        own, *further = text(step)
        assert torch.equal(own.inputs, plain(step)[0].inputs)
        assert [len(batch.inputs) for batch in further] == [4, 2]
        assert [own.labelled, *(batch.labelled for batch in further)] == [True, False, False]
        seen += [int(row) - rows for batch in further for row in batch.rows[:, 0]]  # type: ignore[index]
    assert sorted(seen) == sorted([*range(0, 366, 12)] * 6)


@pytest.mark.parametrize("labels", ["false", "true"])
@pytest.mark.parametrize("settings", [[], ["distill.live=true"], ["train.label_smoothing=0.1"]])
def test_the_loss_of_a_step(folder: Path, tmp_path: Path, labels: str, settings: list[str]) -> None:
    """The hard term is the mean over the labelled tokens, the soft term over all."""
    config, task = start(folder, f"data.transfer.labels={labels}", "distill.alpha=0.7", *settings)
    teacher = make_teacher(config, task, folder, tmp_path)
    loss = make_loss(task, make_trial(config, tmp_path / "s" / "a.safetensors", [teacher]))
    batches = TrainingText(task.data.splits["train"], config.train, 3, task.transfer)(1)
    total, temperature = sum(batch.total for batch in batches), config.distill.temperature
    student, network = task.make(config.model), task.load(teacher["checkpoint"])[0]
    found: dict[str, Any] = {}
    hard, soft, labelled = torch.zeros(()), torch.zeros(()), 0.0
    for batch in batches:
        logits = student(batch.inputs).logits
        for name, value in loss(logits, batch, total).items():
            found[name] = found.get(name, 0) + value
        own = batch.labels.flatten()
        valid = own >= 0
        z_s, z_t = (z.flatten(0, 1)[valid] for z in (logits, network(batch.inputs).logits))
        if batch.labelled:
            smoothing = config.train.label_smoothing
            hard += F.cross_entropy(z_s, own[valid], reduction="sum", label_smoothing=smoothing)
            labelled += len(z_s)
        log_s, log_t = ((z / temperature).log_softmax(-1) for z in (z_s, z_t))
        soft += temperature**2 * F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    expected = {"hard_loss": hard / labelled, "soft_loss": soft / total}
    expected["loss"] = 0.3 * expected["hard_loss"] + 0.7 * expected["soft_loss"]
    assert (labelled < total) == (labels == "false")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("settings", [[], ["train.ema=0.9"], ["targets.top_k=3"]])
def test_a_resumed_training_ends_like_an_undisturbed_one(
    folder: Path, tmp_path: Path, settings: list[str]
) -> None:
    config, task = start(folder, *settings)
    teachers = [make_teacher(config, task, folder, tmp_path)]
    whole = list(task.train(make_trial(config, tmp_path / "a" / "s.safetensors", teachers)))
    path = tmp_path / "b" / "s.safetensors"
    assert len(list(islice(task.train(make_trial(config, path, teachers)), 1))) == 1
    again = list(task.train(make_trial(config, path, teachers)))
    assert again[-1]["hash"] == whole[-1]["hash"]
    off, other = start(folder, *settings, "data.transfer.weight=0")
    *_, last = other.train(make_trial(off, tmp_path / "c" / "s.safetensors", teachers))
    assert last["hash"] != whole[-1]["hash"]
    assert other.check().transfer == 0


def test_leaks_are_refused(folder: Path, tmp_path: Path) -> None:
    """A document of validation or test, or a window of it anywhere; those of training are said."""

    def check(*texts: str, more: str) -> str:
        (folder / more).mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / more / f"{number}.txt").write_text(text)
        return start(folder, more=more)[1].check().notes[-1]

    assert "1 documents of it also in training" in check(document(3), document(50), more="train")
    with pytest.raises(ValueError, match=r"2 of 3 documents that are \('[a-h ]+' … is in val\)"):
        check(document(10), document(11), document(50), more="documents")
    with pytest.raises(ValueError, match=r"got all documents that are .* remove it"):
        check(document(20), more="only")
    inside = f"{document(60)[:7]}{document(21)[:40]}{document(61)}"
    with pytest.raises(ValueError, match=r"got [23] windows of test \('[a-h ]+' … is in test\)"):
        check(inside, document(50), more="windows")


def test_bad_transfer_sets(folder: Path, tmp_path: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    for settings, match in (
        (["data.transfer.size=99"], "size must be at most 31, the windows of 12 tokens .* got 99"),
        (["data.transfer.name=folder"], "data.transfer.name must be pydoc, .* got 'folder'"),
        ([f"data.transfer.root={folder / 'none'}"], "data.transfer.root must be a folder of .txt"),
        ([f"data.transfer.root={folder / 'empty'}"], "data.transfer.root must have .txt or .jsonl"),
        ([f"data.transfer.root={folder / 'labelled'}"], "must be other text than that of data.nam"),
    ):
        with pytest.raises(ValueError, match=match):
            start(folder, *settings)[1].check()
    with pytest.raises(ConfigError, match=r"data.transfer: has no effect with distill.mode traces"):
        start(folder, "distill.mode=traces")


def test_some_windows_and_further_problems() -> None:
    """Windows are taken by the seed; more problems of arithmetic are none of its splits."""
    config = load_config(
        settings=[
            "data={name: arithmetic, train_size: 50, val_size: 20, tokenizer: chars, context: 64}",
            "data.transfer={name: arithmetic, size: 30}",
            "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
        ],
        flags={"task": "text"},
    )
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    assert "30 windows" in task.check().notes[-1]
    assert task.transfer is not None
    assert task.transfer.tokens.windows == 30
