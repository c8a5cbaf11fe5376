"""The loss of a step: weights of tokens, batches added up, teachers run live, written batches."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from text_trials import make_trial
from torch import nn

from selfkd.config import Config, load_config, to_tree
from selfkd.errors import NonFiniteLossError
from selfkd.results import Row
from selfkd.soft_targets.shards import write_shard
from selfkd.tasks import make_task
from selfkd.tasks.text.batches import Batch
from selfkd.tasks.text.data import IGNORED, encode_examples
from selfkd.tasks.text.documents import Example
from selfkd.tasks.text.loss import Loss, make_loss
from selfkd.tasks.text.task import TextTask
from selfkd.worker.teachers import read_targets

SETTINGS = [
    "data={name: text, context: 12, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 4, epochs: 2, batch_size: 8, warmup_steps: 0, optimizer: sgd}",
    "checkpoint={seconds: null, epochs: 1}",
]


def start(tmp_path: Path, *settings: str, weight: float = 1.0) -> tuple[Config, TextTask]:
    """Return a task of examples."""
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_text("0123456789+=: " * 40)
    config = load_config(
        settings=[*SETTINGS, f"data.root={tmp_path / 'text'}", *settings], flags={"task": "text"}
    )
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    examples = [
        Example(f"{a}+{b}=", f"{a + b}", f"{'1' * (a % 3)}:") for a in range(9) for b in range(9)
    ]
    tokens = encode_examples(
        tokenizers.Tokenizer.from_str(task.data.tokenizer),
        task.data.end,
        examples,
        12,
        rationale_weight=weight,
    )
    task.data = dataclasses.replace(task.data, splits={**task.data.splits, "train": tokens})
    return config, task


def make_teacher(config: Config, task: TextTask, tmp_path: Path, *, seed: int = 0) -> Row:
    torch.manual_seed(seed)
    path = tmp_path / f"teacher{seed}.safetensors"
    digest = task.save(path, task.make(config.model), config.model, {})
    return {"hash": digest, "checkpoint": str(path)}


def cache(task: TextTask, teacher: Row, tmp_path: Path) -> torch.Tensor:
    """Cache a teacher's logits; return them."""
    manifest = task.manifest(teacher["hash"], {})
    logits = torch.cat(list(task.predict_batches(teacher["checkpoint"], manifest.rows(0))))
    write_shard(tmp_path / "targets", manifest, view=0, shard=0, logits=logits)
    return logits


def gradient(network: nn.Module, loss: Loss, batch: Batch, total: float) -> torch.Tensor:
    network.zero_grad()
    loss(network(batch.inputs).logits, batch, total)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("form", ["", "targets.top_k=5", "targets.samples=4"])
def test_what_a_teacher_knows_of_tokens_is_read_from_its_cache(tmp_path: Path, form: str) -> None:
    """The tokens that are predicted count, under their texts."""
    config, task = start(tmp_path, *filter(None, [form]))
    teacher = make_teacher(config, task, tmp_path)
    logits = cache(task, teacher, tmp_path)
    found = read_targets(task, str(tmp_path / "targets"), [teacher])
    labels = task.data.splits["train"].labels
    assert found.of == int((labels != IGNORED).sum()) < len(labels)
    assert all(row.label.startswith("'") for row in found.near)  # type: ignore[union-attr]
    if form == "targets.samples=4":
        assert (found.softness, len(found.notes)) == ((), 1)
        return
    p = logits[labels != IGNORED].float().softmax(-1)
    assert found.softness[0].largest == pytest.approx(float(p.amax(-1).mean()), abs=1e-3)
    item = found.seconds[0].item
    assert found.seconds[0].label == task.output_names([int(labels[item])])[0]


@pytest.mark.parametrize("teachers", [0, 1, 2])
@pytest.mark.parametrize("settings", [[], ["train.label_smoothing=0.1", "distill.alpha=0.5"]])
def test_tokens_count_by_their_weights(tmp_path: Path, teachers: int, settings: list[str]) -> None:
    config, task = start(tmp_path, "distill.live=true", *settings, weight=0.25)
    rows = [make_teacher(config, task, tmp_path, seed=seed) for seed in range(teachers)]
    loss = make_loss(task, make_trial(config, tmp_path / "s" / "a.safetensors", rows))
    data, windows = task.data.splits["train"], torch.tensor([1, 30, 77])
    batch = Batch(
        data.inputs(windows), data.labels_of(windows), data.weights_of(windows), data.rows(windows)
    )
    torch.manual_seed(3)
    logits = task.make(config.model)(batch.inputs).logits.detach().requires_grad_()
    terms = loss(logits, batch, batch.total)
    terms["loss"].backward()
    twin = logits.detach().requires_grad_()
    flat = twin.log_softmax(-1).flatten(0, 1)
    losses = F.cross_entropy(
        twin.flatten(0, 1),
        batch.labels.flatten(),
        reduction="none",
        label_smoothing=config.train.label_smoothing,
    )
    if teachers:
        p = sum(
            task.load(row["checkpoint"])[0](batch.inputs).logits.softmax(-1) for row in rows
        ).flatten(0, 1) / len(rows)
        alpha = config.distill.alpha
        losses = (1 - alpha) * losses + alpha * (p * (p.log() - flat)).sum(-1)
    weights = data.weights_of(windows).flatten()
    expected = (losses * weights).sum() / weights.sum()
    expected.backward()
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(logits.grad, twin.grad)


@pytest.mark.parametrize("live", [True, False])
def test_batches_that_are_added_up_are_one(tmp_path: Path, live: bool) -> None:
    found = []
    for size, accumulate in ((8, 1), (2, 4), (3, 3)):
        more = (f"train.batch_size={size}", f"train.accumulate={accumulate}")
        config, task = start(tmp_path, *more, f"distill.live={live}".lower(), weight=2.0)
        teachers = [make_teacher(config, task, tmp_path)] if live else None
        path = tmp_path / str(size) / "student.safetensors"
        rows = list(task.train(make_trial(config, path, teachers)))
        weights = [p.detach().flatten() for p in task.load(str(path))[0].parameters()]
        found.append((rows[-1]["loss"], torch.cat(weights)))
    torch.testing.assert_close(found[1], found[0])
    assert abs(found[2][0] - found[0][0]) > 1e-4  # nine windows a step


def test_a_live_teacher_is_as_its_cached_logits(tmp_path: Path) -> None:
    config, task = start(tmp_path)
    teachers = [make_teacher(config, task, tmp_path, seed=seed) for seed in (1, 2)]
    for row in teachers:
        cache(task, row, tmp_path)
    losses = []
    for live in ("false", "true"):
        config, task = start(tmp_path, f"distill.live={live}")
        path = tmp_path / live / "student.safetensors"
        *_, last = task.train(make_trial(config, path, teachers))
        losses.append([last["loss"], last["hard_loss"], last["soft_loss"], last["val_nll"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_batch_without_labels_changes_nothing(tmp_path: Path) -> None:
    config, task = start(tmp_path, "distill.live=true")
    network, inputs = task.make(config.model), torch.zeros(2, 5, dtype=torch.int64)
    batch = Batch(inputs, torch.full_like(inputs, IGNORED), None, inputs)
    for teachers in ([], [make_teacher(config, task, tmp_path)]):
        loss = make_loss(task, make_trial(config, tmp_path / "s" / "a.safetensors", teachers))
        assert batch.total == 0
        assert not gradient(network, loss, batch, 1.0).any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_what_a_student_writes_is_trained_on_without_labels(
    tmp_path: Path, divergence: str
) -> None:
    settings = ["distill={live: true, on_policy: 1.0, alpha: 0.0}", "train.accumulate=2"]
    config, task = start(
        tmp_path, *settings, f"distill.divergence={divergence}", "train.steps=40", "train.lr=1"
    )
    teacher = make_teacher(config, task, tmp_path)
    trial = make_trial(config, tmp_path / "s" / "student.safetensors", [teacher])
    first, last = task.train(trial)
    assert "hard_loss" not in last
    assert last["soft_loss"] == last["loss"] < first["loss"]
    assert 0 < last["cut"] < 1


@pytest.mark.parametrize("settings", [["train.amp=bfloat16"], ["train.lr=1e6"]])
def test_precision_and_loss_are_watched(tmp_path: Path, settings: list[str]) -> None:
    config, task = start(tmp_path, "distill={live: true, on_policy: 0.5}", *settings)
    teacher = make_teacher(config, task, tmp_path)
    trial = make_trial(config, tmp_path / "s" / "student.safetensors", [teacher])
    rows: Any = task.train(trial)
    if "train.lr=1e6" in settings:
        with pytest.raises(NonFiniteLossError, match=r"loss must be finite, got .*lower train.lr"):
            list(rows)
    else:
        assert [row["epoch"] for row in rows] == [1, 2]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no compiler")
def test_a_compiled_student_learns_the_same(tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        config, task = start(tmp_path, f"train.compile={compiled}")
        path = tmp_path / compiled / "student.safetensors"
        losses.append([row["loss"] for row in task.train(make_trial(config, path))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_transforms_of_teacher_logits_are_those_of_tokens(tmp_path: Path) -> None:
    config, task = start(tmp_path, "distill.alpha=1")
    teacher = make_teacher(config, task, tmp_path)
    cached = cache(task, teacher, tmp_path)
    trial = make_trial(config, tmp_path / "s" / "a.safetensors", [teacher])
    data, windows = task.data.splits["train"], torch.tensor([1, 30, 77])
    batch = Batch(data.inputs(windows), data.labels_of(windows), None, data.rows(windows))
    logits = task.make(config.model)(batch.inputs).logits.detach()
    valid = (batch.labels != IGNORED).flatten()
    labels, rows = batch.labels.flatten()[valid], data.rows(windows).flatten()[valid]
    own, p = logits.flatten(0, 1)[valid].log_softmax(-1), cached[rows].softmax(-1)
    ce = F.nll_loss(own, labels, reduction="none")

    confidence = p.amax(-1)
    weighted = make_loss(task, trial, "confidence")(logits, batch, batch.total)
    expected = (confidence / confidence.mean() * ce).mean()
    torch.testing.assert_close(weighted["loss"], expected, rtol=1e-3, atol=1e-4)

    fixed = torch.full_like(own, 0.1 / (own.shape[-1] - 1)).scatter(1, labels[:, None], 0.9)
    virtual = make_loss(task, trial, "virtual")(logits, batch, batch.total)
    torch.testing.assert_close(virtual["loss"], (fixed * (fixed.log() - own)).sum(-1).mean())

    hard = make_loss(task, trial, "hard")(logits, batch, batch.total)
    torch.testing.assert_close(hard["loss"], F.nll_loss(own, p.argmax(-1)), rtol=1e-3, atol=1e-4)

    temperature, every = config.distill.temperature, data.labels
    soft = (cached / temperature).softmax(-1)
    means = torch.stack([soft[every == label].mean(0) for label in labels])
    student = (logits.flatten(0, 1)[valid] / temperature).log_softmax(-1)
    expected = temperature**2 * F.kl_div(student, means, reduction="batchmean")
    of_class = make_loss(task, trial, "class_mean")(logits, batch, batch.total)
    torch.testing.assert_close(of_class["loss"], expected, rtol=1e-3, atol=1e-4)

    permuted = make_loss(task, trial, "permuted")(logits, batch, batch.total)
    plain = make_loss(task, trial)(logits, batch, batch.total)
    assert permuted["loss"] != plain["loss"]
    again = make_loss(task, trial, "permuted")(logits, batch, batch.total)
    assert again["loss"] == permuted["loss"]


def test_tokens_of_one_weight_are_compared_in_confidence(tmp_path: Path) -> None:
    config, task = start(tmp_path, weight=0.25)
    teacher = make_teacher(config, task, tmp_path)
    cached = cache(task, teacher, tmp_path)
    trial = make_trial(config, tmp_path / "s" / "a.safetensors", [teacher])
    data, windows = task.data.splits["train"], torch.tensor([1, 30, 77])
    weights, rows = data.weights_of(windows), data.rows(windows)
    batch = Batch(data.inputs(windows), data.labels_of(windows), weights, rows)
    logits = task.make(config.model)(batch.inputs).logits.detach()
    found = make_loss(task, trial, "confidence")(logits, batch, batch.total)
    hard = expected = torch.zeros(())
    for weight in (0.25, 1.0):
        mask = weights == weight
        confidence = cached[rows[mask]].softmax(-1).amax(-1)
        ce = F.cross_entropy(logits[mask], batch.labels[mask], reduction="none")
        expected = expected + weight * (confidence / confidence.mean() * ce).sum() / batch.total
        hard = hard + weight * ce.sum() / batch.total
    torch.testing.assert_close(found["loss"], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["hard_loss"], hard)
