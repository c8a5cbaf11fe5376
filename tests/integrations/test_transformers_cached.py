"""Cached teacher logits in the Trainer of transformers: the loss of a live teacher, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import selfkd

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from selfkd.integrations.transformers import DistillationTrainer, host  # noqa: E402
from selfkd.integrations.transformers.host import HostCollate  # noqa: E402

VOCABULARY, COUNT = 24, 13


def make_gpt(seed: int, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=vocabulary, **sizes | dropout | ends | changes)
    return transformers.GPT2LMHeadModel(config)


def make_bert(seed: int, kind: str = "SequenceClassification", **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3, initializer_range=0.3, **changes,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config)


def make_rows(kind: str = "tokens", count: int = COUNT, seed: int = 0) -> Any:
    """Make items of 3 to 9 tokens; `completion` has labels of the last tokens only."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(3, 10, (), generator=generator))
        ids = torch.randint(3, 19, (length,), generator=generator).tolist()
        labels: Any = {
            "tokens": ids,
            "completion": [-100, -100, *ids[2:]],
            "classes": [token % 3 for token in ids],
            "items": number % 3,
        }[kind]
        rows.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row, and two tokens more."""
    width = max(len(row["input_ids"]) for row in rows) + 2

    def pad(values: list[int], filling: int) -> list[int]:
        return values + [filling] * (width - len(values))

    several = isinstance(rows[0]["labels"], list)
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(
            [pad(row["labels"], -100) if several else row["labels"] for row in rows]
        ),
    }


def make_trainer(
    folder: Path, student: Any, data: Any, *, more: Any = None, **settings: Any
) -> Any:
    arguments = {
        "per_device_train_batch_size": 4, "learning_rate": 0.1, "max_grad_norm": 0, "optim": "sgd",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "num_train_epochs": 2, "per_device_eval_batch_size": 5,
    }  # fmt: skip
    settings = {"temperature": 1.0, "data_collator": collate, "eval_dataset": data} | settings
    trainer = DistillationTrainer(
        student,
        transformers.TrainingArguments(str(folder), **arguments | (more or {})),
        train_dataset=data,
        **settings,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found = trainer.state.log_history
    return [entry[name] for entry in found for name in ("loss", "soft_loss") if name in entry]


MANY = {
    "gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "seed": 3,
    "train_sampling_strategy": "group_by_length",
}  # fmt: skip
CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "causal": (make_gpt, make_rows(), {}, {}),
    "completion": (make_gpt, make_rows("completion"), MANY, {"temperature": 2.0}),
    "no full logits": (make_gpt, make_rows("completion"), {}, {"full_logits": False}),
    "without labels": (make_gpt, make_rows().remove_columns("labels"), {}, {"alpha": 1.0}),
    "js": (make_gpt, make_rows(), {}, {"divergence": "js"}),
    "list": (make_gpt, list(make_rows()), {}, {}),
    "tokens of classes": (lambda s: make_bert(s, "TokenClassification"), make_rows("classes"),
                          {}, {}),
    "masked": (lambda s: make_bert(s, "MaskedLM"), make_rows("completion"), {}, {}),
    "items": (make_bert, make_rows("items"), MANY, {"temperature": 3.0}),
}  # fmt: skip


def unlabelled(rows: list[Any]) -> dict[str, Tensor]:
    batch = collate([{**row, "labels": row["input_ids"]} for row in rows])
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("case", CASES)
def test_cached_logits_train_as_a_live_teacher(case: str, tmp_path: Path) -> None:
    make, data, more, settings = CASES[case]
    if case == "without labels":
        settings = settings | {"data_collator": unlabelled}
    teacher = make(1)
    # batches of another size, and rows of another padding than in training
    targets = selfkd.cache_logits(teacher, data, tmp_path / "logits", batch_size=3, exact=True)
    live, cached = (
        losses(make_trainer(tmp_path, make(0), data, more=more, **source, **settings))
        for source in ({"teacher": teacher}, {"targets": targets})
    )
    assert cached == pytest.approx(live, abs=2e-5)
    assert len(live) >= 8


@pytest.mark.parametrize("case", ["completion", "without labels"])
def test_copies_on_the_host_change_no_bit(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, data, more, settings = CASES[case]
    if case == "without labels":
        settings = settings | {"data_collator": unlabelled}
    targets = selfkd.cache_logits(make(1), data, tmp_path / "logits")
    options = {"more": more, "targets": targets, **settings}
    expected = losses(make_trainer(tmp_path, make(0), data, **options))
    asked = list[bool]()

    def on_host(inputs: Any) -> Any:
        found = host.on_host(inputs)
        asked.append(found is not inputs)
        return found

    monkeypatch.setattr(DistillationTrainer, "_with_copies", lambda _, own, data: HostCollate(own))
    monkeypatch.setattr("selfkd.integrations.transformers.trainer.on_host", on_host)

    assert losses(make_trainer(tmp_path, make(0), data, **options)) == expected
    assert asked
    assert all(asked)


@pytest.mark.parametrize(
    ("more", "loss"), [({"top_k": 6}, "below"), ({"samples": 8}, "below"), ({}, "close")]
)
def test_half_precision_the_largest_logits_and_samples(
    more: Any, loss: str, tmp_path: Path
) -> None:
    data, teachers = make_rows(), [make_gpt(1), make_gpt(2)]
    targets = selfkd.cache_logits(teachers, data, tmp_path / "logits", **more)
    live = losses(make_trainer(tmp_path, make_gpt(0), data, teacher=teachers))
    cached = losses(make_trainer(tmp_path, make_gpt(0), data, targets=targets))
    if loss == "close":
        assert cached == pytest.approx(live, abs=2e-3)
    assert cached[-1] < cached[0]
    assert cached[0] > 0.3


def test_items_in_one_row_with_position_ids_have_their_own_rows(tmp_path: Path) -> None:
    data, teacher = make_rows(), make_gpt(1)
    targets = selfkd.cache_logits(teacher, data, tmp_path / "logits", exact=True)
    flat = transformers.DataCollatorWithFlattening(return_position_ids=True)
    packed = make_trainer(
        tmp_path, make_gpt(0), data, targets=targets, data_collator=flat, alpha=1.0
    )
    batch = next(iter(packed.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    rows = batch["soft_target_rows"][0]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    firsts = targets.rows(torch.arange(COUNT), 1)[:, 0].tolist()
    assert {rows[start].item() for start in starts} <= set(firsts)
    ids = torch.tensor([token for row in data for token in row["input_ids"]])
    assert ids[rows].equal(batch["input_ids"][0])
    assert all(loss > 0 for loss in losses(packed))


def test_resuming_equals_not_having_stopped(tmp_path: Path) -> None:
    data, teacher = make_rows(), make_gpt(1)
    targets = selfkd.cache_logits(teacher, data, tmp_path / "logits")
    more = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(tmp_path / "run", make_gpt(0), data, targets=targets, more=more)
    whole.train()
    again = selfkd.load_logits(tmp_path / "logits")
    resumed = make_trainer(tmp_path / "run", make_gpt(5), data, targets=again, more=more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.equal(other)


def test_evaluation_is_by_labels_but_for_the_cached_data(tmp_path: Path) -> None:
    data, other, teacher = make_rows(), make_rows(seed=1), make_gpt(1)
    targets = selfkd.cache_logits(teacher, data, tmp_path / "logits", exact=True)
    live = make_trainer(tmp_path, make_gpt(0), data, teacher=teacher)
    cached = make_trainer(tmp_path, make_gpt(0), data, targets=targets)
    expected, found = live.evaluate(), cached.evaluate()
    for name in ("eval_loss", "eval_soft_loss", "eval_hard_loss"):
        assert found[name] == pytest.approx(expected[name], abs=2e-5)
    unseen = cached.evaluate(other)
    assert "eval_soft_loss" not in unseen
    assert unseen["eval_loss"] == unseen["eval_hard_loss"]
    assert unseen["eval_loss"] == pytest.approx(live.evaluate(other)["eval_hard_loss"], abs=2e-5)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize(("student", "teacher"), [(200, 201), (201, 200)])
def test_padded_vocabularies_are_compared_over_their_common_part(
    student: int, teacher: int, top_k: int | None, tmp_path: Path
) -> None:
    data, model = make_rows(), make_gpt(1, teacher)
    targets = selfkd.cache_logits(model, data, tmp_path / "logits", top_k=top_k)
    if top_k is not None and teacher > student:  # as untrained logits of padding are large
        with pytest.raises(ValueError, match=r"below 200, got token 200: student\.resize_token_e"):
            losses(make_trainer(tmp_path, make_gpt(0, student), data, targets=targets))
        return
    live = losses(make_trainer(tmp_path, make_gpt(0, student), data, teacher=model))
    cached = losses(make_trainer(tmp_path, make_gpt(0, student), data, targets=targets))
    if top_k is None:
        assert cached == pytest.approx(live, abs=3e-3)
    assert cached[-1] < cached[0]


def test_a_card_says_that_logits_were_cached(tmp_path: Path) -> None:
    data = make_rows()
    targets = selfkd.cache_logits(make_gpt(1), data, tmp_path / "logits", top_k=4)
    trainer = make_trainer(tmp_path, make_gpt(0), data, targets=targets)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "from the cached logits of a teacher" in text


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(list(make_rows()))


def left(rows: list[Any]) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in collate(rows).items()}


LONGER = make_rows(count=COUNT, seed=4)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (make_rows(), {"teacher": make_gpt(1)}, "teacher or targets must be given, .* got both"),
        (make_rows(), {"targets": None}, "teacher or targets must be given, .* got neither"),
        (make_rows(), {"hidden_weight": 1.0}, "hidden_weight must be 0 .* live teacher"),
        (make_rows(), {"divergence": "js"}, "divergence must be 'forward_kl' where targets are"),
        (make_rows(count=12), {}, "whose logits are cached, of 13 items, got 12"),
        (LONGER, {}, "dataset must be the one whose logits are cached.* as item 0, of"),
        (Stream(), {}, "train_dataset must be map-style with targets"),
    ],
)
def test_faults_are_refused_at_once(
    data: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    targets = selfkd.cache_logits(make_gpt(1), make_rows(), tmp_path / "logits", top_k=4)
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path, make_gpt(0), data, **{"targets": targets, "more": {"max_steps": 2}} | settings
        )


def test_models_must_fit_the_cached_logits(tmp_path: Path) -> None:
    data = make_rows("items")
    tokens = selfkd.cache_logits(make_gpt(1), data, tmp_path / "tokens")
    items = selfkd.cache_logits(make_bert(1), data, tmp_path / "items")
    with pytest.raises(ValueError, match=r"targets must have the student's vocabulary, .* got 24"):
        make_trainer(tmp_path, make_gpt(0, 40), data, targets=tokens)
    with pytest.raises(ValueError, match="as many classes as the student, 3, got 24"):
        make_trainer(tmp_path, make_bert(0), data, targets=tokens)
    with pytest.raises(ValueError, match=r"student's vocabulary, .* got 3 tokens"):
        make_trainer(tmp_path, make_gpt(0), data, targets=items)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_classes_must_be_in_the_order_of_the_teacher(kind: str, tmp_path: Path) -> None:
    data = make_rows("items" if kind.startswith("Sequence") else "classes")

    def named(*names: str) -> Any:
        return make_bert(0, kind, id2label=dict(enumerate(names)))

    selfkd.cache_logits(named("yes", "no", "maybe"), data, tmp_path / "logits")
    targets = selfkd.load_logits(tmp_path / "logits")
    for same in (named("Yes", "no", "maybe"), make_bert(0, kind)):
        make_trainer(tmp_path, same, data, targets=targets)
    with pytest.raises(ValueError, match=r"classes in their order \['no', .* got \['yes', .*: set"):
        make_trainer(tmp_path, named("no", "yes", "maybe"), data, targets=targets)


def test_batches_must_have_the_tokens_whose_logits_are_cached(tmp_path: Path) -> None:
    data = make_rows()
    targets = selfkd.cache_logits(make_gpt(1), data, tmp_path / "logits")
    trainer = make_trainer(tmp_path, make_gpt(0), data, targets=targets, data_collator=left)
    with pytest.raises(ValueError, match="pad on the right only"):
        trainer.train()
    changed = data.to_list()
    changed[5]["input_ids"][0] += 1
    trainer = make_trainer(tmp_path, make_gpt(0), changed, targets=targets)
    with pytest.raises(ValueError, match="another text as item 5, of"):
        trainer.train()


def test_labels_in_the_padding_have_no_logits(tmp_path: Path) -> None:
    data = make_rows()
    targets = selfkd.cache_logits(make_gpt(1), data, tmp_path / "logits")

    def labelled(rows: list[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {**batch, "labels": batch["input_ids"]}

    trainer = make_trainer(tmp_path, make_gpt(0), data, targets=targets, data_collator=labelled)
    with pytest.raises(ValueError, match="labels must be -100 where there are no cached logits"):
        trainer.train()


def test_imported_log_probabilities_train_at_one_temperature(tmp_path: Path) -> None:
    data, teacher, count = make_rows("completion"), make_gpt(1), 6
    lines = []
    for row in data:
        log_p = teacher(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).detach()
        values, ids = log_p[1:-1].topk(count)  # of the completion, which starts at the third token
        lines.append(json.dumps({"ids": ids.tolist(), "logprobs": values.tolist()}))
    file = tmp_path / "teacher.jsonl"
    file.write_text("\n".join(lines))
    imported = selfkd.import_logprobs(file, data, tmp_path / "logits", vocabulary=VOCABULARY)
    cached = selfkd.cache_logits(teacher, data, tmp_path / "logits", top_k=count)
    ours, theirs = (
        losses(make_trainer(tmp_path, make_gpt(0), data, targets=targets))
        for targets in (imported, cached)
    )
    assert ours == pytest.approx(theirs, abs=2e-3)
    with pytest.raises(ValueError, match="temperature must be 1 with targets of log-probabilities"):
        make_trainer(tmp_path, make_gpt(0), data, targets=imported, temperature=2.0)
    whole = data.map(lambda row: {"labels": row["input_ids"]})
    trainer = make_trainer(tmp_path, make_gpt(0), whole, targets=imported)
    with pytest.raises(ValueError, match="or a prompt whose log-probabilities were not imported"):
        trainer.train()
