"""Distillation in the Trainer of transformers, of models and data as people bring them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from selfkd.integrations.transformers import (  # noqa: E402
    DistillationTrainer,
    start_from_teacher,
)
from selfkd.integrations.transformers.projection import PROJECTION_FILE  # noqa: E402
from selfkd.losses import distillation_terms, multi_label_terms, sequence_terms  # noqa: E402

VOCABULARY = 40
EAGER = {"attn_implementation": "eager"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_bert(kind: str = "SequenceClassification", *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_labels": 3,
        "num_attention_heads": 2, "intermediate_size": 16, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
    }  # fmt: skip
    config = transformers.BertConfig(**sizes | changes)
    return getattr(transformers, f"BertFor{kind}")(config)


def make_distilbert() -> Any:
    torch.manual_seed(1)
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=3,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def make_llama(*, layers: int = 2, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.3,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))


def make_t5(*, layers: int = 1, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=layers, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def make_pairs(count: int = 8) -> list[dict[str, Tensor]]:
    """Make rows of two segments of four tokens, as a tokenizer does of pairs of sentences."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([0] * 4 + [1] * 4)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.int64),
            "token_type_ids": segments,
            "labels": torch.tensor(i % 3),
        }
        for i in range(count)
    ]


def make_texts(count: int = 8, *, length: int | None = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (length or 3 + i,), generator=generator)
        labels = torch.where(torch.rand(len(ids), generator=generator) < 0.3, -100, ids)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0)
        )
        for name in rows[0]
    }


def without(rows: list[dict[str, Tensor]], *names: str) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def arguments(folder: Path, kind: str = "", **changes: Any) -> Any:
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "optim": "sgd",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return getattr(transformers, f"{kind}TrainingArguments")(str(folder), **settings | changes)


class Quiet(DistillationTrainer):
    """Trainer that prints nothing."""

    def __init__(self, *args: Any, **further: Any) -> None:
        super().__init__(*args, **further)
        self.remove_callback(transformers.PrinterCallback)


def train(folder: Path, student: Any, teacher: Any, rows: Any, **further: Any) -> Any:
    names = [name for name in further if name in transformers.TrainingArguments.__annotations__]
    args = arguments(folder, **{name: further.pop(name) for name in names})
    trainer = Quiet(
        student, args, teacher=teacher, train_dataset=rows, eval_dataset=rows, **further
    )
    trainer.train()
    return trainer


def logged(trainer: Any) -> dict[str, float]:
    log = trainer.state.log_history[0]
    return {name: value for name, value in log.items() if name.endswith("loss")}


class Returning(nn.Module):
    """Model that returns something else than an output with logits."""

    def __init__(self, model: nn.Module, change: Any) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and not isinstance(self.model, type(make_distilbert())):
            inputs["token_type_ids"] = token_type_ids
        return self.change(self.model(**inputs).logits)


class Keywords(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPS = {
    "none": lambda model: model,
    "compiled": compiled,
    "keywords": Keywords,
    "tensor": lambda model: Returning(model, lambda logits: logits),
    "tuple": lambda model: Returning(model, lambda logits: (logits, None)),
    "dict": lambda model: Returning(model, lambda logits: {"loss": None, "logits": logits}),
}


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_models_in_any_wrapper_have_the_same_loss(wrap: str, which: str, tmp_path: Path) -> None:
    models = {"student": make_distilbert(), "teacher": make_bert()}
    rows = make_pairs()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        z_t = models["teacher"].eval()(**batch).logits
        del batch["token_type_ids"]
        z_s = models["student"].eval()(**batch).logits
    expected = distillation_terms(z_s, z_t, labels, temperature=2.0, alpha=0.5)
    models[which] = WRAPS[wrap](models[which])
    trainer = train(tmp_path, models["student"], models["teacher"], rows)
    found = logged(trainer)
    np.testing.assert_allclose([found["hard_loss"], found["soft_loss"]], expected[1:], rtol=1e-4)
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    predicted = trainer.predict(without(rows, "labels"))
    np.testing.assert_allclose(predicted.predictions, z_s, atol=1e-5)


def test_what_has_no_logits_is_refused(tmp_path: Path) -> None:
    student = Returning(make_distilbert(), lambda logits: {"loss": logits.sum()})
    with pytest.raises(TypeError, match=r"student must return a tensor of logits, .* dict of loss"):
        train(tmp_path, student, make_bert(), make_pairs())
    with pytest.raises(TypeError, match=r"teacher must return a tensor of logits, .* dict of loss"):
        train(tmp_path, make_distilbert(), student, make_pairs())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("name", ["label", "label_ids", "mine", None])
def test_labels_have_other_names_or_are_missing(
    name: str | None, alpha: float, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = without(make_pairs(), "labels")
    further = {"label_names": ["mine"]} if name == "mine" else {}
    expected = logged(train(tmp_path, make_distilbert(), make_bert(), make_pairs(), alpha=alpha))
    if name is not None:
        rows = [
            row | {name: other["labels"]} for row, other in zip(rows, make_pairs(), strict=True)
        ]
    elif alpha < 1:
        message = r"inputs must have 'labels', got \['attention_mask', .*: alpha=1 distils without"
        with pytest.raises(ValueError, match=message):
            train(tmp_path, make_distilbert(), make_bert(), rows, alpha=alpha)
        return
    else:
        del expected["hard_loss"]
    trainer = train(tmp_path, make_distilbert(), make_bert(), rows, alpha=alpha, **further)
    assert logged(trainer) == pytest.approx(expected)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert ("eval_hard_loss" in found) == (name is not None)


@pytest.mark.parametrize("size", [8, 2])
def test_tokens_without_labels_are_all_of_the_mask(size: int, tmp_path: Path) -> None:
    student, teacher = make_llama(layers=1, seed=1), make_llama()
    rows = without(make_texts(length=None), "labels")
    trainer = train(
        tmp_path, student, teacher, rows, alpha=1.0, data_collator=pad,
        per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
    )  # fmt: skip
    with torch.no_grad():
        z_s, z_t = (
            torch.cat([m.eval()(input_ids=row["input_ids"][None]).logits[0, :-1] for row in rows])
            for m in (student, teacher)
        )
    labels = torch.zeros(len(z_s), dtype=torch.int64)
    expected = distillation_terms(z_s, z_t, labels, temperature=2.0, alpha=1.0).loss.item()
    assert logged(trainer) == pytest.approx({"loss": expected, "soft_loss": expected}, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_hidden_states_are_those_of_models_of_transformers(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.config = nn.Embedding(VOCABULARY, 3), SimpleNamespace()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embedding(input_ids).mean(dim=1)

    assert logged(train(tmp_path, Bare(), make_bert(), make_pairs()))["soft_loss"] > 0
    with pytest.raises(ValueError, match="models of transformers only, got Bare without their"):
        train(tmp_path, Bare(), make_bert(), make_pairs(), hidden_weight=1.0)


def test_an_encoder_decoder_needs_labels(tmp_path: Path) -> None:
    rows = without(make_texts(), "labels")
    with pytest.raises(ValueError, match=r"got .*: an encoder-decoder makes its inputs from them"):
        train(tmp_path, make_t5(), make_t5(), rows, alpha=1.0)


def test_terms_of_evaluation_are_means_over_all_tokens(tmp_path: Path) -> None:
    student, rows = make_llama(layers=1, seed=1), make_texts(length=None)
    trainer = train(
        tmp_path, student, make_llama(hidden_size=24), rows, data_collator=pad, hidden_weight=0.5,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    found = trainer.evaluate()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = student.eval()(input_ids=row["input_ids"][None]).logits[0, :-1]
            total += F.cross_entropy(logits, row["labels"][1:], reduction="sum").item()
            count += int((row["labels"][1:] != -100).sum())
    assert math.exp(found["eval_hard_loss"]) == pytest.approx(math.exp(total / count), rel=1e-4)
    weighted = 0.5 * (found["eval_hard_loss"] + found["eval_soft_loss"] + found["eval_hidden_loss"])
    assert found["eval_loss"] == pytest.approx(weighted, rel=1e-6)
    whole = train(tmp_path, student, trainer.teacher.module, rows, data_collator=pad)
    assert whole.evaluate()["eval_hard_loss"] == pytest.approx(found["eval_hard_loss"], rel=1e-5)
    assert trainer.predict(rows).metrics["test_soft_loss"] == found["eval_soft_loss"]


@pytest.mark.parametrize(
    ("rank", "remainder", "ends", "real"),
    [(0, 5, True, 4), (1, 5, True, 1), (1, 3, True, 0), (1, 5, False, 4), (1, 0, True, 4)],
)
def test_rows_that_fill_the_last_batch_are_not_evaluated_twice(
    rank: int, remainder: int, ends: bool, real: int
) -> None:
    """Of 5 rows two processes evaluate batches of 4: the second one three rows again."""
    state = SimpleNamespace(end_of_dataloader=ends, remainder=remainder)
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(gradient_state=state),
        args=SimpleNamespace(world_size=2, process_index=rank),
    )
    inputs = {"labels": torch.arange(4)}
    found = DistillationTrainer.without_repeats(trainer, inputs)["labels"]
    assert found.tolist() == [*range(real), *[-100] * (4 - real)]
    assert inputs["labels"].tolist() == [0, 1, 2, 3]
    scores = {"labels": torch.ones(4, 3)}
    assert DistillationTrainer.without_repeats(trainer, scores) is scores


def checkpointed(reentrant: bool) -> dict[str, Any]:
    kwargs = {"use_reentrant": reentrant}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}


def test_a_student_without_a_graph_is_refused(tmp_path: Path) -> None:
    teacher, rows = make_llama(**EAGER), make_texts()
    frozen = make_llama(layers=1).requires_grad_(False)
    with pytest.raises(ValueError, match="student_logits must have a graph to train the student"):
        train(tmp_path, frozen, teacher, rows)
    message = r"attention of the student's layer 0 must have a graph .*\(use_reentrant=False keeps"
    settings: dict[str, Any] = {"attention_weight": 1.0}
    with pytest.raises(ValueError, match=message):
        train(
            tmp_path, make_llama(layers=1, **EAGER), teacher, rows, **settings,
            **checkpointed(reentrant=True),
        )  # fmt: skip
    train(
        tmp_path, make_llama(layers=1, **EAGER), teacher, rows, **settings,
        **checkpointed(reentrant=False),
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_hidden_states_have_their_gradient(reentrant: bool, tmp_path: Path) -> None:
    moved = []
    for settings in ({}, checkpointed(reentrant)):
        student = make_llama(seed=1)
        train(
            tmp_path, student, make_llama(layers=4), make_texts(), hidden_weight=1.0,
            learning_rate=0.1, **settings,
        )  # fmt: skip
        moved.append(student.state_dict())
    torch.testing.assert_close(*moved)


def test_frozen_first_layers_need_no_graph(tmp_path: Path) -> None:
    student, rows = make_llama(seed=1), make_texts()
    student.model.embed_tokens.requires_grad_(False)
    student.model.layers[0].requires_grad_(False)
    train(tmp_path, student, make_llama(layers=4), rows, hidden_weight=1.0)
    layer = student.model.layers[0]
    layer.mlp.requires_grad_(True)
    forward = layer.forward
    layer.forward = lambda *args, **inputs: forward(*args, **inputs).detach()
    with pytest.raises(ValueError, match="hidden state of the student's layer 0 must have a graph"):
        train(tmp_path, student, make_llama(layers=4), rows, hidden_weight=1.0)


def test_adapters_train_on_a_frozen_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for settings in ({}, checkpointed(reentrant=True)):
        base = make_llama(seed=1)
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = train(
            tmp_path, peft.get_peft_model(base, config), make_llama(), make_texts(),
            learning_rate=1.0, full_logits=bool(settings), **settings,
        )  # fmt: skip
        adapters = [v for n, v in trainer.model.state_dict().items() if "lora_B" in n]
        assert all(adapter.abs().sum() > 0 for adapter in adapters)


@pytest.mark.parametrize("full_logits", [True, False])
def test_virtual_tokens_of_a_prompt_have_no_loss(full_logits: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows, base = make_texts(), make_llama(seed=1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    student = peft.get_peft_model(base, config)
    trainer = train(tmp_path, student, make_llama(), rows, alpha=0.0, full_logits=full_logits)
    batch = pad(rows)
    with torch.no_grad():
        logits = student.eval()(**batch).logits[:, 4:-1]
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert logged(trainer)["hard_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("flag", ["", "bf16", "bf16_full_eval"])
def test_dtypes_of_student_and_teacher_differ(flag: str, dtype: Any, tmp_path: Path) -> None:
    teacher = make_bert(hidden_size=24).to(dtype)
    flags = {flag: True} if flag else {}
    settings: dict[str, Any] = {"cosine_weight": 1.0}
    student, rows = make_distilbert(), make_pairs()
    found = train(tmp_path, student, teacher, rows, **settings, **flags)
    expected = train(tmp_path, make_distilbert(), teacher.float(), rows, **settings)
    assert logged(found) == pytest.approx(logged(expected), rel=0.05, abs=0.02)
    evaluated = found.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(expected.evaluate()["eval_loss"], rel=0.05)


def test_classes_of_an_ensemble_are_matched_each(tmp_path: Path) -> None:
    def named(order: list[int], seed: int) -> Any:
        names = [["ant", "bee", "cat"][i] for i in order]
        return make_bert(
            seed=seed, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )

    student, teachers = named([0, 1, 2], 1), [named([2, 0, 1], 2), named([0, 1, 2], 3)]
    rows = make_pairs()
    found = logged(train(tmp_path, student, [*teachers, make_bert(seed=4)], rows))
    with torch.no_grad():
        head = teachers[0].classifier
        for tensor in (head.weight, head.bias):
            tensor.copy_(tensor[[1, 2, 0]].clone())
    student.config.id2label = make_bert().config.id2label
    student.config.label2id = make_bert().config.label2id
    expected = logged(train(tmp_path, student, [*teachers, make_bert(seed=4)], rows))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("full_logits", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(1000, 1008), (1008, 1000)])
def test_padded_vocabularies_are_cut(
    ours: int, theirs: int, full_logits: bool, tmp_path: Path
) -> None:
    student, teacher = make_llama(seed=1, vocab_size=ours), make_llama(vocab_size=theirs)
    rows = make_texts()
    found = logged(train(tmp_path, student, teacher, rows, full_logits=full_logits))
    batch = pad(rows)
    labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        z_s, z_t = (model.eval()(**batch).logits for model in (student, teacher))
    common = [z[..., :1000] for z in (z_s, z_t)]
    soft = sequence_terms(*common, labels, temperature=2.0, alpha=1.0).loss.item()
    hard = F.cross_entropy(z_s.flatten(0, 1), labels.flatten()).item()
    assert [found["hard_loss"], found["soft_loss"]] == pytest.approx([hard, soft], rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("case", ["llama", "MaskedLM", "t5"])
def test_without_full_logits_the_loss_is_the_same(
    case: str, divergence: str, tmp_path: Path
) -> None:
    pairs = {
        "llama": lambda: (make_llama(layers=1, seed=1), make_llama(hidden_size=24)),
        "MaskedLM": lambda: (make_bert(case, seed=1, num_hidden_layers=1), make_bert(case)),
        "t5": lambda: (make_t5(seed=1), make_t5(layers=2)),
    }
    settings: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "cosine_weight": 0.5}
    logs, states = [], []
    for full_logits in (True, False):
        student, teacher = pairs[case]()
        trainer = train(
            tmp_path, student, teacher, make_texts(), full_logits=full_logits, learning_rate=0.1,
            **settings if case != "t5" else settings | {"cosine_weight": 0.0},
        )  # fmt: skip
        evaluated = trainer.evaluate()
        logs.append(logged(trainer) | {"eval": evaluated["eval_soft_loss"]})
        states.append(student.state_dict())
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def make_gemma(cap: float | None) -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, final_logit_softcapping=cap,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def test_full_logits_are_needed_without_a_plain_linear_head(tmp_path: Path) -> None:
    lean: dict[str, Any] = {"full_logits": False}
    train(tmp_path, make_gemma(None), make_llama(), make_texts(), **lean)
    message = "full_logits must be True for Gemma2ForCausalLM, whose logits are not those of its"
    for models in ((make_gemma(30.0), make_llama()), (make_llama(), make_gemma(30.0))):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, *models, make_texts(), **lean)
    with pytest.raises(ValueError, match="True where the student has no plain linear head, got No"):
        train(tmp_path, make_distilbert(), make_bert(), make_pairs(), **lean)
    with pytest.raises(ValueError, match="full_logits must be True with 2 teachers, got False"):
        train(tmp_path, make_llama(), [make_llama(), make_llama()], make_texts(), **lean)


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_several_labels_and_numbers_have_their_own_terms(
    problem: str, size: int, tmp_path: Path
) -> None:
    labels = torch.tensor([[i % 2, 1, i % 3 == 0] for i in range(8)]).float()
    rows = [row | {"labels": y} for row, y in zip(make_pairs(), labels, strict=True)]
    student, teachers = make_bert(seed=1, problem_type=problem), [make_bert(), make_bert(seed=2)]
    trainer = train(
        tmp_path, student, teachers, rows, alpha=0.25,
        per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
    )  # fmt: skip
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        outputs = student.eval()(**batch)
        members = torch.stack([teacher.eval()(**batch).logits for teacher in teachers])
    found = logged(trainer)
    assert found["hard_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)  # its own loss
    if problem != "regression":
        expected = multi_label_terms(outputs.logits, members, labels, temperature=2.0, alpha=0.25)
        assert found["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found["loss"], rel=1e-4)
    with pytest.raises(ValueError, match="divergence must be 'forward_kl' for"):
        train(tmp_path, student, teachers, rows, divergence="js")


class Spoil(transformers.TrainerCallback):  # type: ignore[misc]
    """Callback that makes the steps after the first worse."""

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 10.0


def test_the_best_projection_is_restored_with_its_student(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 3, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = train(
        tmp_path, make_llama(layers=1), make_llama(hidden_size=24), make_texts(),
        hidden_weight=1.0, callbacks=[Spoil()], **settings,
    )  # fmt: skip
    assert trainer.state.best_global_step < 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    best = trainer.state.best_model_checkpoint
    Path(best, PROJECTION_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint must have {PROJECTION_FILE} beside"):
        trainer.train(resume_from_checkpoint=best)


def test_a_student_is_made_by_model_init(tmp_path: Path) -> None:
    made = []

    def make() -> Any:
        made.append(make_llama(layers=1, seed=1))
        return made[-1]

    trainer = train(
        tmp_path, None, make_llama(hidden_size=24), make_texts(), model_init=make,
        hidden_weight=1.0, learning_rate=0.1,
    )  # fmt: skip
    first = trainer.projection.state_dict()
    log = logged(trainer)
    trainer.state.log_history.clear()
    trainer.train()
    assert len(made) == 3  # of the trainer, and of each training
    assert trainer.model is made[-1]
    torch.testing.assert_close(trainer.projection.state_dict(), first)
    assert logged(trainer) == pytest.approx(log)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert any(p is trainer.projection.linear.weight for p in held)


def test_further_keywords_are_those_of_the_trainer_mixed_in(tmp_path: Path) -> None:
    class Base(transformers.Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, peft_config: Any = None, **further: Any) -> None:
            super().__init__(*args, **further)
            self.peft_config = peft_config

    class Mine(DistillationTrainer, Base):  # type: ignore[misc]
        pass

    args = arguments(tmp_path)
    trainer = Mine(make_distilbert(), args, teacher=make_bert(), peft_config="given")
    assert trainer.peft_config == "given"
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        Mine(make_distilbert(), args, teacher=make_bert(), temprature=2.0)
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        Mine(make_distilbert(), args, teacher=make_bert(), compute_loss_func=print)


def test_generated_predictions_have_the_loss_of_the_distillation(tmp_path: Path) -> None:
    class Mine(DistillationTrainer, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    args = arguments(tmp_path, "Seq2Seq", predict_with_generate=True, generation_max_length=5)
    rows = [row | {"token_type_ids": row["input_ids"]} for row in make_texts()]
    trainer = Mine(make_t5(), args, teacher=make_t5(layers=2), eval_dataset=rows)
    generated = trainer.predict(rows)
    assert generated.predictions.shape[0] == 8
    metrics = generated.metrics
    weighted = 0.5 * (metrics["test_hard_loss"] + metrics["test_soft_loss"])
    assert metrics["test_loss"] == pytest.approx(weighted)


def test_columns_of_a_data_set_are_kept_for_both(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{k: v.tolist() for k, v in row.items()} | {"text": "a"} for row in make_pairs()]
    found = train(tmp_path, make_distilbert(), make_bert(), datasets.Dataset.from_list(rows))
    expected = train(tmp_path, make_distilbert(), make_bert(), make_pairs())
    assert logged(found) == pytest.approx(logged(expected))


def test_a_card_describes_the_teachers(tmp_path: Path) -> None:
    teachers = [make_bert(), make_distilbert()]
    trainer = train(tmp_path, make_distilbert(), teachers, make_pairs(), divergence="js")
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "distilled with selfkd from an ensemble of 2 teachers" in text
    assert "- BertForSequenceClassification, " in text
    assert "divergence js" in text


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_listed_as_they_are(tied: bool) -> None:
    student = make_llama(layers=1, seed=1, tie_word_embeddings=tied)
    teacher = make_llama(tie_word_embeddings=False)
    names = start_from_teacher(student, teacher)
    ours, theirs = (
        dict(model.named_parameters(remove_duplicate=False)) for model in (student, teacher)
    )
    shared = ["lm_head.weight", "model.embed_tokens.weight"]
    assert [name in names for name in shared] == [not tied, True]
    assert all(torch.equal(ours[name], theirs[name]) for name in shared if name in names)


def encoder_decoder(kind: str, encoder: int, decoder: int) -> Any:
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=encoder,
            num_decoder_layers=decoder,
        )  # fmt: skip
    else:
        config = transformers.BartConfig(
            vocab_size=30, d_model=8, encoder_layers=encoder, decoder_layers=decoder,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=16,
        )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        # the first layer of a T5 alone has the bias of the positions
        ("T5", {"encoder.block.0": 0, "encoder.block.1": 5, "decoder.block.0": 0}),
        ("Bart", {"encoder.layers.0": 2, "encoder.layers.1": 5, "decoder.layers.0": 3}),
    ],
)
def test_encoder_and_decoder_are_started_each(kind: str, taken: dict[str, int]) -> None:
    student, teacher = encoder_decoder(kind, 2, 1), encoder_decoder(kind, 6, 4)
    names = start_from_teacher(student, teacher)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert set(names) >= set(ours)
    for name, tensor in ours.items():
        source = name
        for layer, number in taken.items():
            source = source.replace(f"{layer}.", f"{layer.rpartition('.')[0]}.{number}.")
        assert torch.equal(tensor, theirs[source]), name
    with pytest.raises(ValueError, match=r"layer_map must be of 1 layers, as '.*decoder"):
        start_from_teacher(student, teacher, layer_map=[0, 1])


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification"])
def test_a_distilbert_starts_from_a_bert(kind: str) -> None:
    """With as many layers and without segments it is the same function."""
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=8, n_heads=2, n_layers=2, hidden_dim=16, max_position_embeddings=16,
        num_labels=3,
    )  # fmt: skip
    student = getattr(transformers, f"DistilBertFor{kind}")(config).eval()
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16, "num_labels": 3}
    same, deeper = (make_bert(kind, num_hidden_layers=n, **sizes).eval() for n in (2, 4))
    assert {*start_from_teacher(student, same)} >= {*student.state_dict()}
    inputs = torch.randint(30, (2, 7))
    with torch.no_grad():
        same.bert.embeddings.token_type_embeddings.weight.zero_()
        ours, theirs = student(inputs)[0], same(inputs)[0]
    if kind != "SequenceClassification":  # whose pooler has another activation
        torch.testing.assert_close(ours, theirs)
    start_from_teacher(student, deeper)
    for layer, source in enumerate((1, 3)):
        found = student.distilbert.transformer.layer[layer].attention.k_lin.weight
        assert torch.equal(found, deeper.bert.encoder.layer[source].attention.self.key.weight)
