"""CPU time of a training step of the Trainer of transformers: labels, live teacher, cached logits.

    python tests/benchmarks/cached_trainer.py

A GPT-2 of 2 layers and 64 wide, the teacher of 4 layers and 128 wide, 1,024 tokens of vocabulary,
batches of 12 x 64 tokens, on one CPU thread. Rounds take turns, and the median of the CPU time is
printed, which other processes change little.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import selfkd
from selfkd.integrations.transformers import DistillationTrainer

VOCABULARY, LENGTH, BATCH, STEPS, ROUNDS = 1024, 64, 12, 20, 5


def make_model(layers: int, width: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_layer=layers, n_embd=width, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_trainer(folder: Path, data: Any, **source: Any) -> Any:
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1_000,
    )  # fmt: skip
    kind = DistillationTrainer if source else transformers.Trainer
    trainer = kind(make_model(2, 64), args, train_dataset=data, **source)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.ERROR)
    ids = torch.randint(VOCABULARY, (400, LENGTH))
    data = [{"input_ids": row, "labels": row} for row in ids]
    teacher = make_model(4, 128)
    settings = {"temperature": 1.0, "alpha": 1.0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources: dict[str, dict[str, Any]] = {
            "labels": {},
            "live teacher": {"teacher": teacher, **settings},
        }
        sizes = {}
        for label, form in FORMS.items():
            targets = selfkd.cache_logits(teacher, data, folder / label, **form)
            files = (folder / label).rglob("shard_*")
            sizes[label] = sum(file.stat().st_size for file in files) / ids.numel()
            sources[label] = {"targets": targets, **settings}
        times: dict[str, list[float]] = {label: [] for label in sources}
        for turn in range(ROUNDS + 1):
            for label, source in sources.items():
                trainer = make_trainer(folder, data, **source)
                gc.freeze()  # Trainer collects garbage in each training, of all that is imported
                start = time.process_time()
                trainer.train()
                if turn:  # the first warms up
                    times[label].append((time.process_time() - start) / STEPS)
    labels = statistics.median(times["labels"])
    print("loss              ms a step   of labels   bytes a token")
    for label, found in times.items():
        median = statistics.median(found)
        size = f"{sizes[label]:13,.0f}" if label in sizes else ""
        print(f"{label:16} {1000 * median:10.1f} {median / labels:11.2f}   {size}")


FORMS: dict[str, dict[str, Any]] = {
    "cached": {},
    "32 largest": {"top_k": 32},
    "8 samples": {"samples": 8},
}

if __name__ == "__main__":
    main()
