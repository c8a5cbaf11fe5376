"""GPT-2s distilled by the Trainer of transformers, from logits of a teacher that is run once.

    pip install 'selfkd[transformers]'
    python examples/transformers_cached.py

The teacher is run once, on each token of the training text; students of any seed, order and batch
size are trained from the folder, without the teacher in memory. The text is the manual in Python
itself, by bytes; the last tenth is held out. NLL is in nats a byte, of the held-out text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainingArguments

import selfkd
from selfkd.integrations.transformers import DistillationTrainer

CONTEXT = 64
Rows = list[dict[str, torch.Tensor]]


def make_rows() -> tuple[Rows, Rows]:
    """Return the windows of training and of the held-out text."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    windows = text[: len(text) // CONTEXT * CONTEXT].long().view(-1, CONTEXT)
    rows = [{"input_ids": row, "labels": row} for row in windows]
    held_out = len(rows) // 10
    return rows[:-held_out], rows[-held_out:]


def make_model(*, layers: int, width: int, seed: int) -> GPT2LMHeadModel:
    """Return a small GPT-2 over bytes with random weights."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def fit(student: GPT2LMHeadModel, rows: Rows, steps: int, **settings: Any) -> None:
    """Train a model."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=steps // 10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DistillationTrainer(student, args, train_dataset=rows, **settings)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def nll(model: GPT2LMHeadModel, rows: Rows) -> float:
    """Return the NLL of each next byte, in nats."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    """Print the NLL of the teacher, of students by labels only, and of students from its logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each student")
    parser.add_argument("--seeds", type=int, default=2, help="number of students of each kind")
    parser.add_argument(
        "--samples", type=int, help="tokens drawn from the teacher; all its logits when not given"
    )
    arguments = parser.parse_args()
    rows, unseen = make_rows()

    def report(name: str, model: GPT2LMHeadModel) -> None:
        print(f"{name:20} {nll(model, unseen):.3f} nats", flush=True)

    teacher = make_model(layers=3, width=96, seed=0)
    fit(teacher, rows, 3 * arguments.steps, teacher=teacher, alpha=0.0)  # alpha 0: labels only
    report("teacher", teacher)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "targets"
        selfkd.cache_logits(
            selfkd.Teacher(teacher, copy=False), rows, store, samples=arguments.samples
        )
        targets = selfkd.load_logits(store)  # as in another process, another day
        for seed in range(1, 1 + arguments.seeds):
            plain = make_model(layers=2, width=32, seed=seed)
            fit(plain, rows, arguments.steps, targets=targets, alpha=0.0)
            report(f"labels only, seed {seed}", plain)
            student = make_model(layers=2, width=32, seed=seed)
            fit(student, rows, arguments.steps, targets=targets, temperature=1.0, alpha=1.0)
            report(f"distilled, seed {seed}", student)


if __name__ == "__main__":
    main()
