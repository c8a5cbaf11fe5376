"""The Lightning callback on an unmodified module: real fits of a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selfkd import Distiller, Teacher
from selfkd.losses.distillation import distillation_terms

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer

from selfkd.integrations.lightning import DistillationCallback


class Plain(LightningModule):
    """An ordinary module with a cross-entropy loss."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_loader(batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(16, 6, generator=generator)
    labels = torch.randint(3, (16,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


def fit(module: Plain, distiller: Distiller, folder: Path, **options: object) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[DistillationCallback(distiller)],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(module, make_loader())
    return trainer


def by_hand(module: Plain, teacher: nn.Module, *, accumulate: int = 1) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step, (inputs, labels) in enumerate(make_loader(), start=1):
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        terms = distillation_terms(
            module(inputs), teacher_logits, labels, temperature=3.5, alpha=0.65
        )
        (terms.loss / accumulate).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_unmodified_module_is_distilled_from_its_teacher(
    tmp_path: Path, accumulate: int
) -> None:
    teacher = Plain(seed=1)
    module, expected = Plain(), Plain()
    before = dict(module.__dict__)
    trainer = fit(module, Distiller(Teacher(teacher)), tmp_path, accumulate_grad_batches=accumulate)
    by_hand(expected, teacher, accumulate=accumulate)
    torch.testing.assert_close(module.model.weight, expected.model.weight)
    assert {"distill/loss", "distill/hard_loss", "distill/soft_loss"} <= set(
        trainer.callback_metrics
    )
    assert "training_step" not in module.__dict__
    assert "training_step" not in before


def test_generation_0_is_the_module_s_own_loss(tmp_path: Path) -> None:
    module, expected = Plain(), Plain()
    fit(module, Distiller(), tmp_path)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for inputs, labels in make_loader():
        optimizer.zero_grad()
        F.cross_entropy(expected(inputs), labels).backward()
        optimizer.step()
    torch.testing.assert_close(module.model.weight, expected.model.weight)


def test_no_checkpoint_holds_the_teacher(tmp_path: Path) -> None:
    trainer = fit(Plain(), Distiller(Teacher(Plain(seed=1))), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert sorted(saved["state_dict"]) == ["model.bias", "model.weight"]


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    module = Plain()
    before = module.model.weight.detach().clone()
    fit(module, Distiller(Teacher(Plain(seed=1))), tmp_path, precision="bf16-mixed")
    assert torch.isfinite(module.model.weight).all()
    assert not torch.equal(module.model.weight, before)


def test_a_path_of_no_submodule_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[DistillationCallback(Distiller(nn.Linear(6, 3)), path="modle")],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    with pytest.raises(ValueError, match="path must be that of a submodule, got 'modle'"):
        trainer.fit(Plain(), make_loader())
