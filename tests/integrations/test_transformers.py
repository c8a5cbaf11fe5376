"""The Trainer of transformers with a teacher, on tiny models."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from selfkd.integrations.transformers import (  # noqa: E402
    DistillationTrainer,
    start_from_teacher,
)
from selfkd.integrations.transformers.projection import PROJECTION_FILE  # noqa: E402
from selfkd.losses import distillation_terms  # noqa: E402

VOCABULARY, CLASSES = 64, 4
EVERY_TERM = {
    "temperature": 3.0, "alpha": 0.7,
    "hidden_weight": 0.5, "cosine_weight": 0.25, "attention_weight": 2.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: several slow tiny models down on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_bert(kind: str = "SequenceClassification", *, layers: int, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16,
        "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }  # fmt: skip
    config = transformers.BertConfig(**sizes | changes)
    torch.manual_seed(layers)
    model = getattr(transformers, f"BertFor{kind}")(config)
    for parameter in model.parameters():  # as initialised, all logits are nearly the same
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_causal(kind: str, *, layers: int, **changes: Any) -> Any:
    torch.manual_seed(layers)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2} | changes
    if kind == "gpt2":
        gpt2 = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 16}
        dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **dropout, **sizes))
    llama = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**llama, intermediate_size=64, **sizes)
    )


def make_rows(count: int, *, tokens: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make rows of 3 to 10 tokens, labelled by the group, id % 4, of most of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 11, (), generator=generator))
        label = torch.randint(CLASSES, (), generator=generator)
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
        most = length // 2 + 1
        ids[:most] = ids[:most] // CLASSES * CLASSES + label
        ids = ids[torch.randperm(length, generator=generator)]
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
        rows.append({"input_ids": ids, "labels": labels if tokens else label})
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.stack(labels)
        if not labels[0].ndim
        else pad(labels, batch_first=True, padding_value=-100),
    }


class Gradients(transformers.TrainerCallback):  # type: ignore[misc]
    """Callback that records the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        modules = [self.trainer.accelerator.unwrap_model(self.trainer.model)]
        modules += [self.trainer.projection] if self.trainer.projection else []
        gradients = [p.grad for module in modules for p in module.parameters()]
        self.steps.append([g.clone() for g in gradients if g is not None])


def make_trainer(
    student: Any, teacher: Any, rows: Any, folder: Path, *, settings: Any = None, **args: Any
) -> Any:
    arguments = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "max_grad_norm": 0,
        "optim": "sgd", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    gradients = Gradients()
    trainer = DistillationTrainer(
        student,
        transformers.TrainingArguments(str(folder), **arguments | args),
        teacher=teacher,
        **EVERY_TERM if settings is None else settings,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[gradients],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    gradients.trainer = trainer
    trainer.gradients = gradients
    return trainer


def models(case: str) -> tuple[Any, Any]:
    """Return student and teacher."""
    if case in ("gpt2", "llama"):
        eager = {"attn_implementation": "eager"}
        return make_causal(case, layers=2, **eager), make_causal(case, layers=4, **eager)
    width = 48 if case == "SequenceClassification" else 32  # another width, for a projection
    return make_bert(case, layers=2), make_bert(case, layers=4, hidden_size=width)


CASES = ["SequenceClassification", "TokenClassification", "MaskedLM", "gpt2", "llama"]


def rows_of(case: str, count: int = 8) -> list[dict[str, Tensor]]:
    rows = make_rows(count, tokens=case != "SequenceClassification")
    for row in rows:
        if case == "TokenClassification":
            row["labels"] = torch.where(row["labels"] < 0, -100, row["labels"] % CLASSES)
    return rows


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_terms_are_those_of_the_whole_batch(case: str, tmp_path: Path) -> None:
    found, logs = [], []
    for size in (8, 2):
        trainer = make_trainer(
            *models(case),
            rows_of(case),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        trainer.train()
        found.append(trainer.gradients.steps[0])
        logs.append(trainer.state.log_history[0])
    assert (trainer.projection is not None) == (case == "SequenceClassification")
    assert sum(g.abs().sum() for g in found[0]) > 1
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-4)
    terms = [f"{name}_loss" for name in ("hard", "soft", "hidden", "cosine", "attention")]
    whole, split = ([log[name] for name in ["loss", *terms]] for log in logs)
    np.testing.assert_allclose(whole, split, rtol=1e-5)
    np.testing.assert_allclose(whole[0], np.dot([0.3, 0.7, 0.5, 0.25, 2.0], whole[1:]), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_formula(case: str, smoothing: float, tmp_path: Path) -> None:
    student, teacher = models(case)
    settings = {"temperature": 3.0, "alpha": 0.7}
    batch = collate(rows_of(case))
    trainer = make_trainer(
        student, teacher, [], tmp_path, settings=settings, label_smoothing_factor=smoothing
    )
    loss = trainer.compute_loss(student, batch).item()
    half = trainer.compute_loss(student.train(), batch, num_items_in_batch=1000)
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        z_s, z_t = (m.eval()(**inputs).logits.double().numpy() for m in (student, teacher))
    labels = batch["labels"].numpy()
    if case in ("gpt2", "llama"):
        z_s, z_t, labels = z_s[:, :-1], z_t[:, :-1], labels[:, 1:]
    z_s, z_t, labels = z_s[labels != -100], z_t[labels != -100], labels[labels != -100]
    log_p = log_softmax(z_s, axis=-1)
    right = np.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    hard = -((1 - smoothing) * right + smoothing * log_p.mean(-1))
    soft_s, soft_t = log_softmax(z_s / 3, axis=-1), log_softmax(z_t / 3, axis=-1)
    soft = 9 * (np.exp(soft_t) * (soft_t - soft_s)).sum(-1)
    expected = 0.3 * hard + 0.7 * soft
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(half.item(), expected.sum() / 1000, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_labels_only_is_the_models_own_loss(case: str, tmp_path: Path) -> None:
    student, teacher = models(case)
    trainer = make_trainer(student, teacher, [], tmp_path, settings={"alpha": 0.0})
    batch = collate(rows_of(case))
    torch.testing.assert_close(trainer.compute_loss(student, batch), student(**batch).loss)


def test_an_encoder_decoder_does_not_shift(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    student = transformers.T5ForConditionalGeneration(config)
    trainer = make_trainer(student, student, [], tmp_path, settings={"alpha": 0.0})
    batch = collate(rows_of("llama"))
    torch.testing.assert_close(trainer.compute_loss(student, batch), student(**batch).loss)


def test_shift_labels_can_be_said(tmp_path: Path) -> None:
    student, teacher = models("llama")
    batch = collate(rows_of("llama"))
    shifted = dict(
        batch, shift_labels=nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    )
    losses = []
    for shift, inputs in [(None, batch), (True, batch), (False, shifted), (False, batch)]:
        settings = {"alpha": 0.0, "shift_labels": shift}
        trainer = make_trainer(student, teacher, [], tmp_path, settings=settings)
        losses.append(trainer.compute_loss(student, inputs).item())
    assert losses[0] == losses[1] == losses[2] != losses[3]


def test_a_batch_without_valid_labels_gives_zero(tmp_path: Path) -> None:
    student, teacher = models("llama")
    trainer = make_trainer(student, teacher, [], tmp_path, settings={})
    batch = collate(rows_of("llama"))
    batch["labels"].fill_(-100)
    loss = trainer.compute_loss(student.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_terms_are_averaged_over_the_interval(tmp_path: Path) -> None:
    student, teacher = models("SequenceClassification")
    rows = make_rows(16)
    trainer = make_trainer(
        student, teacher, rows, tmp_path,
        max_steps=4, logging_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    *logs, last = trainer.state.log_history
    whole = make_trainer(
        student, teacher, rows, tmp_path, per_device_train_batch_size=16, logging_steps=1
    )
    whole.projection = trainer.projection
    whole.train()
    expected = whole.state.log_history[0]
    assert len(logs) == 2
    assert "hard_loss" not in last
    for log in logs:  # an epoch each, with a learning rate of 0; each step has 8 rows
        for name in ("hard_loss", "soft_loss"):  # means over labels, as many in each step
            np.testing.assert_allclose(log[name], expected[name], rtol=1e-5)
        further = ("hidden", "cosine", "attention")  # over tokens and pairs, fewer in some steps
        weighted = 0.3 * log["hard_loss"] + 0.7 * log["soft_loss"]
        weighted += sum(EVERY_TERM[f"{name}_weight"] * log[f"{name}_loss"] for name in further)
        np.testing.assert_allclose(log["loss"], weighted, rtol=1e-5)
        np.testing.assert_allclose(log["hidden_loss"], expected["hidden_loss"], rtol=0.1)


def test_the_projection_is_trained_from_fresh_gradients(tmp_path: Path) -> None:
    trainer = make_trainer(*models("SequenceClassification"), make_rows(8), tmp_path, max_steps=2)
    before = copy.deepcopy(trainer.projection.state_dict())
    trainer.train()
    first, second = trainer.gradients.steps  # learning rate 0: the same step twice
    torch.testing.assert_close(first, second)
    assert first[-1].abs().sum() > 0
    torch.testing.assert_close(trainer.projection.state_dict(), before)
    trainer.create_optimizer()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sum(p is trainer.projection.linear.weight for p in held) == 1
    assert trainer.optimizer.param_groups[-1]["weight_decay"] == 0

    trainer = make_trainer(
        *models("SequenceClassification"), make_rows(8), tmp_path, learning_rate=0.5
    )
    trainer.train()
    moved = trainer.projection.state_dict()["linear.weight"] - before["linear.weight"]
    torch.testing.assert_close(moved, -0.5 * trainer.gradients.steps[0][-2])


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    student, teacher = models("SequenceClassification")
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(
        student, teacher, make_rows(8), tmp_path, learning_rate=0.1, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert teacher.training
    assert not trainer.teacher.module.training
    torch.testing.assert_close(trainer.teacher.module.state_dict(), before, atol=0, rtol=0)
    folder = tmp_path / "checkpoint-1"
    loaded = type(student).from_pretrained(folder)
    torch.testing.assert_close(loaded.state_dict(), student.state_dict(), atol=0, rtol=0)
    assert (folder / PROJECTION_FILE).stat().st_size < 48 * 33 * 4 + 500
    weights = {f.name: f.stat().st_size for f in folder.iterdir() if "safetensors" in f.name}
    assert weights["model.safetensors"] < 4.2 * student.num_parameters() + 20_000
    assert len(weights) == 2


def test_resuming_equals_not_having_stopped(tmp_path: Path) -> None:
    def run(folder: Path, *, resume: str | None = None) -> list[Tensor]:
        trainer = make_trainer(
            *models("SequenceClassification"), make_rows(16), folder,
            max_steps=4, optim="adamw_torch",
            learning_rate=0.01, save_strategy="steps", save_steps=2, logging_steps=2,
        )  # fmt: skip
        if resume:
            nn.init.zeros_(trainer.projection.linear.weight)
        trainer.train(resume_from_checkpoint=resume)
        return [*trainer.model.parameters(), *trainer.projection.parameters()]

    straight = run(tmp_path)
    resumed = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(straight, resumed, atol=0, rtol=0)


def test_evaluation_has_the_same_loss_and_logits_alone(tmp_path: Path) -> None:
    student, teacher = models("SequenceClassification")
    rows = make_rows(8)
    trainer = make_trainer(student, teacher, rows, tmp_path)
    predictions = trainer.predict(rows)
    with torch.no_grad():
        batch = collate(rows)
        loss = trainer.compute_loss(student.eval(), batch).item()
        logits = student(**batch).logits.numpy()
    np.testing.assert_allclose(predictions.predictions, logits, atol=1e-5)
    np.testing.assert_allclose(predictions.metrics["test_loss"], loss, rtol=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_attention_needs_eager_models(tmp_path: Path) -> None:
    student, teacher = make_bert(layers=2), make_bert(layers=4, attn_implementation="sdpa")
    trainer = make_trainer(student, teacher, [], tmp_path)
    with pytest.raises(ValueError, match=r'attentions must be .* attn_implementation="eager"'):
        trainer.compute_loss(student, collate(make_rows(2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"hidden_weight": -1.0}, "hidden_weight must be >= 0 and finite, got -1.0"),
        ({"cosine_weight": float("nan")}, "cosine_weight must be >= 0 and finite, got nan"),
        (
            {"attention_weight": 1.0, "layer_map": [1, 4]},
            r"layer_map must be 2 layers in \[0, 4\), got \[1, 4\]",
        ),
        ({"attention_weight": 1.0, "layer_map": [3]}, r"layer_map must be 2 layers .* got \[3\]"),
    ],
)
def test_faults_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_bert(layers=2), make_bert(layers=4), [], tmp_path, settings=settings)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("case", ["SequenceClassification", "gpt2"])
def test_several_teachers_are_one_by_their_average(case: str, average: str, tmp_path: Path) -> None:
    student, teacher = models(case)
    other = copy.deepcopy(teacher)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    settings = {"temperature": 3.0, "alpha": 1.0, "average": average}
    trainer = make_trainer(student, [teacher, other], rows_of(case), tmp_path, settings=settings)
    inputs = collate(rows_of(case))
    loss = trainer.compute_loss(student, inputs)
    with torch.no_grad():
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        z_s, *z_t = (model.eval()(**batch).logits for model in (student, teacher, other))
    labels = inputs["labels"]
    if case == "gpt2":
        z_s, z_t, labels = z_s[:, :-1], [z[:, :-1] for z in z_t], labels[:, 1:]
    terms = distillation_terms(
        z_s[labels != -100], torch.stack([z[labels != -100] for z in z_t]), labels[labels != -100],
        temperature=3.0, alpha=1.0, average=average,
    )  # fmt: skip
    torch.testing.assert_close(loss, terms.loss)
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0


def test_several_teachers_have_logits_only(tmp_path: Path) -> None:
    student, teacher = models("SequenceClassification")
    with pytest.raises(ValueError, match=r"teacher must be one model where .* are compared, got 2"):
        make_trainer(student, [teacher, teacher], [], tmp_path)


def test_it_is_a_mixin_for_other_trainers(tmp_path: Path) -> None:
    class Mine(DistillationTrainer, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    torch.manual_seed(0)
    student, teacher = (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        )
        for _ in range(2)
    )  # fmt: skip
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", logging_steps=1,
        disable_tqdm=True, save_strategy="no", predict_with_generate=True,
    )  # fmt: skip
    rows = make_rows(8, tokens=True)
    trainer = Mine(
        student, args, teacher=teacher, data_collator=collate, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0
    assert trainer.predict(rows, max_length=5).predictions.shape[0] == 8  # generated


def test_inputs_must_have_labels(tmp_path: Path) -> None:
    student, teacher = models("MaskedLM")
    trainer = make_trainer(student, teacher, [], tmp_path)
    with pytest.raises(ValueError, match=r"inputs must have 'labels', got \['input_ids'\]"):
        trainer.compute_loss(student, {"input_ids": torch.ones(1, 2)})


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="n_gpu must be 1 a process, got 2: start with torchrun"):
        make_trainer(make_bert(layers=2), make_bert(layers=4), [], tmp_path)


def test_the_layer_map_determines_the_layers_compared(tmp_path: Path) -> None:
    teacher = make_bert(layers=4)
    student = make_bert(layers=2)
    start_from_teacher(student, teacher, layer_map=[0, 1])  # the same in its first two layers
    for layer_map, same in ([0, 1], True), (None, False):
        settings = EVERY_TERM | {"layer_map": layer_map}
        trainer = make_trainer(student, teacher, make_rows(8), tmp_path, settings=settings)
        trainer.train()
        log = trainer.state.log_history[0]
        for name in ("hidden_loss", "cosine_loss", "attention_loss"):
            assert (abs(log[name]) < 1e-6) == same


@pytest.mark.parametrize(("layer_map", "taken"), [(None, [1, 3]), ([2, 0], [2, 0])])
def test_a_student_starts_from_its_teacher(layer_map: list[int] | None, taken: list[int]) -> None:
    student, teacher = make_bert(layers=2), make_bert(layers=4)
    names = start_from_teacher(student, teacher, layer_map=layer_map)
    assert set(names) >= {name for name, _ in student.named_parameters()}
    state, given = student.state_dict(), teacher.state_dict()
    for name, tensor in state.items():
        source = re.sub(r"layer\.(\d+)", lambda found: f"layer.{taken[int(found[1])]}", name)
        assert torch.equal(tensor, given[source])
        assert tensor.data_ptr() != given[source].data_ptr()


def test_a_student_of_other_width_is_not_started(tmp_path: Path) -> None:
    student, teacher = models("SequenceClassification")
    with pytest.raises(ValueError, match="of shape"):
        start_from_teacher(student, teacher)


def test_two_generations_reach_the_accuracy_of_the_teacher(tmp_path: Path) -> None:
    rows, unseen = make_rows(1024), make_rows(256, seed=1)

    def accuracy(trainer: Any) -> float:
        prediction = trainer.predict(unseen)
        return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())

    def fit(student: Any, teacher: Any, **settings: Any) -> Any:
        trainer = make_trainer(
            student, teacher, rows, tmp_path, settings=settings, max_steps=120, optim="adamw_torch",
            learning_rate=3e-3, per_device_train_batch_size=32, logging_steps=60,
        )  # fmt: skip
        trainer.train()
        return trainer

    teacher = make_bert(layers=4)
    top = accuracy(fit(teacher, teacher, alpha=0.0))
    first, second = make_bert(layers=2), make_bert(layers=2)
    start_from_teacher(first, teacher)
    # without labels: distilled from the teacher, and from the teacher's student
    first_accuracy = accuracy(
        fit(first, teacher, alpha=1.0, hidden_weight=1.0, attention_weight=1.0)
    )
    second_accuracy = accuracy(fit(second, first, alpha=1.0))
    assert top > 0.85
    assert first_accuracy > top - 0.1
    assert second_accuracy > top - 0.15


def test_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("selfkd.integrations.transf")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'selfkd\[transformers\]'"):
        import selfkd.integrations.transformers  # noqa: F401


PROCESS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_transformers import make_rows, make_trainer, models
trainer = make_trainer(
    *models("SequenceClassification"), make_rows(8), Path(sys.argv[2]),
    per_device_train_batch_size=8 // int(sys.argv[3]), ddp_backend="gloo",
)
trainer.train()
if trainer.args.process_index == 0:
    torch.save((trainer.gradients.steps[0], trainer.state.log_history[0]), sys.argv[2] + "/found")
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        running = []
        for rank in range(count):
            process = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            environment = os.environ | {k: str(v) for k, v in process.items()} | master
            command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(tmp_path)]
            running.append(subprocess.Popen([*command, str(count)], env=environment))
        assert [process.wait() for process in running] == [0] * count
        found.append(torch.load(tmp_path / "found"))
    (gradients, log), (expected, expected_log) = found
    torch.testing.assert_close(gradients, expected, atol=2e-6, rtol=1e-4)
    for name in ("hard_loss", "soft_loss", "hidden_loss", "cosine_loss", "attention_loss", "loss"):
        assert log[name] == pytest.approx(expected_log[name], rel=1e-5)
