"""Loops of others with selfkd's loss: a few steps on the device as on the CPU, live and cached."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from correct import HEAD, draw, exact_float32, make_store, network
from setting import Row, Setting, digits
from timm.data.loader import PrefetchLoader, fast_collate
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd.data import Data
from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Teacher
from selfkd.integrations.timm import DistillationTask, WithIndex
from selfkd.losses import LinearLogits, liger_fits, linear_sequence_terms
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import open_store
from selfkd.soft_targets.tokens import TokenIndex, TokenTargets, read_tokens

BATCH, APART = 20, 1e-2
HALF = (torch.bfloat16, torch.float16)
Loop = Callable[..., None]
"""Trains a student on a device, by a teacher or by its cached logits, for some steps."""


def check_plug_ins(setting: Setting) -> list[Row]:
    """Train by each loop on the device and on the CPU, live and cached, and compare the steps."""
    exact_float32()
    warnings.filterwarnings("ignore", message=".*(many workers|LeafSpec)")
    steps, rows = 2 if setting.quick else 10, []
    for name, (library, make, loop) in LOOPS.items():
        if library is not None and not _is_there(library):
            rows.append(Row(name, "skipped", f"{library} is not installed"))
            continue
        expected = _moved(make, loop, device="cpu", cached=False, steps=steps)
        for way, cached in {"live": False, "cached": True}.items():
            found = _moved(make, loop, device=setting.device, cached=cached, steps=steps)
            apart = float((found - expected).norm() / expected.norm())
            assert apart < APART, f"{name}, {way}: {apart:.1e} of its steps apart from the CPU's"
            rows.append(Row(f"{name}, {way}: steps as on the CPU", f"{apart:.1e} apart"))
    if setting.device == "cuda":
        found = [
            _moved(_small, _timm, device="cuda", cached=True, steps=steps, dtype=dtype)
            for dtype in HALF
        ]
        assert all(bool(each.isfinite().all()) for each in found), "weights in half precision"
        rows.append(Row("timm's loop in bfloat16, and in float16 with its scaler", "finite"))
    return [*rows, _liger(setting)]


def _is_there(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ModuleNotFoundError:
        return False
    return True


def _moved(make: Callable[[], nn.Module], loop: Loop, **options: Any) -> Tensor:
    """Return by how much training moves the weights of a new student."""
    student = make()
    start = _weights(student)
    loop(student, **options)
    return _weights(student) - start


def _weights(student: nn.Module) -> Tensor:
    flat = [weight.detach().flatten().cpu() for weight in student.parameters()]
    return torch.cat(flat)


def _small() -> nn.Module:
    return network(1, width=4)


def _distiller(data: Data, device: str, *, cached: bool, folder: Path) -> Distiller:
    """Return the loss with a teacher, or with its cached logits of the images without a view."""
    teacher = network(9, width=6).to(device).eval()
    if not cached:
        return Distiller(Teacher(teacher), **HEAD)
    return Distiller(targets=make_store(folder, [teacher], data, device), **HEAD)


def _own_loop(student: nn.Module, *, device: str, cached: bool, steps: int) -> None:
    data = digits()
    student.to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        loss = _distiller(data.to(device), device, cached=cached, folder=Path(folder))
        batches = data.to(device).batches("train", batch_size=BATCH, device=device)
        for inputs, labels, index in _first(batches, steps):
            value = loss(student(inputs), labels, inputs=inputs, index=index)["loss"]
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()


def _first(batches: Any, count: int) -> Iterator[Any]:
    yield from (batch for _, batch in zip(range(count), batches, strict=False))


def _timm(
    student: nn.Module, *, device: str, cached: bool, steps: int, dtype: Any = torch.float32
) -> None:
    """Train as timm's `train.py` does, by its loader, scaler and optimiser."""
    data = digits()
    student.to(device)
    where = torch.device(device)
    images: Any = TensorDataset(data.train.images, data.train.labels)  # type: ignore[arg-type]
    loader: Any = DataLoader(WithIndex(images) if cached else images, BATCH)
    loader.collate_fn = fast_collate
    loader = PrefetchLoader(loader, mean=data.mean, std=data.std, channels=1, device=where)
    with tempfile.TemporaryDirectory() as folder:
        loss = _distiller(data.to(device), device, cached=cached, folder=Path(folder))
        task = DistillationTask(student, loss, nn.CrossEntropyLoss(), device=where)
        optimizer = create_optimizer_v2(task, opt="sgd", lr=0.05, weight_decay=1e-4)
        scaler = NativeScaler(device) if dtype == torch.float16 else None
        for inputs, target in _first(loader, steps):
            with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
                value = task(inputs, target)["loss"]
            if scaler is not None:
                scaler(value, optimizer, clip_grad=1.0, parameters=task.get_clip_parameters())
            else:
                value.backward()
                optimizer.step()
            optimizer.zero_grad()


def _lightning(student: nn.Module, *, device: str, cached: bool, steps: int) -> None:
    """Train an unchanged module by Lightning's `Trainer` and the callback."""
    from lightning.pytorch import LightningModule, Trainer

    from selfkd.integrations.lightning import DistillationCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = student

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    data, module = digits(), Plain()
    with tempfile.TemporaryDirectory() as folder:
        loss = _distiller(data.to(device), device, cached=cached, folder=Path(folder))
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_steps=steps,
            callbacks=[DistillationCallback(loss, path="model")], logger=False, barebones=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        inputs, labels, index = next(iter(data.batches("train", batch_size=BATCH * steps)))
        trainer.fit(module, DataLoader(TensorDataset(inputs, labels, index), BATCH))


def _gpt(seed: int = 1, width: int = 16) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=width, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _transformers(student: nn.Module, *, device: str, cached: bool, steps: int) -> None:
    """Train a small GPT-2 by the `Trainer` of transformers."""
    from transformers import PrinterCallback, TrainingArguments

    from selfkd.integrations.transformers import DistillationTrainer

    texts = draw(BATCH * steps, 16, seed=3).mul(7).long().abs().clamp(max=39)
    rows = [{"input_ids": each, "labels": each} for each in texts]
    teacher = _gpt(2, width=24).to(device)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=0.05,
            optim="sgd", use_cpu=device == "cpu", report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=1,
        )  # fmt: skip
        if args.n_gpu > 1:
            args._n_gpu = 1  # a process would otherwise split its batches over all of them
        source: dict[str, Any] = {"teacher": teacher}
        if cached:
            source = {"targets": _cached_tokens(Path(folder), teacher, texts, rows)}
        trainer = DistillationTrainer(student, args, train_dataset=rows, **source, **HEAD)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def _cached_tokens(folder: Path, teacher: nn.Module, texts: Tensor, rows: Any) -> TokenTargets:
    """Cache a teacher's logits of each token: `selfkd.cache_logits` without its progress bar."""
    device = next(teacher.parameters()).device
    logits = teacher.eval()(texts.to(device)).logits.float().cpu().flatten(0, 1)
    key = data_key("texts", {})
    manifest = Manifest(
        teacher="teacher", data=key, fingerprint="texts", recipe={}, views=1,
        images=len(logits), classes=logits.shape[1],
    )  # fmt: skip
    write_shard(folder, manifest, view=0, shard=0, logits=logits)
    checks = [read_tokens(row)[1] for row in rows]
    index = TokenIndex.of([texts.shape[1]] * len(rows), checks=checks)
    return TokenTargets(open_store(folder, ["teacher"], data=key), index)


LOOPS: dict[str, tuple[str | None, Callable[[], nn.Module], Loop]] = {
    "own loop": (None, _small, _own_loop),
    "timm's loop": (None, _small, _timm),
    "Lightning": ("lightning", _small, _lightning),
    "transformers": ("transformers", _gpt, _transformers),
}
"""Loops by name: a library that need not be there, and what makes the student."""


def _liger(setting: Setting) -> Row:
    """Compare the loss that Liger computes with that of selfkd's own code, and the gradients."""
    hidden, weight = draw(2, 8, 16, seed=1), draw(50, 16, seed=2)
    teacher = LinearLogits(draw(2, 8, 12, seed=3), draw(50, 12, seed=4)).to(setting.device)
    hidden, weight = hidden.to(setting.device), weight.to(setting.device)
    if not liger_fits(hidden, weight, *teacher):
        why = "needs a GPU" if _is_there("liger_kernel") else "liger_kernel is not installed"
        return Row("Liger's kernel", "skipped", why)
    labels, found = torch.arange(16).view(2, 8).to(setting.device), []
    for smoothing in (0.0, 1e-9):  # which Liger does not compute
        own = hidden.clone().requires_grad_()
        loss = linear_sequence_terms(
            own, weight, teacher, labels, label_smoothing=smoothing, **HEAD
        ).loss
        loss.backward()
        assert own.grad is not None
        found.append((loss.detach(), own.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    return Row("Liger's kernel as selfkd's own code", "close")
