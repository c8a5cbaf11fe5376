"""The Trainers of transformers and Lightning on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Waits, fake_cuda
from torch import Tensor, nn

import selfkd
from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Teacher

transformers = pytest.importorskip("transformers")

from selfkd.integrations.transformers import DistillationTrainer  # noqa: E402

STEPS, BATCH, LENGTH, VOCABULARY = 2, 4, 6, 20
SIZES = {"vocab_size": VOCABULARY, "initializer_range": 0.3}


def gpt(seed: int, width: int = 8) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, **sizes, bos_token_id=0, eos_token_id=0)
    )


def bert(seed: int, width: int = 8) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **SIZES, **sizes, intermediate_size=8, num_labels=3, attn_implementation="eager"
    )
    return transformers.BertForSequenceClassification(config)


def rows(*, classes: bool = False, count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    tokens = (torch.arange(count * LENGTH) % VOCABULARY).view(count, LENGTH)
    labels = [number % 3 for number in range(count)] if classes else tokens
    pairs = zip(tokens, labels, strict=True)
    return [{"input_ids": ids, "labels": label} for ids, label in pairs]


LAYERS: dict[str, Any] = {"hidden_weight": 0.5, "cosine_weight": 0.5, "attention_weight": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "live": {},
    "several": {"average": "logits"},
    "cached": {},
    "largest": {"top_k": 3},
    "samples": {"samples": 4, "temperature": 1.0},
    "head": {"full_logits": False, "label_smoothing_factor": 0.1},  # which is not Liger's
    "classes": LAYERS,
    "classes cached": {},
    "half": {"bf16": True, "alpha": 1.0},
}
OF_STORE, OF_ARGUMENTS = ("top_k", "samples"), ("bf16", "label_smoothing_factor")


def source(way: str, folder: Path, data: Any, make: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the teachers of a way, or the logits that were cached of one."""
    if way == "several":
        return {"teacher": [make(2, 12), make(3)]}
    if "cached" in way or stored:
        return {"targets": selfkd.cache_logits(make(2, 12), data, folder / "targets", **stored)}
    return {"teacher": make(2, 12)}


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="sgd",
        logging_nan_inf_filter=False, **options,
    )  # fmt: skip


def steps_of(trainer: Any, waits: Waits) -> list[list[str]]:
    """Train; return what was waited for by each step but the first, counting its labels too."""
    found: list[list[str]] = []
    step, sample = trainer.training_step, trainer.get_batch_samples

    def watched(*given: Any, **options: Any) -> Any:
        loss = step(*given, **options)
        assert loss.device.type == "cuda"
        found.append(list(waits.found))
        return loss

    def sampled(iterator: Iterator[Any], *given: Any) -> Any:
        batches = iter([next(iterator)])  # which accelerate sends to the GPU
        waits.clear()
        return sample(batches, *given)

    trainer.training_step, trainer.get_batch_samples = watched, sampled
    trainer.train()
    return found[1:]


TWICE = ("live", "cached", "samples")
"""Ways that others have: several live teachers, cached rows, and the largest of what is cached."""


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way in TWICE)) for way in WAYS]
)
def test_a_step_of_transformers_waits_for_nothing(way: str, tmp_path: Path) -> None:
    make = bert if way.startswith("classes") else gpt
    data = rows(classes=make is bert)
    options = dict(WAYS[way])
    stored = {name: options.pop(name) for name in OF_STORE if name in options}
    own = {name: options.pop(name) for name in OF_ARGUMENTS if name in options}
    options |= source(way, tmp_path, data, make, stored)
    with fake_cuda() as waits:
        settings = arguments(tmp_path, **own)
        trainer = DistillationTrainer(make(1), settings, train_dataset=data, **options)

        found = steps_of(trainer, waits)

    assert found == [[]] * (STEPS - 1)


def test_labels_that_are_changed_on_the_gpu_are_read_there(tmp_path: Path) -> None:
    class Changing(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            inputs["labels"][:, 0] = -100
            return super().compute_loss(model, inputs, *more, **options)

    with fake_cuda() as waits:
        trainer = Changing(gpt(1), arguments(tmp_path), train_dataset=rows(), teacher=gpt(2))

        found = steps_of(trainer, waits)

    assert len(found) == STEPS - 1
    assert all("aten::nonzero" in " ".join(waits) for waits in found)


def test_a_language_model_in_a_loop_by_hand_keeps_no_keys() -> None:
    with fake_cuda() as waits:
        student, teacher = gpt(1).to("cuda"), Teacher(gpt(2)).to("cuda")
        inputs = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="cuda")
        waits.clear()

        logits = student(inputs, use_cache=False).logits
        theirs = teacher.any_logits({"input_ids": inputs})

        assert waits.found == []
        assert logits.shape == theirs.shape


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_of_lightning_waits_for_nothing(cached: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from selfkd.integrations.lightning import DistillationCallback

    class Plain(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    inputs, labels = torch.randn(BATCH, 6), torch.arange(BATCH) % 3
    teacher = nn.Linear(6, 3)
    targets = selfkd.cache_logits(teacher, [(each,) for each in inputs], tmp_path)
    with fake_cuda() as waits:
        module = Plain().to("cuda")
        terms = {} if cached else {"hint": {"student": "2", "teacher": ""}}
        distiller = Distiller(targets=targets) if cached else Distiller(teacher, terms=terms)
        callback = DistillationCallback(distiller, path="model")
        callback.on_fit_start(_Fit(), module)
        module.log_dict = lambda *arguments, **options: None
        batch = [inputs.to("cuda"), labels.to("cuda"), torch.arange(BATCH)]
        for _ in range(2):
            waits.clear()
            module.training_step(batch, 0).backward()

        assert waits.found == []


class _Fit:
    """Trainer of one process."""

    world_size = 1


@pytest.mark.slow  # the rest of the script is tried in test_gpu_check.py, where neither is there
def test_the_script_for_a_gpu_tries_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "gpu"))
    import check  # type: ignore[import-not-found]

    found = {row.what.partition(":")[0] for row in check.run_part("plug-ins", "cpu", quick=True)}

    assert {"Lightning, live", "transformers, live", "transformers, cached"} <= found
