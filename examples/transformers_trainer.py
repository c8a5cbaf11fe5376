"""A BERT and one of half its depth, distilled by the Trainer of transformers, twice.

    pip install 'selfkd[transformers]'
    python examples/transformers_trainer.py

The student starts from every other layer of its teacher and learns from its logits, hidden states
and attention; generation 2 is as deep as its teacher, the student. Everything is made here: rows of
token ids, each of which votes for a class, with a fifth of the training labels wrong. The accuracy
is of rows never seen, with right labels.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainingArguments,
)

from selfkd.integrations.transformers import DistillationTrainer, start_from_teacher

VOCABULARY, CLASSES, LENGTH = 64, 4, 12
WRONG = 0.2


def make_rows(count: int, *, wrong: float, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return rows whose class is the group, id % 4, that most of their first half is of."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    votes = torch.nn.functional.one_hot(ids[:, : LENGTH // 2] % CLASSES, CLASSES).sum(dim=1)
    labels = votes.argmax(dim=1)
    others = torch.randint(CLASSES, (count,), generator=generator)
    labels = torch.where(torch.rand(count, generator=generator) < wrong, others, labels)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def make_model(*, layers: int, seed: int) -> BertForSequenceClassification:
    """Return a tiny BERT whose attention can be seen."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


def fit(
    student: BertForSequenceClassification,
    teacher: BertForSequenceClassification,
    rows: list[dict[str, torch.Tensor]],
    steps: int,
    **settings: Any,
) -> BertForSequenceClassification:
    """Train the student and return it."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            warmup_steps=steps // 10,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            student, args, teacher=teacher, train_dataset=rows, **settings
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of rows that the model has right, in [0, 1]."""
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    right: torch.Tensor = model.eval()(input_ids=ids).logits.argmax(dim=1) == labels
    return right.float().mean().item()


def main() -> None:
    """Print the accuracy of teacher, student by labels only, distilled student, generation 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="of training")
    parser.add_argument("--steps", type=int, default=400, help="of each of the four models")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = make_rows(arguments.rows, wrong=WRONG, seed=2 * arguments.seed)
    unseen = make_rows(2048, wrong=0.0, seed=2 * arguments.seed + 1)

    def report(name: str, model: BertForSequenceClassification) -> None:
        print(f"{name:13} {100 * accuracy(model, unseen):5.1f} %", flush=True)

    teacher = make_model(layers=4, seed=arguments.seed)
    fit(teacher, teacher, rows, arguments.steps, alpha=0.0)  # alpha 0: by labels only
    report("teacher", teacher)

    plain = make_model(layers=2, seed=arguments.seed + 1)
    fit(plain, teacher, rows, arguments.steps, alpha=0.0)
    report("labels only", plain)

    student = make_model(layers=2, seed=arguments.seed + 1)
    start_from_teacher(student, teacher)
    inside = {"hidden_weight": 1.0, "attention_weight": 10.0}
    fit(student, teacher, rows, arguments.steps, temperature=2.0, alpha=0.9, **inside)
    report("distilled", student)

    again = make_model(layers=2, seed=arguments.seed + 2)
    fit(again, student, rows, arguments.steps, temperature=2.0, alpha=0.9, **inside)
    report("generation 2", again)


if __name__ == "__main__":
    main()
